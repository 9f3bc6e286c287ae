"""Many new images from a trained run, as one Beam pipeline: any number of workers, one result."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
from apache_beam.metrics import Metrics
from apache_beam.utils.shared import Shared
from etils import epath

from vqbeam.configs import SampleConfig, VqbeamError
from vqbeam.pipelines.beam import advance, run_pipeline
from vqbeam.pipelines.lock import LOCK_FILE, locked
from vqbeam.pipelines.places import absolute, check_shared, is_dataflow
from vqbeam.pipelines.sampling.api import Run, Samples
from vqbeam.pipelines.sampling.files import SAMPLES_LIST, write_samples
from vqbeam.pipelines.sources.images import encode_png
from vqbeam.pipelines.stages.shards import (
    ShardReport,
    ShardWriter,
    remove_leftovers,
    write_dataset_metadata,
)
from vqbeam.vqvae.storage.files import matching, read_json, write_json
from vqbeam.vqvae.storage.labels import label_rows
from vqbeam.vqvae.storage.records import IMAGES_VERSION, Shard, image_features, serialize

_FILE = "generate.json"


@dataclasses.dataclass(frozen=True)
class Order:
    """What is to be drawn, and into which folder.

    Attributes:
        run: The run's folder.
        output: The folder of the images.
        form: "png" or "tfrecord".
        labels: As `label_rows` takes them.
        seed: Of the random numbers; image i of a seed is always the same image.
        shard_images: Images of one shard: whole batches.
        settings: How they are drawn; its `num` is the number of all images.
        preset: That of the run.
        checkpoint: That of the run's models.
    """

    run: str
    output: str
    form: str
    labels: tuple[str, ...] | None
    seed: int
    shard_images: int
    settings: SampleConfig
    preset: str
    checkpoint: str

    @property
    def folder(self) -> epath.Path:
        """The folder of the images."""
        return epath.Path(self.output)

    @property
    def facts(self) -> dict[str, Any]:
        """All that decides what is drawn and how it lies on disk, as JSON has it."""
        values = dataclasses.asdict(self)
        facts = values.pop("settings") | values
        del facts["run"], facts["output"]
        return json.loads(json.dumps(facts))

    @property
    def shards(self) -> int:
        """How many there are."""
        return -(-self.settings.num // self.shard_images)

    @property
    def fingerprint(self) -> str:
        """A hash of the facts."""
        return hashlib.sha256(json.dumps(self.facts).encode()).hexdigest()[:16]

    def claim_folder(self) -> None:
        """Binds the folder to the order: from now on it takes no images of another.

        Raises:
            VqbeamError: It holds something else.
        """
        if self._file.exists():
            found, facts = read_json(self._file)["order"], self.facts
            changed = [
                f"{name} {found.get(name)}" for name in facts if found.get(name) != facts[name]
            ]
            if changed:
                raise VqbeamError(
                    f"{self.folder} holds images of {', '.join(changed)}; ask for the same, or "
                    "give another --output"
                )
        elif self.folder.exists() and matching(self.folder, "[!.]*"):
            raise VqbeamError(f"{self.folder} is not empty; give another --output")
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self._file, {"order": self.facts, "done": False})

    def is_done(self) -> bool:
        """Tells whether all images of the order are in its folder, which it has claimed."""
        return read_json(self._file)["done"]

    def finish(self) -> None:
        """Declares that they are."""
        write_json(self._file, {"order": self.facts, "done": True})

    @property
    def _file(self) -> epath.Path:
        return self.folder / _FILE


DATASET = "samples"
SPLIT = "train"
_TITLE = "generate"
_run = Shared()


class DrawnShard(NamedTuple):
    """A shard that is whole: its order, where it stands, and for TFRecords its report."""

    order: Order
    index: int
    report: ShardReport | None


def generate(
    run_dir: str,
    *,
    output: str,
    form: str = "png",
    labels: Sequence[str] | None = None,
    shard_images: int = 1000,
    beam_args: Sequence[str],
    **settings: Any,
) -> str:
    """Draws images shard by shard; what is None is as the run says.

    Killed at any moment, the same call goes on with the shards that are missing.

    Args:
        run_dir: The run's folder.
        output: The folder to write: a folder of PNGs for each shard, or a TFDS dataset.
        form: "png" or "tfrecord".
        labels: See `sample`.
        shard_images: Images of one shard at least; rounded up to whole batches.
        beam_args: Beam's own options.
        **settings: `num`, the number of images; `seed`, with which image i is that of `sample`;
            and other fields of SampleConfig.

    Returns:
        What was written where.

    Raises:
        VqbeamError: The run has no trained prior, a setting or label is out of range, the folder
            holds other images or another command is at work in it, or workers elsewhere could not
            read a path.
    """
    if is_dataflow(beam_args):
        check_shared({"DIR": run_dir, "--output": output})
    run = Run(run_dir)
    seed = run.seed(settings.pop("seed", None))
    chosen = run.settings(**settings)
    chosen = chosen.with_at_most(chosen.num)
    label_rows(labels, run.prior_labels, 1)  # refuses one that is not known
    order = Order(
        absolute(run_dir),
        absolute(output),
        form,
        None if labels is None else tuple(labels),
        seed,
        -(-shard_images // chosen.batch_size) * chosen.batch_size,
        chosen,
        run.config.name,
        run.checkpoint,
    )
    with locked(order.folder, "--output"):
        order.claim_folder()
        done = order.is_done()
        if not done:
            run_pipeline(beam_args, lambda pipeline: pipeline | GenerateImages(order))
    kind = "a TFDS dataset" if form == "tfrecord" else "PNGs by shard"
    return f"{chosen.num:,} images {'were drawn already' if done else 'drawn'}, {kind}: {output}"


class GenerateImages(beam.PTransform):
    """From a pipeline to the folder of an order, once all its images are there."""

    def __init__(self, order: Order):
        super().__init__()
        self.order = order

    def expand(self, pipeline):
        """Builds the steps."""
        return (
            pipeline
            | beam.Create([self.order])
            | "ListShards" >> beam.FlatMap(_shards)
            | beam.Reshuffle()
            | "DrawShard" >> beam.MapTuple(draw_shard)
            | beam.combiners.ToList()
            | "FinishImages" >> beam.Map(finish_images)
        )


def _shards(order: Order) -> Iterator[tuple[Order, int]]:
    for index in range(order.shards):
        yield order, index


def draw_shard(order: Order, index: int) -> DrawnShard:
    """Draws the images of one shard and writes them, unless an earlier attempt has."""
    first = index * order.shard_images
    num = min(order.shard_images, order.settings.num - first)
    folder = order.folder / f"{index:05d}-of-{order.shards:05d}"
    report, drawn = None, 0

    def moved(count):
        nonlocal drawn
        advance(_TITLE, min(count, num) - drawn, order.settings.num)
        drawn = min(count, num)

    def draw() -> Samples:
        run = _load_run(order)
        rows = label_rows(order.labels, run.prior_labels, num, first)
        return run.sample_rows(rows, order.seed, order.settings, first, moved)

    if order.form == "tfrecord":
        shard = Shard(DATASET, SPLIT, index, order.shards)
        writer = ShardWriter(order.folder, order.fingerprint, shard)
        if writer.report is None:
            with writer:
                for record in _records(draw()):
                    writer.write(record)
        report = writer.report
    elif not (folder / SAMPLES_LIST).exists():
        folder.rmtree(missing_ok=True)  # what was killed may have left half a picture
        write_samples(draw(), folder)
    moved(num)  # where an earlier attempt has drawn them
    Metrics.counter("vqbeam", "images_generated").inc(num)
    return DrawnShard(order, index, report)


def _records(samples: Samples) -> Iterator[bytes]:
    for row, image in enumerate(samples.images):
        example = {"image": encode_png(image), "key": f"{samples.first + row:05d}"}
        if samples.labels.ndim == 2:
            example["attributes"] = samples.labels[row].astype(np.uint8)
        elif samples.names:
            example["label"] = samples.labels[row]
        yield serialize(example)


def finish_images(shards: Sequence[DrawnShard]) -> str:
    """Makes a dataset of the shards where they are TFRecords; returns the folder's path."""
    order = shards[0].order
    if order.is_done():
        return order.output  # a runner that does the next step again may do this one as well
    if order.form == "tfrecord":
        run = Run(order.run)
        write_dataset_metadata(
            order.folder,
            [shard.report for shard in shards],
            image_features(run.config.image_shape, run.prior_labels),
            version=IMAGES_VERSION,
            description=f"Images drawn by vqbeam: {json.dumps(order.facts)}",
        )
    order.finish()
    shards_and_lock = [*matching(order.folder, "[!.]*"), order.folder / LOCK_FILE]
    remove_leftovers(order.folder, shards_and_lock)
    return order.output


def _load_run(order: Order) -> Run:
    def load():
        run = Run(order.run)
        if run.checkpoint != order.checkpoint:
            raise VqbeamError(
                f"{order.run} was trained anew while images were drawn from it; delete "
                f"{order.folder} and run the same command again"
            )
        return run

    return _run.acquire(load, tag=order.fingerprint)
