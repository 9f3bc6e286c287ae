"""The command line: quiet start, one verb, and errors that a person can read."""

import contextlib
import importlib.machinery
import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence

from vqbeam.pipelines.cli.arguments import Command, parse
from vqbeam.pipelines.cli.early_checks import check
from vqbeam.pipelines.cli.parser import UsageError
from vqbeam.pipelines.cli.verbs import VERBS, function
from vqbeam.pipelines.errors import INTERRUPTED, is_interrupt, user_message


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line; returns its exit status.

    Args:
        argv: The words behind `vqbeam`; those of this process by default.
    """
    try:
        _be_quiet()
        _dispatch(parse(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return 0
    except SystemExit as end:
        return end.code or 0
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    except BrokenPipeError:
        # Whoever reads, such as `head`, has seen enough; Python would complain of it at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except (KeyboardInterrupt, Exception) as error:
        if is_interrupt(error):
            print(INTERRUPTED, file=sys.stderr)
            return 130
        message = user_message(error)
        if message is None:
            raise
        print(f"vqbeam: {message}", file=sys.stderr)
        return 1


def _dispatch(command: Command) -> None:
    check(command)
    said = function(VERBS[command.verb].work)(**command.arguments)
    if isinstance(said, str):
        print(said)


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
    if sys.stderr.isatty():
        os.write(2, b"loading TensorFlow ...\r")
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            if sys.stderr.isatty():
                os.write(2, b"\033[K")
            held.seek(0)
            for line in held:
                if not re.match(rb"WARNING: All log messages before absl|[IW]\d{4} ", line):
                    os.write(2, line)
