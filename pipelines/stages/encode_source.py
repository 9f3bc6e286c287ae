"""`vqbeam encode --model`: encodes any images with a trained VQ-VAE into a separate dataset.

    DIR/manifest.json       the model, and what each call has added
    DIR/codes-*             a TFDS dataset of code records; `model` is the start of the model's hash
    DIR/dead_letters.jsonl  images of the last call that could not be decoded

Each call adds shards for the images whose keys are not in the dataset yet. Its shards become part
of the dataset in the last step, which lists them in the manifest and in TFDS's metadata. So a
killed call has added nothing, and the same call resumes it.
"""

import dataclasses
import hashlib
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
import tensorflow_datasets as tfds
from apache_beam.metrics import Metrics
from etils import epath

from vqbeam.configs import DataConfig, VqbeamError
from vqbeam.pipelines.beam import Gathered, GatherReports, advance, run_pipeline
from vqbeam.pipelines.lock import LOCK_FILE, locked
from vqbeam.pipelines.paths import (
    absolute,
    check_shared,
    is_dataflow,
    source_paths,
    with_absolute_paths,
)
from vqbeam.pipelines.sources import Source, Unit, open_source
from vqbeam.pipelines.sources.source import Converted
from vqbeam.pipelines.stages.encode import DATASET, load_encoder, one_ahead
from vqbeam.pipelines.stages.prepare import (
    check_failures,
    label_fields,
    was_mended,
    write_dead_letters,
)
from vqbeam.pipelines.stages.shards import ShardReport, ShardWriter, remove_leftovers
from vqbeam.vqvae.fitting.devices import in_batches
from vqbeam.vqvae.layout import code_layout
from vqbeam.vqvae.storage.files import matching, read_json, sizes, write_json
from vqbeam.vqvae.storage.labels import NO_CLASS, Label, Labels
from vqbeam.vqvae.storage.records import (
    CODES_VERSION,
    GROWING,
    Shard,
    code_features,
    damaged_records,
    keys_in,
    open_shard,
    serialize,
    write_metadata,
)
from vqbeam.vqvae.storage.run_folder import HASH_DIGITS, MANIFEST, MODELS, RunFolder

_TITLE = "encode"


@dataclasses.dataclass(frozen=True)
class EncodeJob:
    """The job of one call: the model, the images and the folder.

    Attributes:
        run: The folder of the model's run.
        model: The hash of its VQ-VAE.
        output: The folder of the dataset.
        data: The source of the images, and the shape that the model takes.
        batch_size: Images encoded at once.
        earlier: Number of earlier calls that have added to the dataset.
    """

    run: str
    model: str
    output: str
    data: DataConfig
    batch_size: int
    earlier: int = 0

    @property
    def folder(self) -> epath.Path:
        """The folder of the dataset."""
        return epath.Path(self.output)

    @property
    def fingerprint(self) -> str:
        """A hash of everything that the contents of a shard depend on, except its images."""
        facts = dataclasses.asdict(self)
        facts["data"].pop("max_failed")  # it only decides whether the result is accepted
        del facts["run"], facts["output"]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def manifest(self) -> dict[str, Any]:
        """Returns the manifest of the dataset so far."""
        return read_json(self.folder / MANIFEST)

    def is_finished(self) -> bool:
        """Returns whether the call has finished, as when an engine repeats a step."""
        return len(self.manifest()["calls"]) > self.earlier

    def bind_folder(self) -> "EncodeJob":
        """Reserves the folder for codes of the model; returns the job with `earlier` set.

        Raises:
            VqbeamError: The folder has codes of another model or other contents, or is damaged.
        """
        if not (self.folder / MANIFEST).exists():
            if matching(self.folder, "[!.]*"):
                raise VqbeamError(f"{self.folder} is not empty; give another --output")
            nothing = {"label_names": [], "label_kind": "classes", "shards": {}, "calls": []}
            write_json(self.folder / MANIFEST, {"run": self.run, "model": self.model} | nothing)
        manifest = self.manifest()
        if manifest.get("model") != self.model:
            found = str(manifest.get("model", "no model"))[:HASH_DIGITS]
            raise VqbeamError(
                f"{self.folder} holds codes of {found}, and the VQ-VAE of {self.run} is "
                f"{self.model[:HASH_DIGITS]}; give another --output"
            )
        _empty_lost(self, manifest)
        return dataclasses.replace(self, earlier=len(manifest["calls"]))


