"""The command that samples many images from a trained run, as one Beam pipeline."""

import dataclasses
import hashlib
import io
import json
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
from apache_beam.metrics import Metrics
from apache_beam.utils.shared import Shared
from etils import epath

from vqbeam.configs import SampleConfig, VqbeamError
from vqbeam.pipelines.beam import advance, run_pipeline
from vqbeam.pipelines.errors import if_removed
from vqbeam.pipelines.lock import LOCK_FILE, locked
from vqbeam.pipelines.paths import absolute, check_shared, is_dataflow
from vqbeam.pipelines.sampling.api import Run, Samples
from vqbeam.pipelines.sampling.sample import size_of_samples, write_samples
from vqbeam.pipelines.sources.images import encode_png
from vqbeam.pipelines.stages.shards import (
    ShardReport,
    ShardWriter,
    remove_leftovers,
    write_dataset_metadata,
)
from vqbeam.vqvae.storage.files import matching, read_json, remove, size, write_bytes, write_json
from vqbeam.vqvae.storage.labels import labels_for
from vqbeam.vqvae.storage.records import IMAGES_VERSION, Shard, image_features, serialize

_FILE = "generate.json"
DATASET = "samples"
SPLIT = "train"


@dataclasses.dataclass(frozen=True)
class GenerateJob:
    """The job of sampling images into a folder.

    Attributes:
        run: The run's folder.
        output: The folder of the images.
        form: "png", "npz" or "tfrecord".
        labels: See `labels_for`.
        seed: Seed of the random numbers; image i of a seed is always the same image.
        shard_images: Images in a shard, a multiple of the batch size.
        settings: Sampler settings; `num` is the total number of images.
        preset: The run's preset.
        checkpoint: The fingerprint of the run's models.
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
        """Everything that the contents of the folder depend on, as JSON values by name."""
        values = dataclasses.asdict(self)
        facts = values.pop("settings") | values
        del facts["run"], facts["output"]
        return json.loads(json.dumps(facts))

    @property
    def shards(self) -> int:
        """The number of shards."""
        return -(-self.settings.num // self.shard_images)

    @property
    def fingerprint(self) -> str:
        """A hash of `facts`."""
        return hashlib.sha256(json.dumps(self.facts).encode()).hexdigest()[:16]

    def bind_folder(self) -> None:
        """Creates the folder, and reserves it for the images of this job.

        Raises:
            VqbeamError: The folder has other contents.
        """
        if self.exists():
            found, facts = self._stored["order"], self.facts
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

    def exists(self) -> bool:
        """Returns whether the folder exists and is reserved for images."""
        return self._file.exists()

    def is_done(self) -> bool:
        """Returns whether the job was finished and its files are still complete."""
        return self._stored["done"] and not self._damaged

    def begin_again(self) -> None:
        """Marks the job as unfinished and removes damaged files."""
        for path in self._damaged:
            remove(path)
        write_json(self._file, {"order": self.facts, "done": False})

    def finish(self) -> None:
        """Marks the job as finished and records the sizes of its files."""
        paths = [path for path in matching(self.folder, "[!.]*") if path != self._file]
        found = {path.name: self._size(path) for path in paths}
        write_json(self._file, {"order": self.facts, "done": True, "sizes": found})

    @property
    def _damaged(self) -> list[epath.Path]:
        """The files and folders of a finished job that are missing or incomplete."""
        written = self._stored.get("sizes", {})
        paths = [self.folder / epath.Path(name).name for name in written]
        return [path for path in paths if self._size(path) != written.get(path.name)]

    def _size(self, path: epath.Path) -> int | None:
        """Returns the size of a file or a folder of PNGs; None if it is missing or incomplete."""
        return size_of_samples(path) if self.form == "png" else size(path)

    def shard_folder(self, index: int) -> epath.Path:
        """Returns the folder of a shard of PNGs."""
        return self.folder / f"{index:05d}-of-{self.shards:05d}"

    def shard_writer(self, index: int) -> ShardWriter:
        """Returns the writer of a shard of TFRecords."""
        return ShardWriter(self.folder, self.fingerprint, Shard(DATASET, SPLIT, index, self.shards))

    def shard_array(self, index: int) -> epath.Path:
        """Returns the file with the pixels of a shard of the archive."""
        return self.folder / f".{self.fingerprint}-{index:05d}-of-{self.shards:05d}.npy"

    @property
    def archive(self) -> epath.Path:
        """The .npz file of all images."""
        return self.folder / "samples.npz"

    def has_shard(self, index: int) -> bool:
        """Returns whether a shard is complete."""
        if self.form == "png":
            return self._size(self.shard_folder(index)) is not None
        if self.form == "npz":
            return self.archive.exists() or self.shard_array(index).exists()
        return self.shard_writer(index).report is not None

    @property
    def _stored(self) -> dict[str, Any]:
        stored = read_json(self._file)
        kinds = {"order": dict, "done": bool} | ({"sizes": dict} if "sizes" in stored else {})
        if any(not isinstance(stored.get(name), kind) for name, kind in kinds.items()):
            raise VqbeamError(f"{self._file} is not as vqbeam writes it; give another --output")
        return stored

    @property
    def _file(self) -> epath.Path:
        return self.folder / _FILE


_TITLE = "generate"
_run = Shared()


class GeneratedShard(NamedTuple):
    """A complete shard: its job, its index and, for TFRecords, its report."""

    job: GenerateJob
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
    """Samples images shard by shard; returns a line about the result.

    After a call was killed, the same call samples the missing shards.

    Args:
        run_dir: The run's folder.
        output: The folder to write: a folder of PNGs for each shard, an archive `samples.npz`, or a
            TFDS dataset.
        form: "png", "npz" or "tfrecord".
        labels: See `Run.sample`.
        shard_images: Images in a shard, rounded up to full batches.
        beam_args: Beam's own options.
        **settings: `num`, the number of images; `seed`, for which image i is the same as that of
            `sample`; and other fields of SampleConfig.

    Returns:
        A line about the result.

    Raises:
        VqbeamError: The run has no trained prior, a setting or label is out of range, the folder
            holds other images or another command is running in it, or workers elsewhere could not
            read a path.
    """
    if is_dataflow(beam_args):
        check_shared({"DIR": run_dir, "--output": output})
    run = Run(run_dir)
    seed = run.seed(settings.pop("seed", None))
    chosen = run.settings(**settings)
    chosen = chosen.with_at_most(chosen.num)
    labels_for(labels, run.prior_labels, 1)  # raises an error for an unknown label
    job = GenerateJob(
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
    with locked(job.folder, "--output"):
        job.bind_folder()
        done = job.is_done() and all(map(job.has_shard, range(job.shards)))
        if not done:
            job.begin_again()
            with if_removed(job.exists, job.folder):
                run_pipeline(beam_args, lambda pipeline: pipeline | GenerateImages(job))
    kind = {"png": "PNGs by shard", "npz": "samples.npz", "tfrecord": "a TFDS dataset"}[form]
    return f"{chosen.num:,} images{' (done already)' if done else ''}, {kind}: {output}"


class GenerateImages(beam.PTransform):
    """From a pipeline to the folder of a job, once all its images are there."""

    def __init__(self, job: GenerateJob):
        super().__init__()
        self.job = job

    def expand(self, pipeline):
        """Builds the steps."""
        return (
            pipeline
            | beam.Create([self.job])
            | "ListShards" >> beam.FlatMap(_shards)
            | beam.Reshuffle()
            | "GenerateShard" >> beam.MapTuple(generate_shard)
            | beam.combiners.ToList()
            | "FinishImages" >> beam.Map(finish_images)
        )


def _shards(job: GenerateJob) -> Iterator[tuple[GenerateJob, int]]:
    for index in range(job.shards):
        yield job, index


def generate_shard(job: GenerateJob, index: int) -> GeneratedShard:
    """Returns a shard, sampled and written now unless an earlier attempt has written it."""
    first = index * job.shard_images
    num = min(job.shard_images, job.settings.num - first)
    report, drawn = None, 0

    def moved(count):
        nonlocal drawn
        advance(_TITLE, min(count, num) - drawn, job.settings.num)
        drawn = min(count, num)

    def draw() -> Samples:
        run = _load_run(job)
        rows = labels_for(job.labels, run.prior_labels, num, first)
        return run.sample_rows(rows, job.seed, job.settings, first, moved)

    if job.form == "tfrecord":
        writer = job.shard_writer(index)
        if writer.report is None:
            with writer:
                for record in _records(draw()):
                    writer.write(record)
        report = writer.report
    elif not job.has_shard(index):
        _write_files(job, index, draw())
    moved(num)  # in case an earlier attempt has written the shard
    Metrics.counter("vqbeam", "images_generated").inc(num)
    return GeneratedShard(job, index, report)


def _write_files(job: GenerateJob, index: int, samples: Samples) -> None:
    if job.form == "npz":
        pixels = io.BytesIO()
        np.save(pixels, samples.images)
        write_bytes(job.shard_array(index), pixels.getvalue())
        return
    folder = job.shard_folder(index)
    folder.rmtree(missing_ok=True)  # a killed attempt may have left half of a picture
    write_samples(samples, folder)


def _records(samples: Samples) -> Iterator[bytes]:
    for row, image in enumerate(samples.images):
        example = {"image": encode_png(image), "key": f"{samples.first + row:05d}"}
        if samples.labels.ndim == 2:
            example["attributes"] = samples.labels[row].astype(np.uint8)
        elif samples.names:
            example["label"] = samples.labels[row]
        yield serialize(example)


def finish_images(shards: Sequence[GeneratedShard]) -> str:
    """Finishes the job, with the metadata of a TFDS dataset for TFRecords; returns its folder."""
    job = shards[0].job
    if job.is_done():
        return job.output  # a runner may repeat a finished step
    if job.form == "tfrecord":
        run = Run(job.run)
        write_dataset_metadata(
            job.folder,
            [shard.report for shard in shards],
            image_features(run.config.image_shape, run.prior_labels),
            version=IMAGES_VERSION,
            description=f"Images sampled by vqbeam: {json.dumps(job.facts)}",
        )
    if job.form == "npz":
        _write_archive(job)
    job.finish()
    keep = [*matching(job.folder, "[!.]*"), job.folder / LOCK_FILE]
    remove_leftovers(job.folder, keep, job.fingerprint)
    return job.output


def _write_archive(job: GenerateJob) -> None:
    """Writes all images as `arr_0` and their labels, if any, as `arr_1`, one shard at a time.

    These are the names that common evaluation programs read.
    """
    run, num = Run(job.run), job.settings.num
    header = {"descr": "|u1", "fortran_order": False, "shape": (num, *run.config.image_shape)}
    temporary = job.folder / ".samples.npz"
    with temporary.open("wb") as file, zipfile.ZipFile(file, "w") as archive:
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as images:
            np.lib.format.write_array_header_1_0(images, header)
            for index in range(job.shards):
                pixels = io.BytesIO(job.shard_array(index).read_bytes())
                images.write(np.load(pixels).tobytes())
        if run.prior_labels.names:
            with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as labels:
                np.save(labels, labels_for(job.labels, run.prior_labels, num))
    temporary.replace(job.archive)


def load_run(path: str, checkpoint: str, mend: str) -> Run:
    """Returns a run with its models, which each process loads once.

    Args:
        path: The run's folder.
        checkpoint: The fingerprint of the expected models, from `Run.checkpoint`.
        mend: What to do if the run now has other models, for the error message.

    Raises:
        VqbeamError: The run now has other models.
    """

    def load():
        run = Run(path)
        if run.checkpoint != checkpoint:
            raise VqbeamError(f"{path} was trained again while images were sampled from it; {mend}")
        return run

    return _run.acquire(load, tag=f"{path} {checkpoint}")


def _load_run(job: GenerateJob) -> Run:
    mend = f"delete {job.folder} and run the same command again"
    return load_run(job.run, job.checkpoint, mend)
