"""The stage `prepare`: from a source of images to a TFDS dataset of uint8 images."""

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from apache_beam.metrics import Metrics
from etils import epath

from vqbeam.configs import Config, DataConfig, VqbeamError
from vqbeam.pipelines.beam import Gathered, ShardedStage, advance
from vqbeam.pipelines.sources import Source, Unit, open_source
from vqbeam.pipelines.sources.images import ImageError, encode_png
from vqbeam.pipelines.stages.shards import (
    ShardReport,
    ShardWriter,
    remove_leftovers,
    write_dataset_metadata,
)
from vqbeam.vqvae.storage.files import read_json, write_bytes, write_json
from vqbeam.vqvae.storage.labels import NO_CLASS, Label, Labels
from vqbeam.vqvae.storage.records import IMAGES_VERSION, image_features, serialize
from vqbeam.vqvae.storage.run_folder import RunFolder

STAGE = "prepare"
DEAD_LETTERS = "dead_letters.jsonl"
# File with `Source.left_out`, from the worker that plans the stage to the one that finishes it.
_LEFT_OUT = ".left_out"


class PrepareImages(ShardedStage):
    """Prepares the images of a run; takes and returns the path of the run."""

    def __init__(self):
        super().__init__(
            STAGE, plan=plan_units, write=prepare_shard, add=add_facts, finish=finish_images
        )


def plan_units(run_path: str) -> Iterator[tuple[str, Unit]]:
    """Starts the stage and yields its units of work."""
    run = RunFolder(run_path)
    data = run.load_config().data
    source = open_source(data)
    units = source.plan()
    run.begin(STAGE)  # only now, since planning fails if the source is gone
    if all(unit.shard.split == "train" for unit in units):
        raise VqbeamError(f"{data.source} has no image to hold out; set data.validation_share")
    write_json(run.folder(STAGE) / _LEFT_OUT, {what: n for what, n in source.left_out.items() if n})
    for unit in units:
        yield run_path, unit


def prepare_shard(run_path: str, unit: Unit) -> tuple[str, ShardReport]:
    """Decodes the images of one unit and writes them as one shard of `DIR/images`."""
    run = RunFolder(run_path)
    source = open_source(run.load_config().data)
    # Files and classes may change between two attempts, so an earlier shard of this name may hold
    # other images.
    content = hashlib.sha256(repr((unit.images, unit.labels)).encode()).hexdigest()
    writer = ShardWriter(run.folder(STAGE), run.fingerprint(STAGE), unit.shard, content)
    if writer.report and not was_mended(writer.report.facts["failures"], unit, source):
        advance(STAGE, len(unit.images), unit.total)
    else:
        with writer:
            writer.facts |= _write_images(source, unit, writer.write)
    report = writer.report
    Metrics.counter("vqbeam", "images_prepared").inc(report.records)
    Metrics.counter("vqbeam", "images_failed").inc(len(report.facts["failures"]))
    return run_path, report


def _write_images(source: Source, unit: Unit, write: Callable[[bytes], None]) -> dict[str, Any]:
    """Writes the images of a unit; returns failures, notes, labels and statistics."""
    statistics, failures, notes = _Statistics(), [], []
    for key, label, value, problem, said in source.convert(unit, _with_png):
        advance(STAGE, 1, unit.total)
        if problem:
            failures.append({"key": key, "reason": problem})
            continue
        notes += [{"key": key, "reason": reason, "kept": True} for reason in said]
        image, png = value
        if unit.shard.split == "train":
            statistics.add(image, label)
        write(serialize({"image": png, "key": key} | label_fields(label, unit.labels)))
    facts = {"failures": failures, "labels": unit.labels, "statistics": vars(statistics)}
    return facts | {"notes": notes}


def _with_png(image: np.ndarray) -> tuple[np.ndarray, bytes]:
    return image, encode_png(image)