class Addition(NamedTuple):
    """A unit of images to add as one shard.

    Attributes:
        unit: The unit; its labels are those of the source.
        labels: The labels of the dataset, with the classes of earlier calls first.
    """

    unit: Unit
    labels: Labels


def encode_source(run_dir: str, *, output: str, data: DataConfig, beam_args: Sequence[str]) -> str:
    """Adds the codes of the images of a source to a dataset, which it creates if needed.

    Args:
        run_dir: Folder of a run with a trained VQ-VAE.
        output: The folder of the dataset.
        data: The source; the shape of the images is that of the run.
        beam_args: Beam's own options.

    Returns:
        Lines about the result.

    Raises:
        VqbeamError: The run has no VQ-VAE, the folder has codes of another model or other contents,
            the source cannot be read, its labels do not fit those of the dataset, too many images
            could not be decoded, or workers elsewhere could not read a path.
    """
    run = RunFolder(run_dir, remember=True)
    run.require("train-vqvae", among=MODELS)
    config = run.load_config()
    data = with_absolute_paths(dataclasses.replace(data, **config.data.form))
    if is_dataflow(beam_args):
        check_shared({"--model": run_dir, "--output": output} | source_paths(data))
    source = open_source(data)
    source.check()
    model, size = run.result_hash("train-vqvae"), config.encode.batch_size
    job = EncodeJob(absolute(run_dir), model, absolute(output), data, size)
    with locked(job.folder, "--output"):
        job = job.bind_folder()
        source.download(beam_args)
        run_pipeline(beam_args, lambda pipeline: pipeline | EncodeSource(job))
    return _closing_lines(job)


class EncodeSource(beam.PTransform):
    """From a pipeline to the folder of a job, once the codes of all its images are there."""

    def __init__(self, job: EncodeJob):
        super().__init__()
        self.job = job

    def expand(self, pipeline):
        """Builds the steps."""
        return (
            pipeline
            | beam.Create([self.job])
            | "Plan" >> beam.FlatMap(plan_additions)
            | beam.Reshuffle()
            | "WriteShard" >> beam.MapTuple(encode_addition)
            # Global, so that there is a result even if there is nothing to add.
            | "GatherReports" >> beam.CombineGlobally(GatherReports(add_facts))
            | "Finish" >> beam.Map(finish_additions, job=self.job)
        )


def plan_additions(job: EncodeJob) -> Iterator[tuple[EncodeJob, Addition]]:
    """Yields units of the images whose keys are not in the dataset.

    Raises:
        VqbeamError: See `joined`.
    """
    if job.is_finished():
        return
    manifest, source = job.manifest(), open_source(job.data)
    splits, labels = source.listing()
    before = manifest["shards"]
    # Not from TFDS's metadata: a killed call may have updated it, but not the manifest.
    with damaged_records(job.folder):
        known = keys_in(list(_shard_sizes(job.folder, before))) if before else set()
    both = joined(Labels.of(manifest), labels, job.folder) if before else labels
    for split, images in splits.items():
        if known:
            keys = source.keys(split, images)
            pairs = zip(keys, images, strict=True)
            splits[split] = [image for key, image in pairs if key not in known]
    for unit in source.units(splits, labels):
        _, split, index, _ = unit.shard
        shard = Shard(DATASET, split, len(before.get(split, ())) + index, None)
        yield job, Addition(unit._replace(shard=shard), both)


