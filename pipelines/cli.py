"""The command line: quiet start, one verb, and errors that a person can read."""

import contextlib
import importlib.machinery
import logging
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence

from configs import VqbeamError
from pipelines.arguments import Command, parse
from pipelines.parser import UsageError
from pipelines.verbs import VERBS, function

# A builtin exception or one with its module, at the start of a line.
_EXCEPTION_LINE = re.compile(
    r"^(?:RuntimeError: )*(\w*(?:Error|Exception)|\w+(?:\.\w+)+)(?:: (.*))?$", re.MULTILINE
)

_MENDS = {
    "Permission denied": "choose another place, or ask for the permission to write there",
    "No space left on device": "free some space and run the same command to go on",
}

_PYTHON_FILE_ERROR = re.compile(
    r"""\[Errno \d+\] (?P<reason>[^:]+)(: (?P<quote>['"])(?P<path>.*?)(?P=quote))?"""
)
_TENSORFLOW_FILE_ERROR = re.compile(rf"(?P<path>.*); (?P<reason>{'|'.join(_MENDS)})")

# What Beam says of options that are missing or do not fit together.
_BEAM_REFUSAL = re.compile(
    r"Pipeline has validations errors|please install apache_beam\[|You must specify a --"
    r"|Unable to parse jar URL"
)

# What Beam and Flink say where a worker was killed, or had no memory left.
_WORKER_LOST = re.compile(
    r"Channel closed prematurely|StatusRuntimeException: CANCELLED: client cancelled"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line; returns its exit status.

    Args:
        argv: The words behind `vqbeam`; those of this process by default.
    """
    try:
        _be_quiet()
        _dispatch(parse(sys.argv[1:] if argv is None else argv))
        return 0
    except SystemExit as end:
        return end.code or 0
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    except (KeyboardInterrupt, Exception) as error:
        if _is_interrupt(error):
            print("\nvqbeam: interrupted; run the same command to go on", file=sys.stderr)
            return 130
        message = user_message(error)
        if message is None:
            raise
        print(f"vqbeam: {message}", file=sys.stderr)
        return 1


def _dispatch(command: Command) -> None:
    said = function(VERBS[command.verb].work)(**command.arguments)
    if isinstance(said, str):
        print(said)


def user_message(error: BaseException) -> str | None:
    """Returns the one line that tells a user what to mend; None if the error is a bug.

    Beam's runners raise what a worker raised as it is, as a RuntimeError with the type and
    the message, or as one with the worker's traceback, each with the name of the step. What
    counts is the last exception of such a traceback: a bug may have started as a VqbeamError.
    """
    text = "".join(traceback.format_exception_only(error))
    name, message = _last_exception(text)
    if isinstance(error, VqbeamError) or name.endswith("configs.errors.VqbeamError"):
        return message
    if _BEAM_REFUSAL.search(str(error)):
        return " ".join(str(error).split())
    if _WORKER_LOST.search(text):
        return "a worker of the engine has died; run the same command again to go on"
    return _file_message(message)


def _is_interrupt(error: BaseException) -> bool:
    """Tells whether the user pressed Ctrl-C; Beam wraps that too, where a step was at work."""
    text = "".join(traceback.format_exception_only(error))
    return isinstance(error, KeyboardInterrupt) or _last_exception(text)[1] == "KeyboardInterrupt"


def _last_exception(text: str) -> tuple[str, str]:
    """Returns type and message of the last exception in a text, without Beam's step."""
    without_steps = re.sub(r" \[while running '.*", "", text)
    found = _EXCEPTION_LINE.findall(without_steps)
    return found[-1] if found else ("", "")


def _file_message(message: str) -> str | None:
    """Returns what a user can do about a failed file operation; None if it is none."""
    found = _PYTHON_FILE_ERROR.match(message) or _TENSORFLOW_FILE_ERROR.match(message)
    if not found or not (found["path"] or found["reason"] in _MENDS):
        return None
    path, reason = found["path"], found["reason"]
    what = f"{path}: {reason}" if path else reason
    return f"{what}; {_MENDS[reason]}" if reason in _MENDS else what


def _be_quiet() -> None:
    """Turns what libraries say of themselves down to errors; call it before they load."""
    # At 2, TensorFlow still complains of a missing GPU driver on every machine without a GPU.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    for name in (None, "absl", "apache_beam", "tensorflow", "tensorflow_datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Beam logs a worker's exception with its traceback, and raises it as well.
    logging.getLogger("apache_beam.runners.common").setLevel(logging.CRITICAL)
    logging.getLogger("apache_beam.runners.worker").setLevel(logging.CRITICAL)
    sys.meta_path.insert(0, _QuietTensorFlow())


class _QuietTensorFlow:
    """Finds TensorFlow for `import`, and drops what its C++ logs while it loads.

    No setting reaches those lines: they are written before the logging is initialised.
    """

    def find_spec(self, name, path=None, target=None):
        if name != "tensorflow":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec:
            # A context manager of contextlib is a decorator as well.
            spec.loader.exec_module = _without_start_up_noise()(spec.loader.exec_module)
        return spec


@contextlib.contextmanager
def _without_start_up_noise() -> Iterator[None]:
    """Drops C++ log lines from stderr while the block runs; keeps all else."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            held.seek(0)
            for line in held:
                if not re.match(rb"WARNING: All log messages before absl|[IW]\d{4} ", line):
                    os.write(2, line)
