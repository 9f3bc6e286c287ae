"""Times training as users run it: the `fit` of both stages, with data in memory."""

import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable

import keras
import measuring
import numpy as np
import tensorflow as tf
from etils import epath

from vqbeam.vqvae.fitting import fit as module
from vqbeam.vqvae.fitting.data import training_data


def fit_seconds(
    model: keras.Model,
    held: dict[str, np.ndarray],
    prepare: Callable,
    *,
    batch_size: int,
    steps: int,
    epochs: int,
    together: int = 1,
) -> float:
    """Returns the time of a training step: the median over all epochs but the first.

    Args:
        model: A compiled model.
        held: The data, by name.
        prepare: Function from the rows of a batch, by name, to the input of the model.
        batch_size: Rows in a batch.
        steps: Steps in an epoch.
        epochs: Number of epochs, at least 2; the first one compiles.
        together: Steps in a call of the training program.
    """
    steps, epochs = (together, 2) if measuring.SMOKE else (steps, epochs)
    data = training_data(
        tf.data.Dataset.from_tensor_slices(held),
        size=len(next(iter(held.values()))),
        batch_size=batch_size,
        seed=0,
        numbers=lambda seed, count: {},
        prepare=prepare,
    )
    module.steps_per_call = lambda steps_per_epoch: together
    schedule = module.Schedule(
        title=pathlib.Path(__file__).stem,
        steps=steps * epochs,
        steps_per_epoch=steps,
        batch_size=batch_size,
        seed=0,
    )
    times = EpochTimes()
    with tempfile.TemporaryDirectory() as folder:
        module.fit(model, schedule, data, None, epath.Path(folder), ["f"], callbacks=[times])
    return statistics.median(times.seconds[1:]) / steps


class EpochTimes(keras.callbacks.Callback):
    """Measures the time of each epoch, without its checkpoint."""

    def __init__(self):
        super().__init__()
        self.seconds = []

    def on_epoch_begin(self, epoch, logs=None):
        """Starts the clock."""
        self.start = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        """Stops the clock."""
        self.seconds.append(time.perf_counter() - self.start)
