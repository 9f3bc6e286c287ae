"""Stage 1 of the pipeline: any source of images to a TFDS dataset of uint8 images."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import apache_beam as beam
import numpy as np
from apache_beam.metrics import Metrics

from configs import Config, VqbeamError
from pipelines.images import ImageError, decode_image, encode_png
from pipelines.progress import advance
from pipelines.shards import (
    ShardReport,
    remove_leftovers,
    write_dataset_metadata,
    write_shard_once,
)
from pipelines.sources import RawImage, Unit, plan, read_unit
from vqvae.labels import Labels
from vqvae.records import IMAGES_VERSION, image_features, serialize
from vqvae.run_folder import RunFolder, write_bytes

STAGE = "prepare"
DEAD_LETTERS = "dead_letters.jsonl"


class PrepareImages(beam.PTransform):
    """From the path of a run to the same path, once its images are prepared.

    Shards are shuffled as units of work, never as pixels: each is read, decoded and written by one
    worker.
    """

    def expand(self, runs):
        """Builds the steps."""
        return (
            runs
            | "Plan" >> beam.FlatMap(_plan_units)
            | beam.Reshuffle()
            | "PrepareShard" >> beam.MapTuple(prepare_shard)
            | beam.combiners.ToList()
            | "FinishImages" >> beam.Map(finish_images)
        )


def _plan_units(run_path: str) -> Iterator[tuple[str, Unit]]:
    run = RunFolder(run_path)
    run.begin(STAGE)
    for unit in plan(run.load_config().data):
        yield run_path, unit


def prepare_shard(run_path: str, unit: Unit) -> tuple[str, ShardReport]:
    """Decodes the images of one unit and writes them as one shard of `DIR/images`."""
    run = RunFolder(run_path)
    config = run.load_config()
    unseen = len(unit.images)

    def records(facts):
        nonlocal unseen
        statistics = _Statistics()
        failures = []
        for raw in read_unit(config.data, unit):
            unseen -= 1
            advance(STAGE, 1, unit.total)
            try:
                image = _decode(raw, config)
            except ImageError as error:
                failures.append({"key": raw.key, "reason": str(error)})
                continue
            statistics.add(image, raw.label)
            example = {"image": encode_png(image), "key": raw.key}
            yield serialize(example | _label(raw, unit))
        facts |= {
            "failures": failures,
            "labels": unit.labels,
            "statistics": vars(statistics),
        }

    # Files may come and go between two attempts, so that a shard of that name holds others.
    content = hashlib.sha256(repr(unit.images).encode()).hexdigest()
    folder, fingerprint = run.folder(STAGE), run.fingerprint(STAGE)
    report = write_shard_once(folder, fingerprint, unit.shard, records, content=content)
    advance(STAGE, unseen, unit.total)  # those that an earlier attempt has prepared
    Metrics.counter("vqbeam", "images_prepared").inc(report.records)
    Metrics.counter("vqbeam", "images_failed").inc(len(report.facts["failures"]))
    return run_path, report


def finish_images(shards: Sequence[tuple[str, ShardReport]]) -> str:
    """Makes a dataset of the shards, with statistics and dead letters; returns the run's path.

    Raises:
        VqbeamError: More than `data.max_failed` of the images could not be decoded, or all of a
            split.
    """
    run = RunFolder(shards[0][0])
    if run.is_done(STAGE):
        return str(run.root)  # a runner that does the next step again may do this one as well
    config = run.load_config()
    # Workers end in any order, and the dead letters are the same.
    reports = sorted((report for _, report in shards), key=lambda report: report.shard)
    failures = [failure for report in reports for failure in report.facts["failures"]]
    letters = run.folder(STAGE) / DEAD_LETTERS
    lines = [json.dumps(failure, ensure_ascii=False) + "\n" for failure in failures]
    write_bytes(letters, "".join(lines).encode())
    try:
        _check_failures(failures, reports, config, letters)
    except VqbeamError:
        # The next attempt reads every image again, for some may have been mended.
        remove_leftovers(run.folder(STAGE), [letters])
        raise
    names, kind = reports[0].facts["labels"]
    labels = Labels(tuple(names), kind)
    files, counts = write_dataset_metadata(
        run.folder(STAGE),
        reports,
        image_features(config.image_shape, labels),
        version=IMAGES_VERSION,
        description=f"Images of {config.data.source}, prepared by vqbeam.",
    )
    files.append(letters)
    remove_leftovers(run.folder(STAGE), files)
    run.finish(
        STAGE,
        files,
        source=config.data.source,
        counts=counts,
        failed=len(failures),
        label_names=labels.names,
        label_kind=labels.kind,
        statistics=_train_statistics(reports, config),
    )
    return str(run.root)


def _decode(raw: RawImage, config: Config) -> np.ndarray:
    return decode_image(
        raw.data,
        height=config.data.height,
        width=config.data.width,
        channels=config.data.channels,
        fit=config.data.fit,
    )


def _label(raw: RawImage, unit: Unit) -> dict[str, Any]:
    if unit.labels.kind == "attributes":
        return {"attributes": np.asarray(raw.label, np.uint8)}
    return {"label": raw.label} if unit.labels.names else {}


def _check_failures(
    failures: Sequence[dict], reports: Sequence[ShardReport], config: Config, letters
) -> None:
    total = sum(report.records for report in reports) + len(failures)
    if len(failures) > config.data.max_failed * total:
        first = failures[0]
        raise VqbeamError(
            f"{len(failures)} of {total} images could not be decoded, more than data.max_failed "
            f"({100 * config.data.max_failed:g}%) allows; the first is {first['key']} "
            f"({first['reason']}), all are in {letters}"
        )
    for split, purpose in (("train", "train on"), ("validation", "hold out")):
        if not any(report.records for report in reports if report.shard.split == split):
            raise VqbeamError(
                f"{config.data.source} has no image to {purpose} that could be decoded; "
                f"the reasons are in {letters}"
            )


class _Statistics:
    """Sums over the images of a shard, as integers, so that their order does not matter."""

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


def _train_statistics(reports: Sequence[ShardReport], config: Config) -> dict:
    """Returns mean and variance of the training pixels on [−1, 1], and images of each label."""
    shards = [r.facts["statistics"] for r in reports if r.shard.split == "train"]
    pixels = sum(shard["pixels"] for shard in shards)
    mean = sum(shard["pixel_sum"] for shard in shards) / pixels
    variance = sum(shard["square_sum"] for shard in shards) / pixels - mean**2
    labels = sum((Counter(shard["labels"]) for shard in shards), Counter())
    return {
        "mean": mean / 127.5 - 1,
        # A dataset of one flat colour has no variance to measure errors in.
        "variance": variance / 127.5**2 or 1.0,
        "images_per_label": {label: labels[label] for label in sorted(labels, key=int)},
    }
