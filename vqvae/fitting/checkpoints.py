"""Training checkpoints, for resuming and for restoring the best epoch."""

import io
import json
import pathlib
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from typing import Any

import h5py
import keras
import numpy as np
from etils import epath

from vqbeam.configs import VqbeamError
from vqbeam.vqvae.storage.files import matching, read_json, read_regular, write_bytes
from vqbeam.vqvae.storage.run_folder import checkpoint_files


class Checkpoints(keras.callbacks.Callback):
    """Saves a checkpoint after each epoch, about once a minute, and before a signal ends training.

    A checkpoint is a single file, written atomically. Besides the weights and the optimizer state,
    which Keras writes, it holds the history, the metrics of the epoch so far, and the states of the
    random generators. The file name contains the number of steps.

    Args:
        folder: Output folder for `checkpoints/FINGERPRINT/step-NNNNNNNN.weights.h5`.
        fingerprints: Fingerprints of the training inputs. Checkpoints are written under the first
            one and read under all of them; those under any other fingerprint are removed.
        steps_per_epoch: Steps of an epoch.
        steps: Total number of steps, after which the last epoch ends.
        patience: Epochs without a better validation loss after which training ends; 0 disables
            early stopping.

    Attributes:
        history: A dictionary of metrics for each complete epoch.
        signals: A context for training in which Ctrl-C and SIGTERM first save a checkpoint.
    """

    kept = 2
    # Seconds between checkpoints within an epoch, and the share of the time that writing may take.
    seconds, largest_share = 60.0, 0.02

    def __init__(
        self,
        folder: epath.Path,
        fingerprints: Sequence[str],
        steps_per_epoch: int,
        steps: int,
        patience: int = 0,
    ):
        super().__init__()
        self.folders = [folder / "checkpoints" / fingerprint for fingerprint in fingerprints]
        self.steps_per_epoch, self.steps, self.patience = steps_per_epoch, steps, patience
        self.history: list[dict[str, float]] = []
        self.signals = EndSignals()
        self._metrics: list[np.ndarray] = []  # to be restored when the epoch begins
        # Steps done at the beginning of the epoch in this `fit`, at the end of the current call,
        # and in the last checkpoint.
        self._begin = self._end = self._saved = 0
        self._due = 0.0

    def restore(self, model: keras.Model) -> int:
        """Returns the steps of the last readable checkpoint, loaded into `model`; 0 if none.

        Raises:
            VqbeamError: There are checkpoints, but none of them can be loaded.
        """
        self.folders[0].mkdir(parents=True, exist_ok=True)
        for stale in self.folders[0].parent.iterdir():
            # Folders of other names are the user's.
            if stale not in self.folders and re.fullmatch(r"[0-9a-f]{16}", stale.name):
                print(f"{stale} belongs to other settings or inputs: removed", file=sys.stderr)
                stale.rmtree()
        for unfinished in matching(self.folders[0], ".*.weights.h5.*"):  # from a killed attempt
            unfinished.unlink(missing_ok=True)
        damaged, files = None, self._files()
        for step, file in reversed(files.items()):
            try:
                self._load(model, file)
                self._begin = self._saved = step
                return step
            except (VqbeamError, OSError) as error:
                # A power failure can leave a file with a name but no content.
                damaged = damaged or error
                if step != min(files):
                    print(f"{file} cannot be read: going back to the one before", file=sys.stderr)
        if damaged:
            raise damaged
        return 0

    def restore_best(self, model: keras.Model) -> None:
        """Loads the checkpoint of the epoch with the lowest validation loss."""
        self._load(model, self._files()[self._best_step], weights_only=True)

    @property
    def best_epoch(self) -> int:
        """Number, counted from 1, of the first epoch with the lowest validation loss."""
        losses = [epoch["val_loss"] for epoch in self.history]
        return losses.index(min(losses)) + 1

    @property
    def stalled(self) -> bool:
        """Whether the last `patience` epochs brought no better validation loss."""
        if not (self.patience and self.history):
            return False
        return len(self.history) - self.best_epoch >= self.patience

    @property
    def _best_step(self) -> int:
        return min(self.best_epoch * self.steps_per_epoch, self.steps)

    def _files(self) -> dict[int, epath.Path]:
        found = {}
        for folder in reversed(self.folders):
            found |= checkpoint_files(folder, self.steps_per_epoch)
        return dict(sorted(found.items()))

    def _load(self, model: keras.Model, file: epath.Path, weights_only: bool = False) -> None:
        model.optimizer.build(model.trainable_variables)
        with tempfile.TemporaryDirectory() as local:
            copy = pathlib.Path(local) / file.name
            copy.write_bytes(read_regular(file, any_size=True))
            try:
                model.load_weights(copy)
                if not weights_only:
                    self._load_rest(model, file, copy)
            # Keras and HDF5 raise many types of exceptions for a damaged file.
            except Exception as error:
                raise VqbeamError(
                    f"{file} does not match this run's model; delete "
                    f"{self.folders[0].parent} to train anew"
                ) from error

    def _load_rest(self, model: keras.Model, file: epath.Path, copy: pathlib.Path) -> None:
        with h5py.File(copy) as content:
            if "vqbeam" not in content:  # written by an earlier version, after an epoch
                self._metrics, self.history = [], _checked(read_json(_history_file(file), list))
                return
            rest = content["vqbeam"]
            for index, state in enumerate(random_states(model)):
                state.assign(rest[f"random_states/{index}"][()])
            self._metrics = [rest[f"metrics/{i}"][()] for i in range(len(rest["metrics"]))]
            self.history = _stored(rest, copy.stat().st_size)

    def on_train_begin(self, logs=None):
        """Starts the clock."""
        self._due = time.monotonic() + self.seconds

    def on_epoch_begin(self, epoch, logs=None):
        """Restores the metrics of an interrupted epoch, after Keras has reset them."""
        if self._metrics:
            for variable, value in zip(self.model.metrics_variables, self._metrics, strict=True):
                variable.assign(value)
            self._metrics = []

    # Not at the end of a batch, which Keras signals in another thread while the next steps run.
    def on_train_batch_begin(self, batch, logs=None):
        """Saves the state between two calls of the training program, if it is time."""
        step = self._begin + batch
        self._end = min(step + self.model.steps_per_execution, self.steps)
        if step > self._saved:
            self.signals.waits = True
            if self.signals.received or time.monotonic() >= self._due:
                self._save_within_epoch(step)
        self._deliver_signal()

    def on_epoch_end(self, epoch, logs=None):
        """Saves the state with the metrics of the epoch; stops training if it has stalled."""
        self.history.append({name: float(value) for name, value in logs.items()})
        self._begin = self._end
        self._save(self._end, metrics=[])
        if self.stalled:
            self.model.stop_training = True
        self._deliver_signal()

    def _save_within_epoch(self, step: int) -> None:
        if keras.backend.backend() == "jax":
            self.model.jax_state_sync()
        metrics = list(map(keras.ops.convert_to_numpy, self.model.metrics_variables))
        # Otherwise the loss is NaN, and training is about to end with an error.
        if all(np.isfinite(values).all() for values in metrics):
            self._save(step, metrics)

    def _save(self, step: int, metrics: list[np.ndarray]) -> None:
        begun = time.monotonic()
        with tempfile.TemporaryDirectory() as local:
            file = pathlib.Path(local) / "model.weights.h5"
            self.model.save_weights(file)
            with h5py.File(file, "a") as content:
                rest = content.create_group("vqbeam")
                # Not a string: HDF5 stores strings in a heap, and may hang on a damaged one.
                rest["history"] = np.frombuffer(json.dumps(self.history).encode(), np.uint8)
                states = map(keras.ops.convert_to_numpy, random_states(self.model))
                for name, arrays in (("metrics", metrics), ("random_states", states)):
                    group = rest.create_group(name)
                    for index, array in enumerate(arrays):
                        group[str(index)] = array
            write_bytes(self.folders[0] / f"step-{step:08d}.weights.h5", file.read_bytes())
        self._remove_old()
        self._saved, now = step, time.monotonic()
        self._due = now + max(self.seconds, (now - begun) / self.largest_share)

    def _remove_old(self) -> None:
        files = self._files()
        kept = list(files)[-self.kept :]
        if self.patience and self.history:
            kept.append(self._best_step)
        for step, file in files.items():
            if step not in kept:
                # A concurrent attempt may have removed it.
                file.unlink(missing_ok=True)
                _history_file(file).unlink(missing_ok=True)

    def _deliver_signal(self) -> None:
        if self.signals.received == signal.SIGTERM:
            print(
                f"\nended by SIGTERM; step {self._saved:,} is saved: run the same command to go on",
                file=sys.stderr,
            )
        self.signals.deliver()


