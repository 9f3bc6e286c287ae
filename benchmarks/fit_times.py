"""Times training with `fit`, as users run it."""

import statistics
import time

import keras

from vqbeam.vqvae.fitting.fit import StopOnNaN


def fit_seconds(model: keras.Model, batches, warm_up: int, steps: int, blocks: int) -> float:
    """Returns the seconds per step of `fit`: the median over epochs of `steps`, after a warm-up."""
    model.fit(batches, steps_per_epoch=warm_up, verbose=0)
    times = BlockTimes()
    callbacks = [StopOnNaN(), times]
    model.fit(batches, steps_per_epoch=steps, epochs=blocks, verbose=0, callbacks=callbacks)
    return statistics.median(times.seconds) / steps


class BlockTimes(keras.callbacks.Callback):
    """Records the time of each epoch of `fit`."""

    def __init__(self):
        super().__init__()
        self.seconds = []

    def on_epoch_begin(self, epoch, logs=None):
        """Starts the clock."""
        self.start = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        """Stops the clock."""
        self.seconds.append(time.perf_counter() - self.start)
