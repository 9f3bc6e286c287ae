"""What training keeps after each epoch, to go on from and to go back to."""

import pathlib
import sys
import tempfile

import keras
from etils import epath

from vqbeam.configs import VqbeamError
from vqbeam.vqvae.storage.files import matching, read_json, write_bytes, write_json
from vqbeam.vqvae.storage.run_folder import epoch_files


class Checkpoints(keras.callbacks.Callback):
    """Keeps the state after each epoch, in files that are either whole or absent.

    Keras's own BackupAndRestore writes the weights and the epoch one after the other, so that a
    kill between the two trains an epoch twice; here the epoch is in the file's name.

    Args:
        folder: Gets `checkpoints/FINGERPRINT/epoch-NNNNN.weights.h5` and, with the measures of all
            epochs so far, `epoch-NNNNN.json`.
        fingerprint: Checkpoints made under another one are not restored.
        patience: Epochs without a better validation loss after which training ends; 0 for never.

    Attributes:
        history: One dictionary of measures an epoch.
    """

    kept = 2

    def __init__(self, folder: epath.Path, fingerprint: str, patience: int = 0):
        super().__init__()
        self.folder = folder / "checkpoints" / fingerprint
        self.patience = patience
        self.history: list[dict[str, float]] = []

    def restore(self, model: keras.Model) -> int:
        """Loads the last whole checkpoint into `model`; returns the number of epochs behind it.

        Raises:
            VqbeamError: There are checkpoints, and none of them can be loaded.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for stale in self.folder.parent.iterdir():
            if stale != self.folder:
                print(f"{stale} is of other settings or inputs: removed", file=sys.stderr)
                stale.rmtree()
        for unfinished in matching(self.folder, ".*"):  # of an attempt that was killed
            unfinished.unlink(missing_ok=True)
        damaged = None
        for epoch, file in reversed(epoch_files(self.folder).items()):
            try:
                self._load(model, file)
                self.history = read_json(self._measures(epoch))
                return epoch
            except (VqbeamError, FileNotFoundError) as error:
                # A machine that lost its power may have kept the name of a file, and no content.
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
        """The number, from 1 up, of the first epoch with the lowest validation loss."""
        losses = [epoch["val_loss"] for epoch in self.history]
        return losses.index(min(losses)) + 1

    @property
    def stalled(self) -> bool:
        """Whether `patience` is over; it follows from the history alone."""
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
                    f"{file} does not fit the model of this run; delete "
                    f"{self.folder.parent} to train anew"
                ) from error

    def on_epoch_end(self, epoch, logs=None):
        """Saves model, optimizer and history; ends training where it has stalled."""
        self.history.append({name: float(value) for name, value in logs.items()})
        # First, since the weights are what tells that the epoch is whole.
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
                path.unlink(missing_ok=True)  # another attempt at the same time may be here as well