def joined(before: Labels, labels: Labels, folder: epath.Path) -> Labels:
    """Returns the labels of a dataset after images with other labels are added to it.

    Its classes keep their numbers, and new ones follow.

    Raises:
        VqbeamError: The new labels are of another kind, or are other attributes.
    """
    classes = before.kind == labels.kind == "classes" and bool(before.names) == bool(labels.names)
    if not classes and before != labels:
        raise VqbeamError(
            f"{folder} has {_described(before)}, and the new images {_described(labels)}; give "
            "another --output"
        )
    new = [name for name in labels.names if name not in before.names]
    return Labels((*before.names, *new), before.kind)


def _described(labels: Labels) -> str:
    if not labels.names:
        return "no classes"
    shown = ", ".join(labels.names[:5]) + (", …" if len(labels.names) > 5 else "")
    return f"{len(labels.names)} {labels.kind} ({shown})"


def encode_addition(job: EncodeJob, addition: Addition) -> ShardReport:
    """Decodes and encodes the images of one unit and writes their codes as one shard."""
    unit, source = addition.unit, open_source(job.data)
    content = hashlib.sha256(repr((unit.images, unit.labels, addition.labels)).encode())
    writer = ShardWriter(job.folder, job.fingerprint, unit.shard, content.hexdigest())
    if writer.report and not was_mended(writer.report.facts["failures"], unit, source):
        advance(_TITLE, len(unit.images), unit.total)
    else:
        failures: list[dict] = []
        with writer:
            for images, codes in one_ahead(_encoded(job, source, unit, failures)):
                for image, of_image in zip(images, codes, strict=True):
                    label = _renumbered(image.label, unit.labels, addition.labels)
                    own = {"codes": of_image, "key": image.key, "model": job.model[:HASH_DIGITS]}
                    writer.write(serialize(own | label_fields(label, addition.labels)))
            writer.facts |= {"failures": failures, "labels": addition.labels}
    Metrics.counter("vqbeam", "images_encoded").inc(writer.report.records)
    Metrics.counter("vqbeam", "images_failed").inc(len(writer.report.facts["failures"]))
    return writer.report


def _encoded(
    job: EncodeJob, source: Source, unit: Unit, failures: list[dict]
) -> Iterator[tuple[list[Converted], np.ndarray]]:
    """Yields batches of images with their codes; adds undecodable images to `failures`."""
    encode = load_encoder(RunFolder(job.run), job.model)
    decoded = _decoded(source, unit, failures)
    while batch := list(itertools.islice(decoded, job.batch_size)):
        images = np.stack([image.value for image in batch])
        yield batch, in_batches(encode, images, job.batch_size)


def _decoded(source: Source, unit: Unit, failures: list[dict]) -> Iterator[Converted]:
    for image in source.convert(unit):
        advance(_TITLE, 1, unit.total)
        if image.problem:
            failures.append({"key": image.key, "reason": image.problem})
        else:
            yield image


def _renumbered(label: Label, own: Labels, both: Labels) -> Label:
    """Returns a label of a source with its number in the dataset."""
    if own == both or label == NO_CLASS:
        return label
    return both.names.index(own.names[label])