class EndSignals:
    """A context in which SIGINT and SIGTERM are held back until `deliver`, if `waits` is set.

    `deliver` gives the signal the effect that it has outside the context: SIGINT (Ctrl-C) raises a
    KeyboardInterrupt, and SIGTERM ends the process. A second signal takes effect at once. Outside
    the main thread, Python allows no signal handlers, so no signal is held back.

    Attributes:
        waits: Whether to hold signals back.
        received: The signal held back; None if there is none.
    """

    def __init__(self):
        self.waits = False
        self.received: int | None = None
        self._usual = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                usual = signal.getsignal(number)
                # An ignored signal, as under nohup, stays ignored. None: Python did not install it.
                if usual not in (signal.SIG_IGN, None):
                    self._usual[number] = usual
                    signal.signal(number, self._receive)
        return self

    def __exit__(self, *_):
        self._restore()
        self.deliver()

    def deliver(self) -> None:
        """Gives the signal held back its usual effect."""
        if self.received is not None:
            number, self.received = self.received, None
            signal.raise_signal(number)

    def _receive(self, number, _):
        self._restore()
        self.received = number
        if not self.waits:
            self.deliver()

    def _restore(self):
        while self._usual:
            signal.signal(*self._usual.popitem())


def random_states(model: keras.Model) -> list[keras.Variable]:
    """Returns the states of the random generators of a model's layers, such as dropout.

    Keras does not save them with the weights.
    """
    return [v for v in model.non_trainable_variables if "seed_generator" in v.path]


