"""Progress bars with images per second and, in training, the loss."""

import os
import sys
import time

import keras
import tqdm


def progress_bar(title: str, total: int, *, initial: int = 0) -> tqdm.tqdm:
    """Returns a progress bar that counts images; it is updated less often in a log file."""
    return tqdm.tqdm(
        desc=f"{title:<12}",
        total=total,
        initial=initial,
        unit=" images",
        mininterval=0.2 if sys.stderr.isatty() else 20,
        dynamic_ncols=_columns() > 0,
        ncols=None if _columns() else 100,
        bar_format="{desc} {percentage:3.0f}% |{bar:20}| {n_fmt}/{total_fmt}"
        " [{elapsed}<{remaining}, {rate_fmt}{postfix}]",
    )


def _columns() -> int:
    """Returns the terminal width: 0 if unreported (tqdm would show nothing), 100 if no terminal."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError, AttributeError):
        return 100


class FitProgress(keras.callbacks.Callback):
    """Shows one progress bar for all of `fit`, with the training and validation losses.

    Args:
        title: Label of the bar.
        total: Images in all, over all passes.
        initial: Images before this call of `fit`.
        at_once: Images in the steps of one call of the training program.
    """

    async_safe = True  # the next steps begin before the loss is read

    def __init__(self, title: str, *, total: int, initial: int, at_once: int):
        super().__init__()
        self.at_once = at_once
        self.held_out: dict[str, str] = {}
        self.bar = progress_bar(title, total, initial=initial)
        self.images, self.seconds, self.last = 0, 0.0, None

    @property
    def rate(self) -> float | None:
        """Images per second in training, without compilation and validation; None until known."""
        return self.images / self.seconds if self.seconds else None

    def on_epoch_begin(self, epoch, logs=None):
        """Starts the clock, but not for the first call, which compiles."""
        self.last = None if self.last is None else time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        """Advances the bar and updates the loss."""
        self.bar.set_postfix(loss=f"{logs['loss']:.4f}", **self.held_out, refresh=False)
        self.bar.update(self.at_once)
        now = time.perf_counter()
        if self.last is not None:
            self.images, self.seconds = self.images + self.at_once, self.seconds + now - self.last
        self.last = now

    def on_epoch_end(self, epoch, logs=None):
        """Stores the validation metrics, which the bar shows from now on."""
        shown = [name for name in ("val_loss", "val_bits_per_dim") if name in logs]
        self.held_out = {name: f"{logs[name]:.4f}" for name in shown}

    def on_train_end(self, logs=None):
        """Closes the bar."""
        self.bar.close()
