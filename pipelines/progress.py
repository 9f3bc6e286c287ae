"""One progress bar a stage for work that arrives shard by shard, in any thread."""

import threading

from vqbeam.vqvae.fitting.progress import progress_bar

_bars = {}
_lock = threading.Lock()


def advance(title: str, images: int, total: int) -> None:
    """Moves the bar of this process called `title`; it opens itself, and closes at `total`."""
    if not images:
        return
    with _lock:
        bar = _bars.get(title)
        if bar is None:
            bar = _bars[title] = progress_bar(title, total)
        bar.update(images)
        if bar.n >= total:
            _bars.pop(title).close()


def close_all() -> None:
    """Closes what an error has left open, so that its message gets a line of its own."""
    with _lock:
        while _bars:
            _bars.popitem()[1].close()
