"""Runs the real command, or waits until it is in the middle of a stage, to kill it there."""

import contextlib
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping

ROOT = pathlib.Path(__file__).parent.parent

# The file that tells that a stage is in the middle of its work.
SIGNS = {
    "prepare": "images/.reports-*/*.json",
    "train-vqvae": "vqvae/checkpoints/*/step-0000000[4-9].weights.h5",
    "encode": "codes/.reports-*/*.json",
    "train-prior": "prior/checkpoints/*/step-0000000[4-9].weights.h5",
}


@contextlib.contextmanager
def started(
    log: pathlib.Path,
    *words: object,
    cwd: pathlib.Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen]:
    """Starts `vqbeam` with these words, and kills it if it is still running when the block ends.

    All that it says is added to the log.
    """
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "vqbeam", *map(str, words)],
            cwd=cwd,
            env=os.environ | {"PYTHONPATH": str(ROOT)} | dict(environment or {}),
            stdout=out,
            stderr=out,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def status_of(log: pathlib.Path, *words: object, **where) -> int:
    """Runs `vqbeam` like `started`, and waits a few minutes for it to finish."""
    with started(log, *words, **where) as process:
        return process.wait(400)


def wait_for(
    pattern: str, run_dir: pathlib.Path, process: subprocess.Popen, log: pathlib.Path
) -> None:
    """Waits until the command has written what the pattern names; it must not end before."""
    end = time.monotonic() + 240
    while not any(run_dir.glob(pattern)):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end
        time.sleep(0.002)
