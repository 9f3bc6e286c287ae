"""Atomic writes, reads and listings of files, local or in a bucket."""

import contextlib
import errno
import fnmatch
import functools
import json
import os
import stat
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from etils import epath

from vqbeam.configs import VqbeamError

# Limit for files that are read as a whole, such as images and vqbeam's JSON; none is that large.
MOST_BYTES = 2**30
_SECONDS_TO_BE_SLOW = 30.0


def write_bytes(path: epath.Path, data: bytes) -> None:
    """Writes a file atomically: under a temporary name, which is then renamed."""
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}"
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_folder(folder: epath.Path, write: Callable[[epath.Path], None]) -> None:
    """Writes a folder as a whole: under a temporary name, which is then renamed.

    Args:
        folder: The folder; it must be empty or not exist.
        write: Function that takes a folder, creates it and writes its files.
    """
    temporary = folder.parent / f".{folder.name}.{uuid.uuid4().hex}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        write(temporary)
        if folder.exists():
            folder.rmdir()  # it is empty
        temporary.rename(folder)
    except BaseException:
        temporary.rmtree(missing_ok=True)
        raise


def write_json(path: epath.Path, value: Any) -> None:
    """Writes a value as JSON atomically."""
    write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def check_regular(path: epath.Path) -> None:
    """Raises an OSError unless a file is regular: reading a pipe or a device may never end."""
    if is_local(path) and not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))


def read_regular(path: epath.Path, any_size: bool = False) -> bytes:
    """Returns the content of a file that other programs may have put there.

    Args:
        path: The file.
        any_size: Whether it may have more than `MOST_BYTES`, as the checkpoint of a large model.

    Raises:
        OSError: It cannot be read, is not a regular file, or is too large.
    """
    with named_if_slow(path):
        check_regular(path)
        if not any_size and is_local(path) and os.stat(path).st_size > MOST_BYTES:
            raise OSError(errno.EFBIG, f"larger than {MOST_BYTES / 2**20:.0f} MiB", os.fspath(path))
        return path.read_bytes()


@contextlib.contextmanager
def named_if_slow(path: epath.Path) -> Iterator[None]:
    """Prints the path of a file or folder if the block, which reads it, takes over 30 seconds.

    A network file system may never answer.
    """
    with _starting:
        _watch(os.getpid())
    key = object()
    _being_read[key] = os.fspath(path), time.monotonic()
    try:
        yield
    finally:
        del _being_read[key]


_being_read: dict[object, tuple[str, float]] = {}
_starting = threading.Lock()


@functools.cache
def _watch(process: int) -> None:
    """Starts the thread that reports slow reads, once in each process."""
    threading.Thread(
        target=_name_what_is_slow, name=f"slow reads of {process}", daemon=True
    ).start()


def _name_what_is_slow() -> None:
    told: set[object] = set()
    while True:
        time.sleep(_SECONDS_TO_BE_SLOW / 10)
        found = dict(_being_read)
        told.intersection_update(found)
        for key, (path, begun) in found.items():
            seconds = time.monotonic() - begun
            if key not in told and seconds > _SECONDS_TO_BE_SLOW:
                told.add(key)
                print(
                    f"{path!a} is still being read after {seconds:.0f} seconds; if it is on a "
                    "network, see whether that answers",
                    file=sys.stderr,
                    flush=True,
                )


def read_json(path: epath.Path, kind: type = dict) -> Any:
    """Returns the contents of a JSON file written by vqbeam.

    Raises:
        VqbeamError: The file is not valid JSON, or does not hold a value of type `kind`.
    """
    try:
        found = json.loads(read_regular(path))
    except (ValueError, RecursionError) as error:
        raise VqbeamError(
            f"{path} is not valid JSON ({error}): it was changed by hand, or is damaged; restore "
            "it, or delete it"
        ) from error
    if not isinstance(found, kind):
        raise VqbeamError(
            f"{path} is not as vqbeam writes it: it holds a {type(found).__name__}; restore it, "
            "or delete it"
        )
    return found


def size(path: epath.Path) -> int | None:
    """Returns the size of a file in bytes, or None if it is missing or a broken link."""
    try:
        with named_if_slow(path):
            # For local files, epath's stat also looks up the owner's name, which may not exist.
            return os.stat(path).st_size if is_local(path) else path.stat().length
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return None


def sizes(paths: Sequence[epath.Path]) -> list[int | None]:
    """Returns the size of each file in bytes (see `size`), in parallel since buckets are slow."""
    with ThreadPoolExecutor(32) as pool:
        return list(pool.map(size, paths))


def modified(path: epath.Path) -> float:
    """Returns a file's modification time in seconds, by the clock of its file system."""
    return os.stat(path).st_mtime if is_local(path) else path.stat().mtime


def matching(folder: epath.Path, pattern: str) -> list[epath.Path]:
    """Returns the sorted paths in a folder whose names match a pattern such as `*.json`.

    Returns an empty list if there is no such folder. Unlike `glob`, special characters such as
    `[1]` in the folder's own name have no effect.
    """
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if fnmatch.fnmatchcase(path.name, pattern))


def remove(path: epath.Path) -> None:
    """Removes a file, if it is there, or a folder with all that is in it."""
    path.rmtree() if path.is_dir() else path.unlink(missing_ok=True)


def is_local(path: epath.Path) -> bool:
    """Returns whether a path is local, that is, not in a bucket."""
    return "://" not in os.fspath(path)
