"""Turns an error into a one-line message for the user, unless it is a bug."""

import contextlib
import http
import re
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from vqbeam.configs import LESS_MEMORY, VqbeamError

# A builtin exception or one with its module, at the start of a line.
_EXCEPTION_LINE = re.compile(
    r"^(?:RuntimeError: )*(\w*(?:Error|Exception)|\w+(?:\.\w+)+)(?:: (.*))?$", re.MULTILINE
)

_MENDS = {
    "Permission denied": "choose another place, or ask for the permission",
    "No space left on device": "free some space and run the same command to go on",
}

_PYTHON_FILE_ERROR = re.compile(
    r"""\[Errno \d+\] (?P<reason>[^:]+)(: (?P<quote>['"])(?P<path>.*?)(?P=quote))?"""
)
_TENSORFLOW_FILE_ERROR = re.compile(rf"(?P<path>.*); (?P<reason>{'|'.join(_MENDS)})")

# Beam's messages about options that are missing or incompatible.
_BEAM_REFUSAL = re.compile(
    r"Pipeline has validations errors|please install apache_beam\[|You must specify a --"
    r"|Unable to parse jar URL"
)

# Known failures of other programs, and what a user can do about them.
_KNOWN = {
    # Beam and Flink, if a worker was killed or ran out of memory.
    r"Channel closed prematurely|StatusRuntimeException: CANCELLED: client cancelled": (
        "a worker of the engine has died; run the same command again to go on"
    ),
    r"DataflowRuntimeException: .*State: CANCELLED": (
        "the job on Dataflow was cancelled; run the same command again to go on"
    ),
    r"DataflowRuntimeException: .*State: ": (
        "the job on Dataflow has failed; its page says why. Once that is fixed, the same "
        "command goes on"
    ),
    r"Unable to fetch remote job server jar": (
        "the job server of this runner cannot be downloaded; start one yourself, and use --runner "
        "PortableRunner, as docs/engines.md says"
    ),
    r"No module named '(jax|torch)'": (
        "the backend that KERAS_BACKEND names is not installed; unset it, or for jax: pip install "
        "-c constraints.txt jax"
    ),
    r"No module named 'gradio'": "the studio needs the package gradio: pip install gradio",
    r"No module named 'wandb'": "--log wandb needs the package wandb: pip install wandb",
    r"No module named 'shtab'": "completion needs the package shtab: pip install shtab",
    r"No usable temporary directory found": (
        "no folder for temporary files can be written to; free some space, or set TMPDIR to "
        "another folder"
    ),
    r"OOM when allocating|RESOURCE_EXHAUSTED: Out of memory": (
        f"the device has not enough memory; {LESS_MEMORY}"
    ),
}

# TensorFlow's errors for files in a bucket.
_STORAGE_ERROR = re.compile(
    r"HTTP response code (?P<code>\d{3})|libcurl code \d+ meaning '(?P<reason>.*?)', error"
)
_GOOGLE_ERROR = re.compile(r"\bgoogle\.(?:api_core|auth)\.exceptions\.\w+: (.*)")


# Control characters, except tab and newline, and marks that change the direction of writing.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

INTERRUPTED = "\nvqbeam: interrupted; run the same command to go on"


def user_message(error: BaseException) -> str | None:
    """Returns a line that says how to fix an error, or None if the error is a bug.

    Beam's runners raise a worker's exception as it is, as a RuntimeError with its type and message,
    or with the worker's traceback, and add the name of the step. The last exception in such a
    traceback is decisive, since a bug may have been raised while a VqbeamError was handled.
    """
    text = "".join(traceback.format_exception_only(error))
    name, message = _last_exception(text)
    if isinstance(error, VqbeamError) or name.endswith("vqbeam.configs.fields.VqbeamError"):
        return message
    if _BEAM_REFUSAL.search(str(error)):
        return " ".join(str(error).split())
    for pattern, told in _KNOWN.items():
        if re.search(pattern, text):
            return told
    return _of_storage(text) or _of_file(message)


@contextlib.contextmanager
def if_removed(is_there: Callable[[], bool], folder: Any) -> Iterator[None]:
    """Converts any error in the block into a VqbeamError if the folder has been removed."""
    try:
        yield
    except Exception as error:
        if is_interrupt(error) or is_there():
            raise
        raise VqbeamError(
            f"{folder} was removed while this command was at work in it; run it again"
        ) from error


def printable(text: str) -> str:
    """Returns a text with control characters, which may change a terminal's state, as escapes.

    Texts from elsewhere may contain them, such as the names of files and classes.
    """
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


def is_interrupt(error: BaseException) -> bool:
    """Returns whether the user pressed Ctrl-C, which Beam may wrap in another exception."""
    text = "".join(traceback.format_exception_only(error))
    return isinstance(error, KeyboardInterrupt) or _last_exception(text)[1] == "KeyboardInterrupt"


def _last_exception(text: str) -> tuple[str, str]:
    """Returns the type and message of the last exception in a text, without the step's name."""
    without_steps = re.sub(r" \[while running '.*", "", text)
    found = _EXCEPTION_LINE.findall(without_steps)
    return found[-1] if found else ("", "")


def _of_storage(text: str) -> str | None:
    """Returns a line on how to fix failed access to a bucket; None for other errors."""
    if found := _STORAGE_ERROR.search(text):
        place = re.search(r"gs://[^\s']*", text)
        said = found["reason"] or f"{found['code']} {_phrase(int(found['code']))}"
        return (
            f"{place[0] if place else 'the storage'}: {said}; check the path, your login and its "
            "rights, and run the same command to go on"
        )
    found = _GOOGLE_ERROR.search(text)
    return found and f"Google's storage says: {found[1]}"


def _phrase(code: int) -> str:
    return http.HTTPStatus(code).phrase if code in set(http.HTTPStatus) else "is its answer"


def _of_file(message: str) -> str | None:
    """Returns a line on how to fix a failed file operation; None for other errors."""
    found = _PYTHON_FILE_ERROR.match(message) or _TENSORFLOW_FILE_ERROR.match(message)
    if not found or not (found["path"] or found["reason"] in _MENDS):
        return None
    path, reason = found["path"], found["reason"]
    what = f"{path}: {reason}" if path else reason
    return f"{what}; {_MENDS[reason]}" if reason in _MENDS else what
