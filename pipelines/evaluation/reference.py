"""Metrics of a set of images: Fréchet distance, overlap and label agreement."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from vqbeam.configs import SamplerSettings
from vqbeam.pipelines.evaluation.distances import (
    NEIGHBOURS,
    Gaussian,
    Manifold,
    Moments,
    frechet_distance,
    nearest,
    overlap,
)
from vqbeam.pipelines.evaluation.features import (
    compiled,
    feature_extractor,
    label_obstacle,
    load_classifier,
)
from vqbeam.prior.sampler import Sampler
from vqbeam.prior.training import load_prior
from vqbeam.vqvae.fitting.devices import compiled_decoder, compiled_encoder
from vqbeam.vqvae.fitting.progress import ProgressBar
from vqbeam.vqvae.storage.labels import NO_CLASS
from vqbeam.vqvae.storage.records import damaged_records, label_of, open_dataset, read_split
from vqbeam.vqvae.storage.run_folder import RunFolder
from vqbeam.vqvae.training import load_vqvae

_BATCH_SIZE = 256
# Number of training images among which the nearest are searched, and of pairs that are shown.
_MOST_TRAINING = 100_000
_PAIRS = 10

# Images, uint8 [B, H, W, C], and their labels, int [B], −1 for none.
Batches = Iterable[tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class FeatureStats:
    """The statistics of a set of images that its metrics are computed from.

    Attributes:
        gaussian: Mean and covariance of the features; None without features.
        manifold: The features, for the overlap; None without features.
        agreement: Fraction of the labelled images that the classifier assigns to their class; None
            without a classifier.
    """

    gaussian: Gaussian | None
    manifold: Manifold | None
    agreement: float | None


class ReferenceSet:
    """Held-out images of a run, with which other sets of the same size are compared.

    All sets have the same size, since every metric except the label agreement depends on it.

    Args:
        run: A run with prepared images.
        num: Images in a set; fewer if a split of the run has fewer.
        features: See `vqbeam.pipelines.evaluation.features.feature_extractor`.
        seed: Seed of the choice of real images.

    Attributes:
        num: Images in a set.
        features: As given.
        left_out: The reason, by metric, why it cannot be measured; empty if all can.

    Raises:
        VqbeamError: The images are not prepared or are damaged, or the features are not available.
    """

    def __init__(self, run: RunFolder, num: int, features: str, seed: int):
        self.run, self.features, self.seed = run, features, seed
        prepared = run.require("prepare")
        self.num = set_size(prepared, num)
        self._builder = open_dataset(run.folder("prepare"))
        self.left_out = _left_out(prepared, features, self.num)
        self._extract = self._classify = None
        if "frechet" not in self.left_out:
            self._extract = feature_extractor(run, features)
        if "agreement" not in self.left_out:
            self._classify = compiled(load_classifier(run))
        self.held_out = self.observe(self.real("validation"))

    def real(self, split: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields `num` random images of a split, without replacement, and their labels."""
        size = self._builder.info.splits[split].num_examples
        chosen = np.zeros(size, bool)
        chosen[np.random.default_rng(self.seed).permutation(size)[: self.num]] = True
        examples = read_split(self._builder, split).enumerate()
        examples = examples.filter(lambda index, _: tf.constant(chosen)[index])
        return self._pairs(examples.map(lambda _, example: example))

    def _pairs(self, examples: tf.data.Dataset) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        pairs = examples.map(lambda example: (example["image"], label_of(example)))
        with damaged_records(self.run.folder("prepare")):
            yield from pairs.batch(_BATCH_SIZE).as_numpy_iterator()

    def nearest_training(self, others: Manifold) -> dict[str, Any]:
        """Returns how near the features of a set are to those of training images.

        Args:
            others: The features of a set, such as samples.

        Returns:
            `median`, the median distance to the nearest training image; `held_out`, the same for
            the held-out images; and `pairs`, for the ten images of the set that are nearest,
            closest first: their row in the set and the index of the training image.
        """
        images = self._pairs(read_split(self._builder, "train").take(_MOST_TRAINING))
        training = np.concatenate([self._extract(batch) for batch, _ in images])
        distances, rows = nearest(others.features, training)
        held_out, _ = nearest(self.held_out.manifold.features, training)
        first = np.argsort(distances, kind="stable")[:_PAIRS]
        return {
            "median": float(np.median(distances)),
            "held_out": float(np.median(held_out)),
            "pairs": np.stack([first, rows[first]], axis=1).tolist(),
        }

    def training_image(self, index: int) -> np.ndarray:
        """Returns a training image, uint8 [H, W, C]."""
        ((images, _),) = self._pairs(
            read_split(self._builder, "train", first=index, last=index + 1)
        )
        return images[0]

    def observe(self, batches: Batches) -> FeatureStats:
        """Returns the statistics of a set of images."""
        features, moments, agreed, labelled = [], Moments(), 0, 0
        for images, labels in batches:
            if self._extract:
                features.append(self._extract(images))
                moments.add(features[-1])
            if self._classify:
                agreed += int((self._classify(images).argmax(axis=1) == labels).sum())
                labelled += int((labels != NO_CLASS).sum())
        return FeatureStats(
            gaussian=moments.gaussian() if features else None,
            manifold=Manifold(np.concatenate(features)) if features else None,
            agreement=agreed / max(labelled, 1) if self._classify else None,
        )

    def measure(self, batches: Batches) -> dict[str, float | None]:
        """Returns the metrics of a set of `num` images, compared with the held-out ones.

        Returns:
            The values by the names of `FIGURES`; None for those in `left_out`.
        """
        return self.compare(self.observe(batches))

    def compare(self, other: FeatureStats) -> dict[str, float | None]:
        """Returns the metrics of a set of `num` images from its statistics; see `measure`."""
        found = dict.fromkeys(FIGURES) | {"agreement": other.agreement}
        if self._extract:
            found["frechet"] = frechet_distance(self.held_out.gaussian, other.gaussian)
            found |= overlap(self.held_out.manifold, other.manifold)._asdict()
        return found


