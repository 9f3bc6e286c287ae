"""The training loop that both stages share: Keras `fit`, with checkpoints that resume."""

import contextlib
import dataclasses
import math
import pathlib
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence

import keras
import numpy as np
from etils import epath

from vqbeam.configs import VqbeamError
from vqbeam.vqvae.fitting.checkpoints import Checkpoints
from vqbeam.vqvae.fitting.progress import FitProgress
from vqbeam.vqvae.storage.files import write_bytes


def set_seed(seed: int) -> None:
    """Sets the seeds of Python, NumPy and the backend to one that follows from a run's."""
    # One up, since Dataset.shuffle takes no tensor as its seed where the global seed is zero.
    keras.utils.set_random_seed(seed + 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long a training lasts.

    Attributes:
        title: The name of the training in the progress bar.
        steps: Training steps in all.
        steps_per_epoch: Steps between checkpoints.
        batch_size: Images in a batch, for the progress bar.
        seed: Seed of the random numbers of layers such as dropout.
        patience: Epochs without a better validation loss after which training ends, with the
            weights of the best epoch; 0 for all the steps and the last weights.
    """

    title: str
    steps: int
    steps_per_epoch: int
    batch_size: int
    seed: int
    patience: int = 0


def fit(
    model: keras.Model,
    schedule: Schedule,
    batches: Callable,
    validation,
    folder: epath.Path,
    fingerprint: str,
    callbacks: Sequence[keras.callbacks.Callback] = (),
) -> list[dict[str, float]]:
    """Trains a compiled model, from its last checkpoint if it has one; returns its history.

    A training that was killed and started again ends with the weights of an unbroken one (on a GPU
    up to the order of additions): the state of the model and the optimizer comes from the
    checkpoint, and the batches continue where they were.

    Args:
        model: Compiled and built.
        schedule: How long to train.
        batches: Function from a step number to the endless dataset that begins with its batch.
        validation: Dataset evaluated after each epoch.
        folder: Gets `checkpoints/` and TensorBoard's `logs/`.
        fingerprint: Hash of everything the training reads; checkpoints with another are removed.
        callbacks: Further callbacks. Metrics that they add to an epoch are shown and kept.

    Returns:
        A dictionary of metrics for each epoch, including those before the last start.

    Raises:
        VqbeamError: The loss is no longer a finite number.
    """
    checkpoints = Checkpoints(folder, fingerprint, schedule.patience)
    first_epoch = checkpoints.restore(model)
    steps, title = schedule.steps, schedule.title
    epochs = math.ceil(steps / schedule.steps_per_epoch)
    # float16 wraps the optimizer, for the scale of the loss.
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    if first_epoch < epochs and not checkpoints.stalled:
        first_step = first_epoch * schedule.steps_per_epoch
        devices = ", ".join(keras.distribution.list_devices())
        print(f"{title}: step {first_step:,} to {steps:,} on {devices}", file=sys.stderr)
        progress = FitProgress(
            title, steps=steps, first_step=first_step, batch_size=schedule.batch_size
        )
        with contextlib.closing(progress.bar):  # an error would be written behind the bar
            model.fit(
                batches(first_step),
                initial_epoch=first_epoch,
                epochs=epochs,
                steps_per_epoch=min(steps, schedule.steps_per_epoch),
                validation_data=validation,
                shuffle=False,  # the batches come shuffled
                verbose=0,
                callbacks=[
                    StopOnNaN(),
                    *([AveragedWeights()] if optimizer.use_ema else []),
                    Reseed(schedule.seed),
                    *callbacks,
                    keras.callbacks.TensorBoard(str(folder / "logs"), write_graph=False),
                    progress,
                    checkpoints,
                ],
            )
    if schedule.patience:
        checkpoints.restore_best(model)
    # What Keras does at the end of training, for weights that come from a checkpoint.
    optimizer.finalize_variable_values(model.trainable_variables)
    return checkpoints.history


class AveragedWeights(keras.callbacks.SwapEMAWeights):
    """Validates with the optimizer's average of the weights, and puts the weights back."""

    def _tf_swap_variables(self, optimizer):
        # Keras swaps by additions on TensorFlow, which round.
        self._backend_swap_variables(optimizer)


class StopOnNaN(keras.callbacks.Callback):
    """Ends training with one clear line when the loss is no longer finite."""

    def on_train_batch_end(self, batch, logs=None):
        """Checks the loss."""
        self._check(logs["loss"], f"loss became {logs['loss']} at batch {batch} of this epoch")

    def on_epoch_end(self, epoch, logs=None):
        """Checks the validation loss: the last update of the epoch may have broken the weights."""
        loss = logs.get("val_loss", 0.0)
        self._check(loss, f"validation loss became {loss} in epoch {epoch + 1}")

    def _check(self, loss, what):
        if not math.isfinite(loss):
            raise VqbeamError(
                f"the {what}; start a new run with a lower learning rate, or with dtype float32"
            )


class Reseed(keras.callbacks.Callback):
    """Gives the model's layers random numbers that depend on the seed and the epoch alone.

    Keras does not save the state of its random generators with the weights; without this, a
    resumed run would drop other units than an unbroken one.

    Args:
        seed: Any integer.
    """

    def __init__(self, seed: int):
        super().__init__()
        self.seed = seed

    def on_epoch_begin(self, epoch, logs=None):
        """Sets the state of every generator in the model."""
        states = [v for v in self.model.non_trainable_variables if "seed_generator" in v.path]
        for index, state in enumerate(states):
            numbers = np.random.SeedSequence([self.seed, epoch, index]).generate_state(2)
            state.assign(numbers.astype(state.dtype))


def save_model(model: keras.Model, path: epath.Path) -> None:
    """Writes a model as one .keras file, whole or not at all."""
    with tempfile.TemporaryDirectory() as local:
        file = pathlib.Path(local) / "model.keras"
        model.save(file)
        write_bytes(path, file.read_bytes())


def load_model(path: epath.Path) -> keras.Model:
    """Reads a model that `save_model` wrote; no code stored in the file is ever run.

    Raises:
        VqbeamError: The file is damaged.
    """
    with tempfile.TemporaryDirectory() as local:
        file = pathlib.Path(local) / path.name
        file.write_bytes(path.read_bytes())
        try:
            return keras.saving.load_model(file, compile=False, safe_mode=True)
        except (ValueError, TypeError, KeyError, OSError, zipfile.BadZipFile) as error:
            raise VqbeamError(
                f"{path} is not a model that this version of vqbeam reads; delete "
                f"{path.parent} and train again"
            ) from error
