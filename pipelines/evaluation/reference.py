"""Measures a set of images by held-out ones: how far, how true, how varied, of which class."""

import dataclasses
from collections.abc import Iterable, Iterator

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
    precision_recall,
)
from vqbeam.pipelines.evaluation.features import (
    compiled,
    feature_extractor,
    label_obstacle,
    load_classifier,
)
from vqbeam.prior.sampler import Sampler
from vqbeam.prior.training import load_prior
from vqbeam.vqvae.fitting.compilation import compiled_decoder, compiled_encoder
from vqbeam.vqvae.fitting.progress import progress_bar
from vqbeam.vqvae.storage.labels import NO_CLASS
from vqbeam.vqvae.storage.records import damaged_records, label_of, open_dataset, read_split
from vqbeam.vqvae.storage.run_folder import RunFolder
from vqbeam.vqvae.training import load_vqvae

_BATCH_SIZE = 256

# Images uint8 [B, H, W, C] and the labels int [B] that they have, or were asked for; −1 for none.
Batches = Iterable[tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class FeatureStats:
    """What is kept of a set of images.

    Attributes:
        gaussian: Of the features; None where there are none.
        manifold: Of the features; None where there are none.
        agreement: Share of the images with a class that the classifier gives it; None without it.
    """

    gaussian: Gaussian | None
    manifold: Manifold | None
    agreement: float | None


class ReferenceSet:
    """Held-out images of a run, by which sets of as many images are measured.

    All sets have one size, since every figure but the agreement depends on it.

    Args:
        run: Its images are prepared.
        num: Images of a set; fewer where the run has not as many in either split.
        features: See `vqbeam.pipelines.evaluation.features.feature_extractor`.
        seed: Of the choice of real images.

    Attributes:
        num: Images of a set.
        features: As given.
        left_out: By figure why it is not measured; nothing where it is.

    Raises:
        VqbeamError: The images are not prepared or damaged, or the features cannot be had.
    """

    def __init__(self, run: RunFolder, num: int, features: str, seed: int):
        self.run, self.features, self.seed = run, features, seed
        prepared = run.require("prepare")
        self.num = set_size(prepared, num)
        self.left_out = _left_out(prepared, features, self.num)
        self._extract = self._classify = None
        if "frechet" not in self.left_out:
            self._extract = feature_extractor(run, features)
        if "agreement" not in self.left_out:
            self._classify = compiled(load_classifier(run))
        self.held_out = self.observe(self.real("validation"))

    def real(self, split: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields `num` images of a split, drawn at random without replacement, and their labels."""
        builder = open_dataset(self.run.folder("prepare"))
        size = builder.info.splits[split].num_examples
        chosen = np.zeros(size, bool)
        chosen[np.random.default_rng(self.seed).permutation(size)[: self.num]] = True

        def pair(_, example):
            return example["image"], label_of(example)

        examples = read_split(builder, split).enumerate()
        examples = examples.filter(lambda index, _: tf.constant(chosen)[index]).map(pair)
        with damaged_records(self.run.folder("prepare")):
            yield from examples.batch(_BATCH_SIZE).as_numpy_iterator()

    def observe(self, batches: Batches) -> FeatureStats:
        """Returns what is to be kept of a set of images."""
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
        """Compares a set of `num` images with the held-out ones.

        Returns:
            `frechet`, `precision`, `recall` and `agreement`; None for those in `left_out`.
        """
        other = self.observe(batches)
        if not self._extract:
            return dict.fromkeys(("frechet", "precision", "recall")) | {
                "agreement": other.agreement
            }
        precision, recall = precision_recall(self.held_out.manifold, other.manifold)
        return {
            "frechet": frechet_distance(self.held_out.gaussian, other.gaussian),
            "precision": precision,
            "recall": recall,
            "agreement": other.agreement,
        }


def set_size(prepared: dict, num: int) -> int:
    """Returns how many images a set has of which `num` are asked for, by the prepare manifest."""
    return min(num, *prepared["counts"].values())


def _left_out(prepared: dict, features: str, num: int) -> dict[str, str]:
    """Returns by figure why it cannot be measured."""
    without_labels = label_obstacle(prepared)
    reasons = {"agreement": without_labels} if without_labels else {}
    reason = None
    if num <= NEIGHBOURS:
        reason = f"{num} images have no {NEIGHBOURS} neighbours each; hold out more"
    elif without_labels and features == "classifier":
        reason = f"{without_labels}; --features inception needs none"
    return reasons | (dict.fromkeys(("frechet", "precision", "recall"), reason) if reason else {})


# Title and form of each figure of a set of images.
FIGURES = {
    "frechet": ("Fréchet distance", "{:.3f}"),
    "precision": ("precision", "{:.3f}"),
    "recall": ("recall", "{:.3f}"),
    "agreement": ("label agreement", "{:.1%}"),
}


class SampleEvaluator:
    """Draws images from a run with any settings, and measures them by held-out ones.

    Their labels are those of as many training images, so that the classes have the shares that
    they have in the data, and are the same at any settings.

    Args:
        run: Its VQ-VAE and its prior are trained.
        reference: Of the run's images.
        batch_size: Images drawn at once.
        seed: Of the images drawn.
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
        """Measures training images; the agreement is that of the held-out ones.

        The classifier has learned the training images, and agrees too well with them.
        """
        measures = self.reference.measure(self.reference.real("train"))
        return measures | {"agreement": self.reference.held_out.agreement}

    def reconstructions(self) -> dict[str, float | None]:
        """Measures the held-out images as the VQ-VAE gives them back."""
        return self.reference.measure(self._reconstructed())

    def samples(self, settings: SamplerSettings) -> dict[str, float | None]:
        """Returns the metrics of images sampled with the settings."""
        return self.reference.measure(self._drawn(settings))

    def _reconstructed(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for images, labels in self.reference.real("validation"):
            yield keras.ops.convert_to_numpy(self._decode(self._encode(images))), labels

    def _drawn(self, settings: SamplerSettings) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        with progress_bar("draw", len(self._labels)) as bar:
            for first in range(0, len(self._labels), self.batch_size):
                labels = self._labels[first : first + self.batch_size]
                indices = first + np.arange(len(labels))
                codes = self.sampler(labels, self.seed, settings, indices=indices)
                yield keras.ops.convert_to_numpy(self._decode(codes)), labels
                bar.update(len(labels))
