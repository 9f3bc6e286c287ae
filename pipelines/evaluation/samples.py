"""Measures what a run draws beside what it could at best: reconstructions, and real images."""

import dataclasses
from collections.abc import Iterator

import keras
import numpy as np

from vqbeam.configs import HOW_MANY, SampleConfig
from vqbeam.pipelines.evaluation.reference import Yardstick
from vqbeam.prior.sampler import Sampler, sampler_arguments
from vqbeam.prior.training import load_prior
from vqbeam.vqvae.fitting.compilation import compiled_decoder, compiled_encoder
from vqbeam.vqvae.fitting.progress import progress_bar
from vqbeam.vqvae.storage.run_folder import RunFolder
from vqbeam.vqvae.training import load_vqvae

# Title and form of each figure of a set of images.
FIGURES = {
    "frechet": ("Fréchet distance", "{:.3f}"),
    "precision": ("precision", "{:.3f}"),
    "recall": ("recall", "{:.3f}"),
    "agreement": ("label agreement", "{:.1%}"),
}


class PriorMeter:
    """Draws images from a run with any settings, and measures them by held-out ones.

    Their labels are those of as many training images, so that the classes have the shares that
    they have in the data, and are the same at any settings.

    Args:
        run: Its VQ-VAE and its prior are trained.
        yardstick: Of the run's images.
        batch_size: Images drawn at once.
        seed: Of the images drawn.
    """

    def __init__(self, run: RunFolder, yardstick: Yardstick, batch_size: int, seed: int):
        self.yardstick, self.seed = yardstick, seed
        self.batch_size = min(batch_size, yardstick.num)
        self.vqvae = load_vqvae(run)
        self.sampler = Sampler(load_prior(run), self.batch_size)
        self._encode = compiled_encoder(self.vqvae)
        self._decode = compiled_decoder(self.vqvae)
        self._labels = np.concatenate([labels for _, labels in yardstick.real("train")])

    def real(self) -> dict[str, float | None]:
        """Measures training images; the agreement is that of the held-out ones.

        The classifier has learned the training images, and agrees too well with them.
        """
        measures = self.yardstick.measure(self.yardstick.real("train"))
        return measures | {"agreement": self.yardstick.held_out.agreement}

    def reconstructions(self) -> dict[str, float | None]:
        """Measures the held-out images as the VQ-VAE gives them back."""
        return self.yardstick.measure(self._reconstructed())

    def samples(self, settings: SampleConfig) -> dict[str, float | None]:
        """Measures images drawn with settings, of which `num` and `batch_size` do not count."""
        return self.yardstick.measure(self._drawn(settings))

    def _reconstructed(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for images, labels in self.yardstick.real("validation"):
            yield keras.ops.convert_to_numpy(self._decode(self._encode(images))), labels

    def _drawn(self, settings: SampleConfig) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        with progress_bar("draw", len(self._labels)) as bar:
            for first in range(0, len(self._labels), self.batch_size):
                labels = self._labels[first : first + self.batch_size]
                codes = self.sampler(
                    labels,
                    self.seed,
                    indices=first + np.arange(len(labels)),
                    **sampler_arguments(settings, self.vqvae.layout.length),
                )
                yield keras.ops.convert_to_numpy(self._decode(codes)), labels
                bar.update(len(labels))


def sampler_settings(settings: SampleConfig) -> dict:
    """Returns what decides what an image of a seed looks like, by name."""
    fields = dataclasses.asdict(settings)
    return {name: value for name, value in fields.items() if name not in HOW_MANY}
