"""One command at a time in a folder."""

import contextlib
import errno
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

from etils import epath

from vqbeam.configs import VqbeamError
from vqbeam.vqvae.storage.files import is_local, modified, write_json

LOCK_FILE = ".lock.json"
# Errors of folders that cannot be created or written to.
_NOT_A_PLACE = {errno.EACCES, errno.EPERM, errno.EEXIST, errno.ENOTDIR, errno.EROFS}
_SECONDS_BETWEEN_SIGNS = 60
# For a command on another machine, about which nothing else is known.
_SECONDS_TO_BE_DEAD = 600
# Longer than it takes to write a lock: if two commands find none at the same time, both have
# written theirs before either reads it again.
_SECONDS_TO_SETTLE = {"local": 0.1, "remote": 3.0}


@contextlib.contextmanager
def locked(folder: epath.Path, flag: str) -> Iterator[None]:
    """Creates a folder, and keeps other commands out of it while the block runs.

    The lock of a killed command does not count: the operating system knows whether a local process
    is alive, and a command on another machine renews its lock.

    Args:
        folder: The folder.
        flag: The flag by which the user chose it.

    Raises:
        VqbeamError: Another command is running in the folder, or it cannot be written to.
    """
    path = folder / LOCK_FILE
    own = {"host": socket.gethostname(), "pid": os.getpid(), "token": uuid.uuid4().hex}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _take(path, own, flag)
    except OSError as error:
        if error.errno not in _NOT_A_PLACE:
            raise
        raise VqbeamError(
            f"cannot write to {folder} ({error.strerror}); choose another {flag}"
        ) from error
    stop = threading.Event()
    signs = threading.Thread(target=_give_signs, args=(path, own, stop), daemon=True)
    signs.start()
    try:
        yield
    finally:
        stop.set()
        signs.join()
        if _read(path) == own:
            path.unlink(missing_ok=True)


def _take(path: epath.Path, own: dict[str, Any], flag: str) -> None:
    """Writes the lock; raises a VqbeamError if another command holds it."""
    holder = _read(path)
    if holder and _is_alive(path, holder, own):
        raise VqbeamError(
            f"{path.parent} is in use by {_name(holder)}; wait until it ends, or choose another "
            f"{flag} (if there is no such process, delete {path})"
        )
    write_json(path, own)
    time.sleep(_SECONDS_TO_SETTLE["local" if is_local(path) else "remote"])
    # If two found no lock at the same time, the one that wrote last has it.
    holder = _read(path)
    if holder and holder != own:
        raise VqbeamError(
            f"{path.parent} was taken by {_name(holder)} at this moment; wait until it ends, or "
            f"choose another {flag}"
        )


def _name(holder: dict[str, Any]) -> str:
    return f"process {holder['pid']} on {holder['host']}"


def _read(path: epath.Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


def _is_alive(path: epath.Path, holder: dict[str, Any], own: dict[str, Any]) -> bool:
    if holder["host"] == own["host"]:
        return holder["pid"] != own["pid"] and _is_running(holder["pid"])
    # Both times are the file system's, since clocks of two machines differ, and may jump.
    probe = path.parent / f"{LOCK_FILE}.{own['token']}"
    probe.write_text("")
    now = modified(probe)
    probe.unlink()
    return now - modified(path) < _SECONDS_TO_BE_DEAD


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # of another user
    return True


def _give_signs(path: epath.Path, own: dict[str, Any], stop: threading.Event) -> None:
    while not stop.wait(_SECONDS_BETWEEN_SIGNS):
        # A folder that is unreachable for a while is no reason to stop the command;
        # for a bucket, the error is TensorFlow's.
        with contextlib.suppress(Exception):
            write_json(path, own)
