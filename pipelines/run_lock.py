"""One command at a time in a run's folder."""

import contextlib
import json
import os
import socket
import threading
import uuid
from collections.abc import Iterator
from typing import Any

from etils import epath

from configs import VqbeamError
from vqvae.run_folder import RunFolder, write_json

_FILE = ".lock.json"
_SECONDS_BETWEEN_SIGNS = 60
# Of a command on another machine, of which nothing else is known.
_SECONDS_TO_BE_DEAD = 600


@contextlib.contextmanager
def locked(run: RunFolder) -> Iterator[None]:
    """Keeps other commands out of a run's folder while the block runs.

    A command that was killed keeps nobody out: whether it is alive is asked of the operating
    system, or, where it ran on another machine, told by the age of its last sign of life.

    Raises:
        VqbeamError: Another command is at work in the folder.
    """
    path = run.root / _FILE
    own = {"host": socket.gethostname(), "pid": os.getpid(), "token": uuid.uuid4().hex}
    _take(path, own)
    stop = threading.Event()
    signs = threading.Thread(target=_give_signs, args=(path, own, stop), daemon=True)
    signs.start()
    try:
        yield
    finally:
        stop.set()
        signs.join()
        if _read(path) == own:
            path.unlink()


def _take(path: epath.Path, own: dict[str, Any]) -> None:
    """Writes the lock; raises a VqbeamError where another command holds it."""
    holder = _read(path)
    if holder and _is_alive(path, holder, own):
        raise VqbeamError(
            f"{path.parent} is in use by {_name(holder)}; wait until it ends, or choose another "
            f"--run-dir (if there is no such process, delete {path})"
        )
    write_json(path, own)
    # Of two that found no lock at the same time, the one that wrote last has it.
    holder = _read(path)
    if holder and holder != own:
        raise VqbeamError(
            f"{path.parent} was taken by {_name(holder)} at this moment; wait until it ends, or "
            "choose another --run-dir"
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
    probe = path.parent / f"{_FILE}.{own['token']}"
    probe.write_text("")
    now = probe.stat().mtime
    probe.unlink()
    return now - path.stat().mtime < _SECONDS_TO_BE_DEAD


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
        # A folder that cannot be reached for a while is no reason to end what is at work in it.
        with contextlib.suppress(OSError):
            write_json(path, own)
