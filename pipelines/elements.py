"""Transforms for use in other Beam pipelines: from images to codes, and from labels to images.

    images | vqbeam.EncodeImages("runs/fashion")    # (key, image) → (key, codes)
    labels | vqbeam.SampleImages("runs/fashion")    # (number, label) → (number, image)

Each is bound to the models that the run has when the transform is built. If they are retrained
before the pipeline ends, it ends with an error instead of mixing codes of two models.
"""

from typing import Any

import apache_beam as beam
import numpy as np
from etils import epath

from vqbeam.configs import Config, VqbeamError
from vqbeam.pipelines.paths import absolute
from vqbeam.pipelines.sampling.api import Run
from vqbeam.pipelines.sources.images import ImageError, decode_image
from vqbeam.pipelines.stages.encode import load_encoder
from vqbeam.pipelines.stages.generate import load_run
from vqbeam.vqvae.fitting.devices import in_batches
from vqbeam.vqvae.storage.labels import labels_for, parse_label
from vqbeam.vqvae.storage.run_folder import MODELS, RunFolder


class EncodeImages(beam.PTransform):
    """From `(key, image)` to `(key, codes)`, with the VQ-VAE of a run.

    An image is the bytes of an image file, or pixels, uint8 [H, W] or [H, W, C], of any size. It is
    cropped and resized like the run's images. Codes are int32 [h, w], as `Run.encode` returns them,
    and do not depend on the other images. A key is any value that Beam can pass on.

    An image that cannot be decoded ends the pipeline with a VqbeamError that names its key.

    Args:
        run: The run's folder, which workers must be able to read.

    Attributes:
        model: The hash of the VQ-VAE.

    Raises:
        VqbeamError: The run has no trained VQ-VAE.
    """

    def __init__(self, run: epath.PathLike):
        super().__init__()
        self.path = absolute(str(run))
        folder = RunFolder(self.path, remember=True)
        folder.require("train-vqvae", among=MODELS)
        self.config = folder.load_config()
        self.model = folder.result_hash("train-vqvae")

    def expand(self, images):
        """Builds the steps."""
        size = self.config.encode.batch_size
        return (
            images
            | "Decode" >> beam.Map(_decoded, self.config)
            | beam.BatchElements(max_batch_size=size)
            | "Encode" >> beam.ParDo(_Encode(self.path, self.model, size))
        )


def _decoded(pair: tuple[Any, bytes | np.ndarray], config: Config) -> tuple[Any, np.ndarray]:
    key, image = pair
    try:
        return key, decode_image(image, **config.data.form)
    except ImageError as error:
        raise VqbeamError(f"image {key!r} cannot be encoded: {error}; leave it out") from error


class _Encode(beam.DoFn):
    """From a batch of images with keys to their codes; keeps the model between bundles."""

    def __init__(self, path: str, model: str, size: int):
        self.path, self.model, self.size = path, model, size

    def setup(self):
        self.encode = load_encoder(RunFolder(self.path), self.model)

    def process(self, batch):
        keys, images = zip(*batch, strict=True)
        codes = in_batches(self.encode, np.stack(images), self.size)
        yield from zip(keys, codes.astype("int32", copy=False), strict=True)


class SampleImages(beam.PTransform):
    """From `(number, label)` to `(number, image)`, with both models of a run.

    Image i of a seed and label is the one of `vqbeam sample`, whatever the other elements and the
    workers. Each element needs a number of its own. A label is one as for `Run.sample`: the name or
    number of a class, or None for any. An image is uint8 [H, W, C].

    Images are sampled in batches of the run's batch size, and image i belongs to batch
    i // batch size. So consecutive numbers from 0 make full batches, whereas numbers far apart take
    one batch each.

    Args:
        run: The run's folder, which workers must be able to read.
        seed: Seed of the random numbers; by default the run's own.
        **settings: Sampler settings as for `Run.sample`.

    Attributes:
        checkpoint: A fingerprint of the weights of both models.

    Raises:
        VqbeamError: The run has no trained prior, or a setting is out of range.
    """

    def __init__(self, run: epath.PathLike, *, seed: int | None = None, **settings: Any):
        super().__init__()
        self.path = absolute(str(run))
        opened = Run(self.path)
        self.settings = opened.settings(**settings)
        self.seed, self.checkpoint = opened.seed(seed), opened.checkpoint

    def expand(self, labels):
        """Builds the steps."""
        size = self.settings.with_at_most(self.settings.num).batch_size
        return (
            labels
            | "ByBatch" >> beam.Map(lambda element: (element[0] // size, element))
            | beam.GroupByKey()
            | "Sample" >> beam.ParDo(_Sample(self))
        )


class _Sample(beam.DoFn):
    """From the numbers and labels of a batch to their images; keeps the models between bundles."""

    def __init__(self, of: SampleImages):
        self.path, self.checkpoint = of.path, of.checkpoint
        self.seed, self.settings = of.seed, of.settings

    def setup(self):
        self.run = load_run(self.path, self.checkpoint, "build the transform again")

    def process(self, batch):
        _, elements = batch
        labels = self.run.prior_labels
        wanted = {}
        for number, label in elements:
            if number in wanted:
                raise VqbeamError(
                    f"two elements have the number {number}; give each a number of its own"
                )
            wanted[number] = parse_label(label, labels)
        first, last = min(wanted), max(wanted)
        # The numbers in between that were not requested are sampled too, with any label.
        rows = labels_for([wanted[first]], labels, last + 1 - first)
        for number, label in wanted.items():
            rows[number - first] = label
        samples = self.run.sample_rows(rows, self.seed, self.settings, first, lambda done: None)
        for number in sorted(wanted):
            yield number, samples.images[number - first]
