"""Trainings that are broken off within an epoch, right after a checkpoint was saved there."""

import contextlib
from collections.abc import Iterator

import keras
import pytest

from vqbeam.vqvae.fitting.checkpoints import Checkpoints


class Killed(BaseException):
    """Ends a training as if the process were killed: nothing of the product expects it."""


def kill(*_, **__):
    """Raises `Killed`, whatever the arguments."""
    raise Killed


@contextlib.contextmanager
def broken_off(step: int, model: type[keras.Model] = keras.Model) -> Iterator[None]:
    """A context in which the training of a kind of model ends once it has saved a step.

    The checkpoint is one by the clock, which is due after each call of the training program.
    """
    save = Checkpoints._save_within_epoch

    def save_and_end(self, saved):
        save(self, saved)
        if saved == step and isinstance(self.model, model):
            raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Checkpoints, "seconds", 0)
        patch.setattr(Checkpoints, "largest_share", float("inf"))
        patch.setattr(Checkpoints, "_save_within_epoch", save_and_end)
        yield
