"""A lock that lets one command at a time work in a folder.

On one machine, the kernel decides: a command takes a flock on the folder itself. That lock ends
with the process, however it ends, and holds across containers. Across machines, `.lock.json` is a
lease, in which the holder increments a count every few seconds. A command that finds a lease of
another machine, or of this one before a reboot, watches whether the count changes. Neither lock
relies on clocks or process ids.
"""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any, NoReturn

from etils import epath

from vqbeam.configs import VqbeamError
from vqbeam.vqvae.storage.files import is_local, read_regular, write_json

LOCK_FILE = ".lock.json"
# Errors for folders that cannot be created or written to.
_NOT_A_PLACE = {errno.EACCES, errno.EPERM, errno.EEXIST, errno.ENOTDIR, errno.EROFS}
# Errors if something else has the name of the lock file.
_NOT_A_PLACE |= {errno.EISDIR, errno.EINVAL, errno.EFBIG}
_SECONDS_BETWEEN_SIGNS = 15
# A command counts as dead after this time without a sign: several may be late or fail.
_SECONDS_TO_BE_DEAD = 120
_SECONDS_BETWEEN_LOOKS = 1
# Longer than it takes to write a lease: if two commands find none at the same time, both have
# written theirs before either reads it again.
_SECONDS_TO_SETTLE = {"local": 0.1, "remote": 3.0}


@contextlib.contextmanager
def locked(folder: epath.Path, flag: str) -> Iterator[None]:
    """Creates a folder, and keeps other commands out of it while the block runs.

    Args:
        folder: The folder.
        flag: The flag with which the user chose it, for error messages.

    Raises:
        VqbeamError: Another command is running in the folder, or it cannot be written to.
    """
    own = {"host": socket.gethostname(), "pid": os.getpid(), "kernel": _kernel()}
    own |= {"token": uuid.uuid4().hex, "signs": 0}
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = _lock_file(folder / LOCK_FILE)
            try:
                is_flocked = stack.enter_context(flocked(folder))
            except BlockingIOError:
                _refuse(file, file.read(), flag)
            _take(file, own, flag, is_flocked)
        except OSError as error:
            if error.errno not in _NOT_A_PLACE:
                raise
            raise VqbeamError(
                f"cannot write to {error.filename or folder} ({error.strerror}); choose another "
                f"{flag}"
            ) from error
        stack.enter_context(_renewed(file, own))
        yield


def _kernel() -> str:
    """Returns an id of the running kernel, which changes at a reboot."""
    try:
        return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # not Linux
        return socket.gethostname()


@contextlib.contextmanager
def flocked(folder: epath.Path) -> Iterator[bool]:
    """Locks a folder while the block runs; yields whether its file system supports this.

    Args:
        folder: The folder. One in a bucket is not locked.

    Raises:
        BlockingIOError: Another process under this kernel has locked it.
    """
    if not is_local(folder):
        yield False
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:  # such as NFS
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


class _LockFile:
    """The lease as a file; if two commands write it at the same moment, the last one holds it."""

    def __init__(self, path: epath.Path):
        self.path = path

    def read(self) -> dict[str, Any] | None:
        """Returns the lease, or None if there is none or if vqbeam did not write it."""
        try:
            return _parsed(read_regular(self.path))
        except FileNotFoundError:
            return None

    def write(self, lease: dict[str, Any]) -> None:
        """Replaces the lease that was last read."""
        write_json(self.path, lease)

    def settle(self, is_flocked: bool) -> None:
        """Waits until all commands read the same lease, whichever was written last."""
        time.sleep(_SECONDS_TO_SETTLE["local" if is_flocked else "remote"])

    def remove(self) -> None:
        """Removes the lease."""
        self.path.unlink(missing_ok=True)