def stored_history(folder: epath.Path, steps_per_epoch: int) -> list[dict[str, float]]:
    """Returns the metrics of the epochs so far, for a training that has not ended.

    Args:
        folder: The training's output folder.
        steps_per_epoch: Steps of an epoch.

    Returns:
        The history in the last checkpoint; an empty list if there is none or if it cannot be read,
        for example because it is being replaced.
    """
    files: dict[int, epath.Path] = {}
    for kept in matching(folder / "checkpoints", "*"):
        files |= checkpoint_files(kept, steps_per_epoch)
    if not files:
        return []
    file = files[max(files)]
    try:
        data = read_regular(file, any_size=True)
        with h5py.File(io.BytesIO(data)) as content:
            if "vqbeam" in content:
                return _stored(content["vqbeam"], len(data))
        return _checked(read_json(_history_file(file), list))
    except Exception:  # HDF5 raises many types of exceptions for a damaged file
        return []


def _stored(rest: h5py.Group, size: int) -> list[dict[str, float]]:
    """Returns the history stored in a checkpoint; raises a ValueError if it is not valid.

    Args:
        rest: The checkpoint's group "vqbeam".
        size: Size of the file in bytes.
    """
    text = rest["history"]
    # HDF5 would allocate whatever length the file claims for the text.
    if text.nbytes > size:
        raise ValueError("the history is longer than its file")
    return _checked(json.loads(bytes(text[()])))


def _checked(history: Any) -> list[dict[str, float]]:
    """Returns `history`; raises a ValueError if it is not a list of metrics by name."""
    is_list = isinstance(history, list) and all(isinstance(epoch, dict) for epoch in history)
    if not is_list or any(not isinstance(value, float) for of in history for value in of.values()):
        raise ValueError("the history is not as vqbeam writes it")
    return history


def _history_file(file: epath.Path) -> epath.Path:
    """Returns the file in which earlier versions stored the history of a checkpoint."""
    return file.with_name(file.name.replace(".weights.h5", ".json"))
