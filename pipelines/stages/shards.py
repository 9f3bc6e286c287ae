"""Datasets written shard by shard, by workers that may be killed or may repeat their work."""

import contextlib
import ctypes
import dataclasses
import functools
import json
import os
import re
from collections.abc import Sequence
from typing import Any

from etils import epath

from vqbeam.configs import VqbeamError
from vqbeam.vqvae.storage.files import remove, size, write_json
from vqbeam.vqvae.storage.records import Shard, open_shard, write_metadata

_M_ARENA_MAX = -8  # of malloc.h


@dataclasses.dataclass(frozen=True)
class ShardReport:
    """The report of a complete shard: its records, its size, and facts collected in writing it.

    `content` is a hash of its inputs; the report is valid only for this content.
    """

    shard: Shard
    content: str
    records: int
    bytes: int
    facts: dict[str, Any]


class ShardWriter:
    """Writes a shard of a dataset, unless an earlier attempt has written it.

        writer = ShardWriter(folder, fingerprint, shard)
        if writer.report is None:
            with writer:
                writer.write(record)
                writer.facts["seen"] = 1
        return writer.report

    The report is written after the shard, and both are renamed into place. So a worker killed at
    any moment leaves either a shard with its report, or work that is done again.

    Args:
        folder: The folder of the dataset.
        fingerprint: A hash of the inputs of the dataset; shards of other inputs are written again.
        shard: The shard.
        content: A hash of the shard's own inputs, if the fingerprint does not cover them.

    Attributes:
        report: The report of the shard, once it is written; available from the start if an earlier
            attempt wrote it.
        facts: Facts collected while writing, which become part of the report.
    """

    def __init__(self, folder: epath.Path, fingerprint: str, shard: Shard, content: str = ""):
        _keep_memory_flat()
        self.shard, self.content = shard, content
        self._path = folder / shard.filename
        self._report_path = folder / f".reports-{fingerprint}" / f"{shard.filename}.json"
        earlier = _earlier(self._report_path)
        fits = earlier and size(self._path) == earlier.bytes and earlier.content == content
        self.report = earlier if fits else None

    def __enter__(self) -> "ShardWriter":
        self.facts: dict[str, Any] = {}
        self._records = 0
        self._report_path.parent.mkdir(parents=True, exist_ok=True)
        self._open = open_shard(self._path)
        self._file = self._open.__enter__()
        return self

    def write(self, record: bytes) -> None:
        """Adds a serialized record."""
        self._file.write(record)
        self._records += 1

    def __exit__(self, *error) -> None:
        self._open.__exit__(*error)
        if error[0] is None:
            self.report = ShardReport(
                self.shard, self.content, self._records, size(self._path), self.facts
            )
            write_json(self._report_path, dataclasses.asdict(self.report))


@functools.cache
def _keep_memory_flat() -> None:
    """Limits glibc's memory arenas to one per core, instead of eight.

    TensorFlow reads each shard in new threads. Each thread takes another arena, which keeps its
    memory: 100 MB over a million images.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # if there is no glibc
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, max(2, os.cpu_count() or 1))


def write_dataset_metadata(
    folder: epath.Path,
    reports: Sequence[ShardReport],
    features: Any,
    *,
    version: str,
    description: str,
) -> tuple[list[epath.Path], dict[str, int]]:
    """Writes the metadata that turns complete shards into a TFDS dataset.

    Returns:
        All files of the dataset, and the number of records in each split.

    Raises:
        VqbeamError: A shard was not reported.
    """
    # Sorted, so that the result does not depend on the order in which workers finish.
    reports = sorted(reports, key=lambda report: report.shard)
    splits: dict[str, list[ShardReport]] = {}
    for report in reports:
        splits.setdefault(report.shard.split, []).append(report)
    for split, of_split in splits.items():
        found = [report.shard.index for report in of_split]
        count = of_split[0].shard.count
        if found != list(range(count)):
            missing = count - len(set(found))
            state = f"lacks {missing} of {count} shards" if missing else "has a shard twice"
            raise VqbeamError(f"{folder} {state} of split {split}; run the same command again")
    sizes = {s: [(r.records, r.bytes) for r in of_split] for s, of_split in splits.items()}
    files = write_metadata(
        folder,
        features,
        sizes,
        name=reports[0].shard.dataset,
        version=version,
        description=description,
    )
    files += [folder / report.shard.filename for report in reports]
    counts = {split: sum(r.records for r in of_split) for split, of_split in splits.items()}
    return files, counts


# What attempts leave: reports, shards, files that were not renamed yet, and the images of an
# archive that is not written yet.
_LEFT = re.compile(
    r"\.reports-[0-9a-f]{16}|.+\.tfrecord-\d{5,}(-of-\d{5,})?|\..+\.[0-9a-f]{32}"
    r"|\.[0-9a-f]{16}-\d{5,}-of-\d{5,}\.npy|\.left_out"
)


def remove_leftovers(folder: epath.Path, keep: Sequence[epath.Path], fingerprint: str) -> None:
    """Removes from a folder of shards what earlier attempts or other inputs have left there.

    To be called after the manifest is written: until then, a restart needs all reports. The reports
    of the current shards stay, so that a shard that is lost later can be rewritten alone.

    Args:
        folder: The folder.
        keep: Files that stay.
        fingerprint: The fingerprint of the current shards.
    """
    kept = {path.name for path in keep} | {f".reports-{fingerprint}"}
    for path in folder.iterdir():
        if path.name not in kept and _LEFT.fullmatch(path.name):
            remove(path)


def _earlier(path: epath.Path) -> ShardReport | None:
    """Returns the report of an earlier attempt, or None if there is none or it is damaged."""
    try:
        values = json.loads(path.read_text())
        return ShardReport(**{**values, "shard": Shard(*values["shard"])})
    except (FileNotFoundError, ValueError, TypeError, KeyError):  # e.g. empty after a power failure
        return None