def set_size(prepared: dict, num: int) -> int:
    """Returns the size of a set: `num`, or the size of the smallest split in the manifest."""
    return min(num, *prepared["counts"].values())


def _left_out(prepared: dict, features: str, num: int) -> dict[str, str]:
    """Returns, by metric, the reason why it cannot be measured."""
    without_labels = label_obstacle(prepared)
    reasons = {"agreement": without_labels} if without_labels else {}
    reason = None
    if num <= NEIGHBOURS:
        reason = f"{num} images have no {NEIGHBOURS} neighbours each; hold out more"
    elif without_labels and features == "classifier":
        reason = f"{without_labels}; --features inception needs none"
    of_features = [name for name in FIGURES if name != "agreement"]
    return reasons | (dict.fromkeys(of_features, reason) if reason else {})


# Title and format of each metric.
FIGURES = {
    "frechet": ("Fréchet distance", "{:.3f}"),
    "precision": ("precision", "{:.3f}"),
    "recall": ("recall", "{:.3f}"),
    "density": ("density", "{:.3f}"),
    "coverage": ("coverage", "{:.3f}"),
    "agreement": ("label agreement", "{:.1%}"),
}


class SampleEvaluator:
    """Samples images from a run with any settings, and measures them.

    The labels are those of random training images, so that classes are as frequent as in the data,
    and the same for all settings.

    Args:
        run: A run with a trained VQ-VAE and prior.
        reference: The run's held-out images.
        batch_size: Images sampled at once.
        seed: Seed of the samples.
    """

    def __init__(self, run: RunFolder, reference: ReferenceSet, batch_size: int, seed: int):
        self.reference, self.seed = reference, seed
        self.batch_size = min(batch_size, reference.num)
        self.vqvae = load_vqvae(run)
        self.sampler = Sampler(load_prior(run), self.batch_size)
        self._encode = compiled_encoder(self.vqvae)
        self._decode = compiled_decoder(self.vqvae)
        self._labels = np.concatenate([labels for _, labels in reference.real("train")])

    def real(self) -> dict[str, float | None]:
        """Returns the metrics of training images.

        The agreement is that of the held-out images, since the classifier was trained on the
        training images.
        """
        measures = self.reference.measure(self.reference.real("train"))
        return measures | {"agreement": self.reference.held_out.agreement}

    def reconstructions(self) -> dict[str, float | None]:
        """Returns the metrics of the reconstructions of the held-out images."""
        return self.reference.measure(self._reconstructed())

    def samples(self, settings: SamplerSettings, title: str = "draw") -> FeatureStats:
        """Returns the statistics of images sampled with the settings; shows a progress bar."""
        return self.reference.observe(self._drawn(settings, title))

    def sample_again(self, settings: SamplerSettings, rows: Sequence[int]) -> np.ndarray:
        """Returns the images in some rows of `samples`, uint8 [N, H, W, C]."""
        indices = np.asarray(rows)
        codes = self.sampler(self._labels[indices], self.seed, settings, indices=indices)
        return keras.ops.convert_to_numpy(self._decode(codes))

    def _reconstructed(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for images, labels in self.reference.real("validation"):
            yield keras.ops.convert_to_numpy(self._decode(self._encode(images))), labels

    def _drawn(
        self, settings: SamplerSettings, title: str
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        with ProgressBar(title, len(self._labels)) as bar:
            for first in range(0, len(self._labels), self.batch_size):
                labels = self._labels[first : first + self.batch_size]
                indices = first + np.arange(len(labels))
                codes = self.sampler(labels, self.seed, settings, indices=indices)
                yield keras.ops.convert_to_numpy(self._decode(codes)), labels
                bar.update(len(labels))
