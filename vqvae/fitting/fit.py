"""The training loop of both stages: Keras `fit` with resumable checkpoints."""

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

from vqbeam.configs import Config, VqbeamError
from vqbeam.vqvae.fitting.checkpoints import Checkpoints, random_states
from vqbeam.vqvae.fitting.data import TrainingData
from vqbeam.vqvae.fitting.devices import describe_devices, peak_flops, peak_memory
from vqbeam.vqvae.fitting.metric_writers import MetricWriter, metric_writers
from vqbeam.vqvae.fitting.program import TrainingProgram, steps_per_call, training_program
from vqbeam.vqvae.fitting.progress import FitProgress
from vqbeam.vqvae.storage.files import write_bytes
from vqbeam.vqvae.storage.run_folder import MANIFEST


def set_seed(seed: int) -> None:
    """Seeds Python, NumPy and the backend from the seed of a run."""
    # Plus 1, since Dataset.shuffle does not accept a tensor seed if the global seed is zero.
    keras.utils.set_random_seed(seed + 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long a training lasts.

    Attributes:
        title: The name of the training in the progress bar.
        steps: Training steps in all.
        steps_per_epoch: Steps of an epoch, after which the model is validated. The weights do not
            depend on it, unless there is early stopping.
        batch_size: Images in a batch, for the progress bar.
        seed: Seed of the random numbers of layers such as dropout.
        patience: Epochs without a better validation loss after which training ends, with the
            weights of the best epoch; 0 for all the steps and the last weights.
        figures: Function from the metrics of an epoch to texts for the line printed after it.
        config: The run's config, which says where metrics are written besides TensorBoard.
        advice: The settings with which to start anew if the loss is no longer a number.
    """

    title: str
    steps: int
    steps_per_epoch: int
    batch_size: int
    seed: int
    patience: int = 0
    figures: Callable[[dict[str, float]], list[str]] = lambda logs: []
    config: Config | None = None
    advice: str = "a lower learning rate"

    @property
    def epoch_steps(self) -> int:
        """Steps of an epoch, limited to all steps; the last epoch may have fewer."""
        return min(self.steps, self.steps_per_epoch)

    def epochs_after(self, step: int) -> int:
        """Returns the number of epochs that end after `step`."""
        return math.ceil(self.steps / self.epoch_steps) - step // self.epoch_steps

    def epoch_end(self, step: int) -> int:
        """Returns the last step of the epoch that `step` is part of."""
        return min(self.steps, (step // self.epoch_steps + 1) * self.epoch_steps)


def fit(
    model: keras.Model,
    schedule: Schedule,
    data: TrainingData,
    validation,
    folder: epath.Path,
    fingerprints: Sequence[str],
    callbacks: Sequence[keras.callbacks.Callback] = (),
) -> "Fitted":
    """Trains a compiled model, resuming from its last checkpoint if there is one.

    A run that is killed and restarted ends with the same weights and history as an uninterrupted
    run (on a GPU, up to the order of summation): the state of model, optimizer, random generators
    and metrics is restored from the checkpoint, and the data continues from the same batch.

    Args:
        model: A compiled and built model.
        schedule: How long to train.
        data: The batches.
        validation: Dataset evaluated after each epoch; None for none.
        folder: Output folder for `checkpoints/`, TensorBoard's `logs/` and `metrics.csv`.
        fingerprints: Hashes of the training inputs, see `Checkpoints`.
        callbacks: Additional callbacks. Metrics that they add to an epoch's logs are stored.

    Raises:
        VqbeamError: The loss is not finite, or no existing checkpoint can be loaded.
    """
    checkpoints = Checkpoints(
        folder, fingerprints, schedule.epoch_steps, schedule.steps, patience=schedule.patience
    )
    seed_layers(model, schedule.seed)
    step = checkpoints.restore(model)
    # With float16, the optimizer is wrapped for loss scaling.
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    speed = {}
    if step < schedule.steps and not checkpoints.stalled:
        done = step % schedule.epoch_steps
        # An interrupted epoch must also be finished in a whole number of calls.
        together = steps_per_call(math.gcd(schedule.epoch_steps, done))
        progress = _progress(model, schedule, step, together)
        writers = metric_writers(schedule.config, schedule.title, folder, checkpoints.folders[0])
        with (
            contextlib.closing(progress.bar),  # so that error messages start on a new line
            training_program(model, data, together, schedule.steps - step) as program,
            contextlib.ExitStack() as closed,
            checkpoints.signals,
        ):
            for writer in writers:
                closed.enter_context(contextlib.closing(writer))
            first_epoch = len(checkpoints.history)
            model.fit(
                program.batches(step),
                initial_epoch=first_epoch,
                epochs=first_epoch + schedule.epochs_after(step),
                steps_per_epoch=schedule.epoch_steps,
                validation_data=validation,
                shuffle=False,  # the batches are already shuffled
                verbose=0,
                callbacks=[
                    EpochEnds(schedule, step),
                    StopOnNaN(schedule, done),
                    *([AveragedWeights()] if optimizer.use_ema else []),
                    *callbacks,
                    WrittenMetrics(writers, schedule, progress, program),
                    progress,
                    checkpoints,
                ],
            )
        speed = _speed(schedule, progress.rate, program.flops)
        _tell_speed(schedule.title, speed)
    if schedule.patience:
        checkpoints.restore_best(model)
    # Keras does this at the end of `fit`, but not for weights restored from a checkpoint.
    optimizer.finalize_variable_values(model.trainable_variables)
    return Fitted(checkpoints.history, speed)


@dataclasses.dataclass(frozen=True)
class Fitted:
    """The results of a training other than the weights.

    Attributes:
        history: A dictionary of metrics for each epoch, including those before a restart.
        speed: The speed of the steps in this process, without what is unknown:
            `images_per_second`, without compilation and validation; `flops_per_step`, the
            floating-point operations of a step; `share_of_peak`, the operations per second as a
            share of the devices' peak in bfloat16; and `device_bytes`, the peak memory use of the
            first device.
    """

    history: list[dict[str, float]]
    speed: dict[str, float]


def _progress(
    model: keras.Model, schedule: Schedule, first_step: int, together: int
) -> FitProgress:
    """Returns the progress bar of a training; first prints what is trained, and on what device."""
    title, steps = schedule.title, schedule.steps
    weights = sum(math.prod(variable.shape) for variable in model.trainable_variables)
    print(
        f"{title}: {weights:,} parameters, step {first_step:,} to {steps:,} on "
        f"{describe_devices()}",
        file=sys.stderr,
    )
    return FitProgress(
        title,
        steps=steps,
        batch_size=schedule.batch_size,
        first_step=first_step,
        together=together,
        per_epoch=schedule.epoch_steps,
        figures=schedule.figures,
    )


def _speed(schedule: Schedule, rate: float | None, flops: float | None) -> dict[str, float]:
    """Returns how fast a training runs; see `Fitted`."""
    peak = peak_flops()
    known = {
        "images_per_second": rate,
        "flops_per_step": flops,
        "share_of_peak": (
            flops * rate / schedule.batch_size / peak if rate and flops and peak else None
        ),
        "device_bytes": peak_memory(),
    }
    return {name: value for name, value in known.items() if value}


def _tell_speed(title: str, speed: dict[str, float]) -> None:
    words = {
        "images_per_second": lambda rate: f"{rate:,.0f} images/s",
        "flops_per_step": lambda flops: f"{flops / 1e9:,.3g} GFLOP a step",
        "share_of_peak": lambda share: f"{share:.0%} of the peak in bfloat16",
        "device_bytes": lambda size: f"{size / 2**30:.1f} GiB of device memory",
    }
    if speed:
        said = [words[name](value) for name, value in speed.items()]
        print(f"{title}: {', '.join(said)}", file=sys.stderr)


class AveragedWeights(keras.callbacks.SwapEMAWeights):
    """Validates with the EMA of the weights, then swaps the weights back."""

    def _tf_swap_variables(self, optimizer):
        # On TensorFlow, Keras swaps by adding and subtracting, which causes rounding errors.
        self._backend_swap_variables(optimizer)


class WrittenMetrics(keras.callbacks.Callback):
    """Writes the metrics of each epoch, its learning rate and the speed of its steps.

    Args:
        writers: The writers to pass them to.
        schedule: The schedule of the training.
        progress: The progress bar, which measures the time of the steps.
        program: The training program, which knows the operations of a step.
    """

    def __init__(
        self,
        writers: Sequence[MetricWriter],
        schedule: Schedule,
        progress: FitProgress,
        program: TrainingProgram,
    ):
        super().__init__()
        self.writers, self.schedule = writers, schedule
        self.progress, self.program = progress, program
        self.is_started = False
        self.images, self.seconds = 0, 0.0  # of the epochs before

    def on_epoch_begin(self, epoch, logs=None):
        """Starts the writers before the first epoch, with the number of epochs done before."""
        if not self.is_started:
            self.is_started = True
            for writer in self.writers:
                writer.start(epoch)

    def on_epoch_end(self, epoch, logs=None):
        """Writes the metrics of the epoch."""
        images = self.progress.images - self.images
        seconds = self.progress.seconds - self.seconds
        self.images, self.seconds = self.progress.images, self.progress.seconds
        rate = images / seconds if seconds else None
        row = {
            "epoch": epoch + 1,
            "step": self.progress.step,
            **{name: float(value) for name, value in logs.items()},
            "learning_rate": float(self.model.optimizer.learning_rate),
            **_speed(self.schedule, rate, self.program.flops),
        }
        for writer in self.writers:
            writer.write(row)


class StopOnNaN(keras.callbacks.Callback):
    """Stops training with a one-line error message if the loss is not finite.

    Args:
        schedule: The training.
        done: Steps of the first epoch done before this call of `fit`.
    """

    async_safe = True  # the next steps begin before the loss is read

    def __init__(self, schedule: Schedule, done: int):
        super().__init__()
        self.schedule, self.done = schedule, done

    def on_train_batch_end(self, batch, logs=None):
        """Checks the training loss."""
        step = self.done + batch + 1
        self._check(logs["loss"], f"loss became {logs['loss']} at step {step} of this epoch")

    def on_epoch_end(self, epoch, logs=None):
        """Checks the validation loss, since the epoch's last update may have made weights NaN."""
        self.done = 0
        loss = logs.get("val_loss", 0.0)
        self._check(loss, f"validation loss became {loss} in epoch {epoch + 1}")

    def _check(self, loss, what):
        if not math.isfinite(loss):
            title, advice = self.schedule.title, self.schedule.advice
            raise VqbeamError(f"{title}: the {what}; start a new run with {advice}")


class EpochEnds(keras.callbacks.Callback):
    """Ends those epochs of a call of `fit` that are shorter than the others.

    These are the first one, if a part of it was trained before, and the last one. If
    `stop_training` is set during an epoch, Keras ends that epoch. It ends the training only if it
    is still set after the callbacks at the end of the epoch.

    Args:
        schedule: How long the training lasts.
        step: Steps before this call of `fit`.
    """

    def __init__(self, schedule: Schedule, step: int):
        super().__init__()
        self.schedule, self.step = schedule, step  # of the first call of the epoch

    # Not at the end of the last batch: Keras calls that in another thread.
    def on_train_batch_begin(self, batch, logs=None):
        """Ends the epoch after this batch if it reaches the epoch's last step."""
        end = self.step + batch + self.model.steps_per_execution
        if end >= self.schedule.epoch_end(self.step):
            self.model.stop_training = True

    def on_epoch_end(self, epoch, logs=None):
        """Lets training go on with the next epoch."""
        self.step, self.model.stop_training = self.schedule.epoch_end(self.step), False


def seed_layers(model: keras.Model, seed: int) -> None:
    """Seeds all random generators in a model's layers, from any non-negative integer."""
    for index, state in enumerate(random_states(model)):
        numbers = np.random.SeedSequence([seed, index]).generate_state(2)
        state.assign(numbers.astype(state.dtype))


def save_model(model: keras.Model, path: epath.Path) -> None:
    """Writes a model to a .keras file atomically, without its optimizer.

    The checkpoints hold the state of the optimizer, which may be twice as large as the weights.
    """
    optimizer, model.optimizer = getattr(model, "optimizer", None), None
    try:
        with tempfile.TemporaryDirectory() as local:
            file = pathlib.Path(local) / "model.keras"
            model.save(file)
            write_bytes(path, file.read_bytes())
    finally:
        model.optimizer = optimizer


def load_model(path: epath.Path) -> keras.Model:
    """Returns a model written by `save_model`, without running any code stored in the file.

    Raises:
        VqbeamError: The file is damaged or from an incompatible version.
    """
    with tempfile.TemporaryDirectory() as local:
        file = pathlib.Path(local) / path.name
        file.write_bytes(path.read_bytes())
        try:
            return keras.saving.load_model(file, compile=False, safe_mode=True)
        except (ValueError, TypeError, KeyError, OSError, zipfile.BadZipFile) as error:
            raise VqbeamError(
                f"{path} cannot be read by this version of vqbeam; if it is damaged, delete "
                f"{path.parent / MANIFEST} and run its stage again, which restores it from the "
                "last checkpoint"
            ) from error
