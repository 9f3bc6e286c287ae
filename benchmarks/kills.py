"""Kills a run at random moments, restarts it, and checks whether anything was lost.

    python benchmarks/kills.py --kills 20

The run is small and has all stages, on images of noise. Each attempt is killed once with SIGKILL,
at a moment sampled uniformly from the duration of an unbroken run, and then finished with the same
command. Its records, weights and images are compared with those of the unbroken run.
"""

import argparse
import hashlib
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections import defaultdict

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.append(str(pathlib.Path(__file__).parents[1]))
sys.path.append(str(pathlib.Path(__file__).parents[1] / "tests"))

import numpy as np
from commands import started
from pipeline_fixtures import shard_contents, small_config, write_images, write_preset
from side_by_side import table

from vqbeam.prior.training import load_prior
from vqbeam.vqvae.storage.run_folder import STAGES, RunFolder
from vqbeam.vqvae.training import load_vqvae

HEADER = ["killed in", "attempts", "another result", "seconds to the end", "of an unbroken run"]


def result(run: RunFolder) -> dict[str, str]:
    """Returns a hash of each record file, weight and image of a run."""
    made = {}
    for stage in ("prepare", "encode"):
        made |= shard_contents(run.folder(stage))
    for load in (load_vqvae, load_prior):
        weights = enumerate(load(run).weights)  # names depend on previously loaded models
        made |= {f"{load.__name__} {i}": np.asarray(w).tobytes() for i, w in weights}
    made["picture"] = (run.folder("sample") / "samples.png").read_bytes()
    return {name: hashlib.sha256(content).hexdigest() for name, content in made.items()}


def stage_at_work(run: RunFolder) -> str:
    """Returns the first unfinished stage."""
    if not run.exists():
        return "start"
    return next((stage for stage in STAGES if not run.is_done(stage)), "end")


def main() -> None:
    """Runs all attempts and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=20, help="attempts (default 20)")
    parser.add_argument("--smoke", action="store_true", help="one kill of a run of few steps")
    arguments = parser.parse_args()
    kills, steps, images = (1, 4, 30) if arguments.smoke else (arguments.kills, 60, 600)
    numbers, found = np.random.default_rng(0), defaultdict(list)
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        write_images(folder / "source", images)
        settings = {"vqvae__steps": steps, "prior__steps": steps, "data__images_per_shard": 25}
        preset = write_preset(
            folder / "preset.py", small_config(f"folder:{folder / 'source'}", **settings)
        )

        def run_in(name):
            return started(folder / "log.txt", "run", preset, "--run-dir", folder / name)

        begun = time.monotonic()
        with run_in("unbroken") as process:
            assert process.wait() == 0
        unbroken = time.monotonic() - begun
        expected = result(RunFolder(folder / "unbroken"))
        for attempt in range(kills):
            run = RunFolder(folder / f"run-{attempt}")
            with run_in(run.root.name):
                time.sleep(numbers.uniform(0, unbroken))  # on exit, the process is killed
            stage, begun = stage_at_work(run), time.monotonic()
            with run_in(run.root.name) as process:
                assert process.wait() == 0
            found[stage].append((time.monotonic() - begun, result(run) != expected))
            print(f"{attempt + 1} of {kills}: {stage}, {found[stage][-1]}", file=sys.stderr)
    rows = [
        [
            stage,
            str(len(attempts)),
            str(sum(other for _, other in attempts)),
            f"{statistics.median(seconds for seconds, _ in attempts):.1f}",
            f"{unbroken:.1f}",
        ]
        for stage, attempts in found.items()
    ]
    print(table(HEADER, rows))


if __name__ == "__main__":
    main()
