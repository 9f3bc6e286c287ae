"""Progress bars with images per second and, in training, the loss."""

import os
import sys

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
        steps: Total number of training steps.
        first_step: Step at which this call of `fit` starts.
        batch_size: Images per step.
    """

    def __init__(self, title: str, *, steps: int, first_step: int, batch_size: int):
        super().__init__()
        self.batch_size = batch_size
        self.held_out: dict[str, str] = {}
        self.bar = progress_bar(title, steps * batch_size, initial=first_step * batch_size)

    def on_train_batch_end(self, batch, logs=None):
        """Advances the bar by one batch and, every ten batches, updates the loss."""
        self.bar.update(self.batch_size)
        if batch % 10 == 0:
            self.bar.set_postfix(loss=f"{logs['loss']:.4f}", **self.held_out, refresh=False)

    def on_epoch_end(self, epoch, logs=None):
        """Stores the validation metrics, which the bar shows from now on."""
        shown = [name for name in ("val_loss", "val_bits_per_dim") if name in logs]
        self.held_out = {name: f"{logs[name]:.4f}" for name in shown}

    def on_train_end(self, logs=None):
        """Closes the bar."""
        self.bar.close()
