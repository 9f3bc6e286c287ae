"""One progress bar a stage for work that arrives shard by shard, in any thread."""

import threading

from vqvae.progress import progress_bar

_bars = {}
_lock = threading.Lock()


def advance(title: str, images: int, total: int) -> None:
    """Moves the bar of this process called `title`; it opens itself, and closes at `total`."""
    with _lock:
        bar = _bars.get(title)
        if bar is None:
            bar = _bars[title] = progress_bar(title, total)
        bar.update(images)
        if bar.n >= total:
            _bars.pop(title).close()