class _LockObject(_LockFile):
    """The lease as an object in a bucket, which replaces only the generation that was read."""

    def __init__(self, path: epath.Path, client):
        super().__init__(path)
        bucket, _, self._name = os.fspath(path).removeprefix("gs://").partition("/")
        self._bucket, self._generation = client.bucket(bucket), 0

    def read(self) -> dict[str, Any] | None:
        from google.api_core.exceptions import NotFound

        blob = self._bucket.get_blob(self._name)
        self._generation = blob.generation if blob else 0
        try:
            return _parsed(blob.download_as_bytes()) if blob else None
        except NotFound:  # removed at this moment
            return self.read()

    def write(self, lease: dict[str, Any]) -> None:
        from google.api_core.exceptions import PreconditionFailed

        blob, content = self._bucket.blob(self._name), json.dumps(lease)
        # If another command was faster, the next `read` returns its lease.
        with contextlib.suppress(PreconditionFailed):
            blob.upload_from_string(content, if_generation_match=self._generation)

    def settle(self, is_flocked: bool) -> None:
        pass  # the storage has already decided who holds the lease


def _lock_file(path: epath.Path) -> _LockFile:
    """Returns the lease at a path, as a `_LockObject` if Google's library is logged in."""
    if is_local(path):
        return _LockFile(path)
    try:
        from google.auth.exceptions import GoogleAuthError
        from google.cloud import storage
    except ImportError:
        return _LockFile(path)
    try:
        return _LockObject(path, storage.Client(project="none"))  # objects need no project
    except GoogleAuthError:
        return _LockFile(path)


def _parsed(content: bytes) -> dict[str, Any] | None:
    try:
        lease = json.loads(content)
        kinds = {"host": str, "pid": int, "token": str}
        return lease if all(isinstance(lease[name], kinds[name]) for name in kinds) else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _take(file: _LockFile, own: dict[str, Any], flag: str, is_flocked: bool) -> None:
    """Writes the lease; raises a VqbeamError if another command holds it."""
    holder = file.read()
    # A live holder under this kernel would have the flock.
    is_dead = holder is None or (is_flocked and holder.get("kernel") == own["kernel"])
    if not is_dead and _gives_signs(file, holder):
        _refuse(file, holder, flag)
    file.write(own)
    file.settle(is_flocked)
    holder = file.read()
    if holder is None or holder["token"] != own["token"]:
        raise VqbeamError(
            f"{file.path.parent} was taken by {_name(holder)} at this moment; wait until it ends, "
            f"or choose another {flag}"
        )


def _gives_signs(file: _LockFile, holder: dict[str, Any]) -> bool:
    print(
        f"{file.path.parent} was used by {_name(holder)}, and it may still be: waiting up to "
        f"{_SECONDS_TO_BE_DEAD} seconds for a sign of it",
        file=sys.stderr,
        flush=True,
    )
    end = time.monotonic() + _SECONDS_TO_BE_DEAD
    while time.monotonic() < end:
        time.sleep(_SECONDS_BETWEEN_LOOKS)
        found = file.read()
        if found != holder:
            return found is not None
    return False


def _refuse(file: _LockFile, holder: dict[str, Any] | None, flag: str) -> NoReturn:
    raise VqbeamError(
        f"{file.path.parent} is in use by {_name(holder)}; wait until it ends, or choose another "
        f"{flag}"
    )


def _name(holder: dict[str, Any] | None) -> str:
    # Another program may have made the lock.
    return f"process {holder['pid']} on {holder['host'][:80]!a}" if holder else "another command"


@contextlib.contextmanager
def _renewed(file: _LockFile, own: dict[str, Any]) -> Iterator[None]:
    """A context that renews the lease in the background, and removes it at the end."""
    stop = threading.Event()
    signs = threading.Thread(target=_give_signs, args=(file, own, stop), daemon=True)
    signs.start()
    try:
        yield
    finally:
        stop.set()
        signs.join()
        holder = file.read()
        if holder and holder["token"] == own["token"]:
            file.remove()


def _give_signs(file: _LockFile, own: dict[str, Any], stop: threading.Event) -> None:
    while not stop.wait(_SECONDS_BETWEEN_SIGNS):
        # The command goes on while its folder is unreachable. For a bucket, errors may be
        # TensorFlow's or Google's.
        with contextlib.suppress(Exception):
            holder = file.read()
            if holder and holder["token"] != own["token"]:
                print(
                    f"\n{file.path.parent} was taken by {_name(holder)}, since this command gave "
                    f"no sign for {_SECONDS_TO_BE_DEAD} seconds: it ends",
                    file=sys.stderr,
                )
                # A script's background processes ignore SIGINT.
                ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
                os.kill(os.getpid(), signal.SIGTERM if ignored else signal.SIGINT)
                return
            own["signs"] += 1
            file.write(own)