def add_facts(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Returns the combined facts of two groups of shards."""
    return {"failures": one["failures"] + other["failures"], "labels": one["labels"]}


def finish_additions(gathered: Gathered, job: EncodeJob) -> str:
    """Makes the new shards part of the dataset; returns its folder.

    Raises:
        VqbeamError: More than `data.max_failed` of the images could not be decoded.
    """
    if job.is_finished():
        return job.output
    manifest, reports = job.manifest(), sorted(gathered.reports, key=lambda r: r.shard)
    failures = gathered.facts["failures"] if reports else []
    letters = write_dead_letters(job.folder, failures)
    new, shards = sum(report.records for report in reports), dict(manifest["shards"])
    total = new + _records(shards) + len(failures)
    check_failures(failures, total, job.data, letters)
    if new:
        for report in reports:
            of_split = shards.get(report.shard.split, [])
            shards[report.shard.split] = [*of_split, [report.records, report.bytes]]
        names, kind = gathered.facts["labels"]
        manifest |= {"label_names": list(names), "label_kind": kind, "shards": shards}
        _write_metadata(job, manifest)
    call = {"source": job.data.source, "new": new, "failed": len(failures)}
    write_json(job.folder / MANIFEST, manifest | {"calls": [*manifest["calls"], call]})
    remove_leftovers(job.folder, _files(job.folder, shards), job.fingerprint)
    return job.output


def _write_metadata(job: EncodeJob, manifest: dict[str, Any]) -> None:
    layout = code_layout(RunFolder(job.run).load_config())
    features = code_features(layout, Labels.of(manifest))
    shards = manifest["shards"]
    # TFDS refuses files of unlisted splits, which a killed call may have left.
    for path in matching(job.folder, f"{DATASET}-*"):
        if path not in _files(job.folder, shards):
            path.unlink(missing_ok=True)
    write_metadata(
        job.folder,
        tfds.features.FeaturesDict({**features, "model": tfds.features.Text()}),
        shards,
        name=DATASET,
        version=CODES_VERSION,
        description=f"Codes by the VQ-VAE {job.model}: {layout.describe()}.",
        names=GROWING,
    )


def _files(folder: epath.Path, shards: dict[str, list]) -> list[epath.Path]:
    """Returns the files of a dataset."""
    own = [path for path in matching(folder, "[!.]*") if not path.name.startswith(f"{DATASET}-")]
    return [*own, *_shard_sizes(folder, shards), folder / LOCK_FILE]


def _shard_sizes(folder: epath.Path, shards: dict[str, list]) -> dict[epath.Path, int]:
    return {
        folder / Shard(DATASET, split, index, None).filename: size
        for split, of_split in shards.items()
        for index, (_, size) in enumerate(of_split)
    }


def _lost_shards(folder: epath.Path, shards: dict[str, list]) -> set[epath.Path]:
    """Returns the missing shards; raises a VqbeamError if any other has changed its size."""
    wanted, lost = _shard_sizes(folder, shards), set()
    for path, found in zip(wanted, sizes(list(wanted)), strict=True):
        if found is None:
            lost.add(path)
        elif found != wanted[path]:
            raise VqbeamError(
                f"{path} has {found} bytes, not {wanted[path]}; restore it, or delete it and run "
                "the same command to encode its images again"
            )
    return lost


def _empty_lost(job: EncodeJob, manifest: dict[str, Any]) -> None:
    """Replaces each lost shard with an empty one, so that its images count as new."""
    lost = _lost_shards(job.folder, manifest["shards"])
    if not lost:
        return
    for split, of_split in manifest["shards"].items():
        for index, (records, _) in enumerate(of_split):
            path = job.folder / Shard(DATASET, split, index, None).filename
            if path in lost:
                print(
                    f"{path} is missing: its {records} images count as new, and are encoded when "
                    "their source is given",
                    file=sys.stderr,
                )
                with open_shard(path):
                    of_split[index] = [0, 0]
    _write_metadata(job, manifest)
    write_json(job.folder / MANIFEST, manifest)


def _records(shards: dict[str, list]) -> int:
    return sum(records for of_split in shards.values() for records, _ in of_split)


def _closing_lines(job: EncodeJob) -> str:
    manifest = job.manifest()
    call, total = manifest["calls"][-1], _records(manifest["shards"])
    lines = [
        f"codes: {call['new']:,} new, {total - call['new']:,} there before, in {job.folder}",
        f"model: {job.model[:HASH_DIGITS]}, the VQ-VAE of {job.run}",
    ]
    if call["failed"]:
        images = f"{call['failed']} image{'s' if call['failed'] > 1 else ''}"
        lines.append(f"could not be decoded: {images}, listed in {job.folder}/dead_letters.jsonl")
    return "\n".join(lines)
