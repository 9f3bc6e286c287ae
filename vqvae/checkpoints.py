"""What training keeps after each epoch, to go on from and to go back to."""

import json
import pathlib
import tempfile

import keras
from etils import epath

from configs import VqbeamError
from vqvae.run_folder import write_bytes, write_json


class Checkpoints(keras.callbacks.Callback):
    """Keeps the state after each epoch, in files that are either whole or absent.

    Keras's own BackupAndRestore writes the weights and the epoch one after the other, so that a
    kill between the two trains an epoch twice; here the epoch is in the file's name.

    Args:
        folder: Gets `checkpoints/epoch-NNNNN.weights.h5` and `history.json`.
        fingerprint: Checkpoints made under another one are not restored.
        patience: Epochs without a better validation loss after which training ends; 0 for never.

    Attributes:
        history: One dictionary of measures an epoch.
    """

    kept = 2

    def __init__(self, folder: epath.Path, fingerprint: str, patience: int = 0):
        super().__init__()
        self.folder = folder / "checkpoints" / fingerprint
        self.history_file = self.folder / "history.json"
        self.patience = patience
        self.history: list[dict[str, float]] = []

    def restore(self, model: keras.Model) -> int:
        """Loads the last whole checkpoint into `model`; returns the number of epochs behind it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for stale in self.folder.parent.iterdir():
            if stale != self.folder:
                stale.rmtree()
        found = sorted(self.folder.glob("epoch-*.weights.h5"))
        if not found:
            return 0
        self._load(model, found[-1])
        epoch = int(found[-1].name.split(".")[0].removeprefix("epoch-"))
        self.history = json.loads(self.history_file.read_text())[:epoch]
        return epoch

    def restore_best(self, model: keras.Model) -> None:
        """Loads the checkpoint of the epoch with the lowest validation loss."""
        self._load(model, self._file(self.best_epoch))

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

    def _file(self, epoch: int) -> epath.Path:
        return self.folder / f"epoch-{epoch:05d}.weights.h5"

    def _load(self, model: keras.Model, file: epath.Path) -> None:
        model.optimizer.build(model.trainable_variables)
        with tempfile.TemporaryDirectory() as local:
            copy = pathlib.Path(local) / file.name
            copy.write_bytes(file.read_bytes())
            try:
                model.load_weights(copy)
            except (ValueError, OSError) as error:
                raise VqbeamError(
                    f"{file} does not fit the model of this run; delete "
                    f"{self.folder.parent} to train anew"
                ) from error

    def on_epoch_end(self, epoch, logs=None):
        """Saves model, optimizer and history; ends training where it has stalled."""
        self.history.append({name: float(value) for name, value in logs.items()})
        write_json(self.history_file, self.history)
        with tempfile.TemporaryDirectory() as local:
            weights = pathlib.Path(local) / "model.weights.h5"
            self.model.save_weights(weights)
            write_bytes(self._file(epoch + 1), weights.read_bytes())
        best = self._file(self.best_epoch) if self.patience else None
        for old in sorted(self.folder.glob("epoch-*.weights.h5"))[: -self.kept]:
            if old != best:
                old.unlink()
        if self.stalled:
            self.model.stop_training = True