def add_facts(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Returns the combined facts of two groups of shards."""
    sums, theirs = dict(one["statistics"]), other["statistics"]
    for name in ("pixels", "pixel_sum", "square_sum"):
        sums[name] += theirs[name]
    sums["labels"] = Counter(sums["labels"]) + Counter(theirs["labels"])
    failures = one["failures"] + other["failures"]
    # Reports of earlier versions have no notes.
    notes = one.get("notes", []) + other.get("notes", [])
    return {"failures": failures, "labels": one["labels"], "statistics": sums, "notes": notes}


def finish_images(run_path: str, gathered: Gathered) -> str:
    """Finishes the dataset, with statistics and dead letters; returns the run's path.

    Raises:
        VqbeamError: More than `data.max_failed` of the images, or all of a split, could not be
            decoded.
    """
    run = RunFolder(run_path)
    if run.is_done(STAGE):
        return run_path  # a runner may repeat a finished step
    config = run.load_config()
    reports, facts = gathered
    failures, notes = facts["failures"], facts.get("notes", [])
    letters = write_dead_letters(run.folder(STAGE), failures + notes)
    left_out = run.folder(STAGE) / _LEFT_OUT
    total = sum(report.records for report in reports) + len(failures)
    check_failures(failures, total, config.data, letters)
    _check_splits(reports, config, letters)
    names, kind = facts["labels"]
    labels = Labels(tuple(names), kind)
    if kind == "classes" and names and set(facts["statistics"]["labels"]) == {str(NO_CLASS)}:
        raise VqbeamError(
            f"no training image of {config.data.source} has a class; set --data.label-key none"
        )
    files, counts = write_dataset_metadata(
        run.folder(STAGE),
        reports,
        image_features(config.image_shape, labels),
        version=IMAGES_VERSION,
        description=f"Images of {config.data.source}, prepared by vqbeam.",
    )
    run.finish(
        STAGE,
        [*files, letters],
        source=config.data.source,
        counts=counts,
        failed=len(failures),
        left_out=read_json(left_out) if left_out.exists() else {},
        label_names=labels.names,
        label_kind=labels.kind,
        statistics=_scaled(facts["statistics"]),
        **({"noted": len(notes)} if notes else {}),
    )
    remove_leftovers(run.folder(STAGE), [*files, letters], run.fingerprint(STAGE))
    return run_path


def was_mended(failures: Sequence[dict], unit: Unit, source: Source) -> bool:
    """Returns whether an image of a unit can now be decoded that an earlier attempt could not."""
    failed = {failure["key"] for failure in failures}
    if not failed or not source.may_change:
        return False
    keys = source.keys(unit.shard.split, unit.images)
    images = [image for key, image in zip(keys, unit.images, strict=True) if key in failed]
    for raw in source.read(unit._replace(images=images)):
        with contextlib.suppress(ImageError):
            source.decode(raw)
            return True
    return False


def label_fields(label: Label, labels: Labels) -> dict[str, Any]:
    """Returns the features of a record for the label of its image; none without labels."""
    if labels.kind == "attributes":
        return {"attributes": np.asarray(label, np.uint8)}
    return {"label": label} if labels.names else {}


def write_dead_letters(folder: epath.Path, failures: Sequence[dict]) -> epath.Path:
    """Writes the list of images with problems; returns its path."""
    # Sorted, so that it does not depend on the order in which workers finish.
    ordered = sorted(failures, key=lambda failure: failure["key"])
    lines = [json.dumps(failure, ensure_ascii=False) + "\n" for failure in ordered]
    letters = folder / DEAD_LETTERS
    write_bytes(letters, "".join(lines).encode())
    return letters


def check_failures(failures: Sequence[dict], total: int, data: DataConfig, letters) -> None:
    """Raises a VqbeamError if more images could not be decoded than `data.max_failed` allows.

    Args:
        failures: The images that could not be decoded, with the reasons.
        total: The total number of images.
        data: The section that sets the limit.
        letters: The file that lists the failures.
    """
    if len(failures) > data.max_failed * total:
        first = min(failures, key=lambda failure: failure["key"])
        raise VqbeamError(
            f"{len(failures)} of {total} images could not be decoded, more than --data.max-failed "
            f"({100 * data.max_failed:g}%) allows; fix them, or allow more, and run it "
            f"again; the first is {first['key']} ({first['reason']}), all are in {letters}"
        )


def _check_splits(reports: Sequence[ShardReport], config: Config, letters) -> None:
    for split, purpose in (("train", "train on"), ("validation", "hold out")):
        if not any(report.records for report in reports if report.shard.split == split):
            raise VqbeamError(
                f"{config.data.source} has no image to {purpose} that could be decoded; "
                f"the reasons are in {letters}"
            )


class _Statistics:
    """Sums over the training images of a shard; integers, so that the order does not matter."""

    def __init__(self):
        self.pixels = 0
        self.pixel_sum = 0
        self.square_sum = 0
        self.labels: dict[str, int] = {}

    def add(self, image: np.ndarray, label: int | Sequence[int]) -> None:
        wide = image.astype(np.int64)
        self.pixels += wide.size
        self.pixel_sum += int(wide.sum())
        self.square_sum += int(np.square(wide).sum())
        for one in [label] if isinstance(label, int) else np.flatnonzero(label):
            self.labels[str(one)] = self.labels.get(str(one), 0) + 1


def _scaled(sums: dict[str, Any]) -> dict[str, Any]:
    """Returns mean and variance of the training pixels in [−1, 1], and the images per label."""
    mean = sums["pixel_sum"] / sums["pixels"]
    variance = sums["square_sum"] / sums["pixels"] - mean**2
    labels = sums["labels"]
    return {
        "mean": mean / 127.5 - 1,
        # A dataset of a single colour has no variance.
        "variance": variance / 127.5**2 or 1.0,
        "images_per_label": {label: labels[label] for label in sorted(labels, key=int)},
    }
