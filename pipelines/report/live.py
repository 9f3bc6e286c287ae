"""The page of a run that is being trained, written anew at each epoch."""

import sys
import time

import keras

from vqbeam.pipelines.report.page import held_out_images, write_page
from vqbeam.vqvae.storage.run_folder import RunFolder
from vqbeam.vqvae.training import reconstruct

# The share of the time that writing pages may take, and how often a browser loads the page again.
_LARGEST_SHARE = 0.05
_RELOAD_SECONDS = 30


class LivePage(keras.callbacks.Callback):
    """Writes `DIR/report.html` when an epoch begins, so that a browser shows training as it goes.

    At that time the checkpoint holds the epoch before. Pages are left out if they would take more
    than a twentieth of the time. A page that cannot be written is one line of warning.

    Args:
        run_path: The run's folder.
        stage: The stage that trains.
    """

    def __init__(self, run_path: str, stage: str):
        super().__init__()
        self.run, self.stage = RunFolder(run_path), stage
        self.kept: dict = {}  # the parts of the page that no epoch changes
        self.originals = None
        self.due, self.failed = 0.0, False

    def on_epoch_begin(self, epoch, logs=None):
        """Writes the page, if it is time to."""
        begun = time.monotonic()
        if self.failed or begun < self.due:
            return
        self.failed = not written(self.run, _RELOAD_SECONDS, self._pictures, self.kept)
        now = time.monotonic()
        self.due = now + (now - begun) / _LARGEST_SHARE

    def _pictures(self):
        """Returns held-out images and their reconstructions by the model as it is now."""
        if self.stage != "train-vqvae":
            return None
        if self.originals is None:
            self.originals = held_out_images(self.run)
        return self.originals, reconstruct(self.model, self.originals)


def written(run: RunFolder, reload_seconds: int | None = None, pictures=None, kept=None) -> bool:
    """Writes the page of a run; returns whether that went well, and if not, warns.

    Args:
        run: The run.
        reload_seconds: How often a browser loads the page again; None for a final page.
        pictures: Function that returns held-out images and their reconstructions, or None to let
            the finished model make them.
        kept: Parts of the page, which are made only if they are not in it, and put into it.
    """
    try:
        write_page(
            [str(run.root)],
            reload_seconds=reload_seconds,
            pictures=pictures and pictures(),
            kept=kept,
        )
        return True
    except Exception as error:  # a page is not worth a training
        reason = " ".join(str(error).split()) or type(error).__name__
        print(f"{run.root}/report.html cannot be written: {reason}", file=sys.stderr)
        return False
