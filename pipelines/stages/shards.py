"""Datasets written shard by shard, by workers that may die, repeat themselves or start again."""

import contextlib
import ctypes
import dataclasses
import functools
import json
import os
from collections.abc import Sequence
from typing import Any

from etils import epath

from vqbeam.configs import VqbeamError
from vqbeam.vqvae.storage.files import size, write_json
from vqbeam.vqvae.storage.records import Shard, open_shard, write_metadata
from vqbeam.vqvae.storage.run_folder import MANIFEST

_M_ARENA_MAX = -8  # of malloc.h


@dataclasses.dataclass(frozen=True)
class ShardReport:
    """What became of one shard: its records, its bytes, and what was seen while writing it.

    `content` says what it was made of; the report is worth nothing for a shard of other content.
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

    The report is written after the shard, and both are renamed into place: a worker killed at any
    moment leaves either a shard with its report or work to be done again.

    Args:
        folder: Gets the shard.
        fingerprint: Of all that the dataset is made from; shards of another are written anew.
        shard: Which one.
        content: Names what the shard is made of, where the fingerprint does not.

    Attributes:
        report: Of the shard, once it is written; from the start where an earlier attempt wrote it.
        facts: What was seen while writing; they become part of the report.
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
    """Has glibc keep free memory for as many threads as there are cores, not for eight times more.

    TensorFlow reads each shard in new threads. Each finds another place of its own, which keeps
    what it needed: 100 MB over a million images.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # no glibc
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, max(2, os.cpu_count() or 1))


def write_dataset_metadata(
    folder: epath.Path,
    reports: Sequence[ShardReport],
    features: Any,
    *,
    version: str,
    description: str,
) -> tuple[list[epath.Path], dict[str, int]]:
    """Makes a TFDS dataset of the shards that were reported.

    Returns:
        Every file of the dataset, and the number of records in each split.

    Raises:
        VqbeamError: A shard was not reported.
    """
    # Workers end in any order, and the result is the same.
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


def remove_leftovers(folder: epath.Path, keep: Sequence[epath.Path]) -> None:
    """Removes from a folder of shards the reports, and all that killed or older attempts left.

    After the manifest is written, and not before: until then the reports are what a worker that
    is killed goes on from.
    """
    kept = {path.name for path in keep} | {MANIFEST}
    for path in folder.iterdir():
        if path.name not in kept:
            path.rmtree() if path.is_dir() else path.unlink(missing_ok=True)


def _earlier(path: epath.Path) -> ShardReport | None:
    """Returns the report of an earlier attempt, or None where there is none that can be read."""
    try:
        values = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):  # emptied where the machine lost its power
        return None
    return ShardReport(**{**values, "shard": Shard(*values["shard"])})
