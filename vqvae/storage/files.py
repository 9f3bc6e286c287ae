"""Files on this machine or in a bucket: written whole or not at all, and looked at."""

import fnmatch
import json
import os
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from etils import epath

from vqbeam.configs import VqbeamError


def write_bytes(path: epath.Path, data: bytes) -> None:
    """Writes a file to a temporary name and renames it, so that no reader sees half of it."""
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}"
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: epath.Path, value: Any) -> None:
    """Writes JSON to a temporary name and renames it, so that no reader sees half a file."""
    write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def read_json(path: epath.Path) -> Any:
    """Returns what a file holds that is vqbeam's own.

    Raises:
        VqbeamError: It is not JSON.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise VqbeamError(
            f"{path} is not valid JSON ({error}): it was changed by hand, or is damaged; put it "
            "back, or delete it"
        ) from error


def size(path: epath.Path) -> int | None:
    """Returns the bytes of a file, or None where it is missing."""
    try:
        # What epath asks of a local file has its owner's name in it, which may not be there.
        return os.stat(path).st_size if is_local(path) else path.stat().length
    except (FileNotFoundError, NotADirectoryError):
        return None


def sizes(paths: Sequence[epath.Path]) -> list[int | None]:
    """Returns the bytes of each file, asked of many at once: in a bucket each takes a while."""
    with ThreadPoolExecutor(32) as pool:
        return list(pool.map(size, paths))


def modified(path: epath.Path) -> float:
    """Returns when a file was changed, in seconds, by the clock of its file system."""
    return os.stat(path).st_mtime if is_local(path) else path.stat().mtime


def matching(folder: epath.Path, pattern: str) -> list[epath.Path]:
    """Returns what lies in a folder and has a name like `*.json`, sorted; nothing, of no folder.

    The pattern is of names alone: `glob` would take `[1]` in the folder's own for one.
    """
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if fnmatch.fnmatchcase(path.name, pattern))


def is_local(path: epath.Path) -> bool:
    """Tells whether a path is of this machine, and not of a bucket."""
    return "://" not in os.fspath(path)
