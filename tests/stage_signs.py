"""Waiting until a command is in the middle of a stage, to kill it or its workers there."""

import pathlib
import subprocess
import time

# The file that tells that a stage is in the middle of its work.
SIGNS = {
    "prepare": "images/.reports-*/*.json",
    "train-vqvae": "vqvae/checkpoints/*/epoch-00002.weights.h5",
    "encode": "codes/.reports-*/*.json",
    "train-prior": "prior/checkpoints/*/epoch-00002.weights.h5",
}


def wait_for(
    pattern: str, run_dir: pathlib.Path, process: subprocess.Popen, log: pathlib.Path
) -> None:
    """Waits until the command has written what the pattern names; it must not end before."""
    end = time.monotonic() + 240
    while not any(run_dir.glob(pattern)):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end
        time.sleep(0.002)
