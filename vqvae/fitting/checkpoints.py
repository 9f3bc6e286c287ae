"""Checkpoints that are saved after each epoch, to resume from and to restore the best epoch."""

import pathlib
import sys
import tempfile

import keras
from etils import epath

from vqbeam.configs import VqbeamError
from vqbeam.vqvae.storage.files import matching, read_json, write_bytes, write_json
from vqbeam.vqvae.storage.run_folder import epoch_files


class Checkpoints(keras.callbacks.Callback):
    """Saves a checkpoint after each epoch; files are written atomically.

    Keras's BackupAndRestore writes the weights and the epoch separately, so a kill between the two
    repeats an epoch. Here, the epoch is part of the file name.

    Args:
        folder: Output folder for `checkpoints/FINGERPRINT/epoch-NNNNN.weights.h5` and
            `epoch-NNNNN.json`, which has the metrics of all epochs so far.
        fingerprint: Checkpoints with another fingerprint are removed.
        patience: Epochs without a better validation loss after which training ends; 0 disables
            early stopping.

    Attributes:
        history: A dictionary of metrics for each epoch.
    """

    kept = 2

    def __init__(self, folder: epath.Path, fingerprint: str, patience: int = 0):
        super().__init__()
        self.folder = folder / "checkpoints" / fingerprint
        self.patience = patience
        self.history: list[dict[str, float]] = []

    def restore(self, model: keras.Model) -> int:
        """Loads the last readable checkpoint into `model` and returns its number of epochs.

        Raises:
            VqbeamError: There are checkpoints, but none of them can be loaded.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for stale in self.folder.parent.iterdir():
            if stale != self.folder:
                print(f"{stale} is of other settings or inputs: removed", file=sys.stderr)
                stale.rmtree()
        for unfinished in matching(self.folder, ".*"):  # from an attempt that was killed
            unfinished.unlink(missing_ok=True)
        damaged = None
        for epoch, file in reversed(epoch_files(self.folder).items()):
            try:
                self._load(model, file)
                self.history = read_json(self._measures(epoch))
                return epoch
            except (VqbeamError, FileNotFoundError) as error:
                # A power failure can leave a file with a name but no content.
                damaged = damaged or error
                print(f"{file} cannot be read: going back an epoch", file=sys.stderr)
        if damaged:
            raise damaged
        return 0

    def restore_best(self, model: keras.Model) -> None:
        """Loads the checkpoint of the epoch with the lowest validation loss."""
        self._load(model, self._weights(self.best_epoch))

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

    def _weights(self, epoch: int) -> epath.Path:
        return self.folder / f"epoch-{epoch:05d}.weights.h5"

    def _measures(self, epoch: int) -> epath.Path:
        return self.folder / f"epoch-{epoch:05d}.json"

    def _load(self, model: keras.Model, file: epath.Path) -> None:
        model.optimizer.build(model.trainable_variables)
        with tempfile.TemporaryDirectory() as local:
            copy = pathlib.Path(local) / file.name
            copy.write_bytes(file.read_bytes())
            try:
                model.load_weights(copy)
            except (ValueError, OSError, KeyError) as error:
                raise VqbeamError(
                    f"{file} does not match this run's model; delete "
                    f"{self.folder.parent} to train anew"
                ) from error

    def on_epoch_end(self, epoch, logs=None):
        """Saves model, optimizer and history; stops training if it has stalled."""
        self.history.append({name: float(value) for name, value in logs.items()})
        # Written first, since the weights file marks the epoch as complete.
        write_json(self._measures(epoch + 1), self.history)
        with tempfile.TemporaryDirectory() as local:
            weights = pathlib.Path(local) / "model.weights.h5"
            self.model.save_weights(weights)
            write_bytes(self._weights(epoch + 1), weights.read_bytes())
        self._remove_old()
        if self.stalled:
            self.model.stop_training = True

    def _remove_old(self) -> None:
        kept = list(epoch_files(self.folder).values())[-self.kept :]
        if self.patience:
            kept.append(self._weights(self.best_epoch))
        names = {path.name.split(".")[0] for path in kept}
        for path in matching(self.folder, "epoch-*"):
            if path.name.split(".")[0] not in names:
                path.unlink(missing_ok=True)  # a concurrent attempt may remove it as well
