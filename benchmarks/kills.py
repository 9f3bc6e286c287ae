"""Ends a run at even moments, restarts it, and checks whether anything was lost.

    python benchmarks/kills.py --kills 100

The run is small and has all stages, on images of noise. Each attempt is ended once, by SIGKILL,
SIGTERM and SIGINT (Ctrl-C) in turn, at moments that divide the duration of an unbroken run evenly,
and then finished with the same command. Its records, weights and images are compared with
those of the unbroken run. As the run is short, an epoch is all of a training, and a checkpoint is
due after a second, not a minute.
"""

import argparse
import hashlib
import os
import pathlib
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from typing import NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
ROOT = pathlib.Path(__file__).parents[1]
sys.path += [str(ROOT), str(ROOT / "tests")]

HEADER = ["ended in", "by", "attempts", "another result", "training steps lost, at most"]
HEADER += ["seconds of work lost, median", "at most", "seconds to the end", "of an unbroken run"]
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
INTERVAL = 1.0  # seconds between checkpoints


class Attempt(NamedTuple):
    """What became of an attempt.

    Attributes:
        seconds: Time of the second command, which finished the run.
        other: Whether the result differs from that of the unbroken run.
        lost: Training steps that the second command did again.
        since: Seconds from the last file that was kept to the signal: work that was done again, or
            the time in which the libraries load and the models are compiled.
    """

    seconds: float
    other: bool
    lost: int
    since: float


def run_traced(steps: pathlib.Path, words: list[str]) -> int:
    """Runs a command line of vqbeam, which writes each training step that is done to a file."""
    from vqbeam.pipelines.cli import main as cli
    from vqbeam.vqvae.fitting.checkpoints import Checkpoints

    begin = Checkpoints.on_train_batch_begin

    def write_and_begin(self, batch, logs=None):
        new = steps.with_suffix(".new")
        new.write_text(str(self._begin + batch))
        new.replace(steps)  # or a kill could leave an empty file
        begin(self, batch, logs)

    Checkpoints.on_train_batch_begin, Checkpoints.seconds = write_and_begin, INTERVAL
    return cli.main(words)


def start(steps: pathlib.Path, *words: object) -> subprocess.Popen:
    """Starts `run_traced` in a process of its own."""
    command = [sys.executable, __file__, "--traced", str(steps), *map(str, words)]
    log = (steps.parent / "log.txt").open("ab")
    return subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=log, stderr=log
    )


def result(run) -> dict[str, str]:
    """Returns a hash of each record file, weight and image of a run."""
    import numpy as np
    from pipeline_fixtures import shard_contents

    from vqbeam.prior.training import load_prior
    from vqbeam.vqvae.training import load_vqvae

    made = {}
    for stage in ("prepare", "encode"):
        made |= shard_contents(run.folder(stage))
    for load in (load_vqvae, load_prior):
        weights = enumerate(load(run).weights)  # names depend on previously loaded models
        made |= {f"{load.__name__} {i}": np.asarray(w).tobytes() for i, w in weights}
    made["picture"] = (run.folder("sample") / "samples.png").read_bytes()
    return {name: hashlib.sha256(content).hexdigest() for name, content in made.items()}


def stage_at_work(run) -> str:
    """Returns the first unfinished stage."""
    from vqbeam.vqvae.storage.run_folder import STAGES

    if not run.exists():
        return "start"
    return next((stage for stage in STAGES if not run.is_done(stage)), "end")


def last_kept(run) -> float | None:
    """Returns when the last file was written that a restart goes on from; None if none was."""
    kept = ("*/manifest.json", "*/.reports-*/*.json", "*/checkpoints/*/step-*.weights.h5")
    paths = [path for pattern in kept for path in pathlib.Path(run.root).glob(pattern)]
    return max((path.stat().st_mtime for path in paths), default=None)


def write_run(folder: pathlib.Path, steps: int, images: int) -> pathlib.Path:
    """Writes the images and the preset of the run; returns the path of the preset."""
    from pipeline_fixtures import small_config, write_images, write_preset

    write_images(folder / "source", images)
    settings = {f"{part}__steps": steps for part in ("vqvae", "prior")}
    settings |= {f"{part}__steps_per_epoch": steps for part in ("vqvae", "prior")}
    config = small_config(f"folder:{folder / 'source'}", data__images_per_shard=25, **settings)
    return write_preset(folder / "preset.py", config)


def attempts(kills: int, steps: int, images: int) -> tuple[dict[tuple, list[Attempt]], float]:
    """Returns the attempts by stage and signal, and the seconds of the unbroken run."""
    from vqbeam.vqvae.storage.run_folder import MODELS, RunFolder

    found = defaultdict(list)
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        preset, done = write_run(folder, steps, images), folder / "steps.txt"

        def command(run):
            return start(done, "run", preset, "--run-dir", run.root)

        whole, begun = RunFolder(folder / "unbroken"), time.monotonic()
        assert command(whole).wait() == 0, (folder / "log.txt").read_text()
        unbroken, expected = time.monotonic() - begun, result(whole)
        for index in range(kills):
            run, number = RunFolder(folder / f"run-{index}"), SIGNALS[index % len(SIGNALS)]
            done.write_text("0")
            process = command(run)
            begun = time.time()
            time.sleep(unbroken * (index + 0.5) / kills)
            ended = time.time()
            process.send_signal(number)
            process.wait()
            since = max(0.0, ended - (last_kept(run) or begun))
            stage, begun = stage_at_work(run), time.monotonic()
            saved = run.trained_steps(stage) if stage in MODELS else 0
            lost = max(0, int(done.read_text()) - saved) if stage in MODELS else 0
            assert command(run).wait() == 0, (folder / "log.txt").read_text()
            seconds = time.monotonic() - begun
            attempt = Attempt(seconds, result(run) != expected, lost, since)
            found[stage, number.name].append(attempt)
            print(f"{index + 1} of {kills}: {stage}, {number.name}, {attempt}", file=sys.stderr)
            shutil.rmtree(run.root)
    return found, unbroken


def main() -> None:
    """Makes all attempts and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=21, help="attempts (default 21)")
    parser.add_argument("--smoke", action="store_true", help="one kill of a run of few steps")
    arguments = parser.parse_args()
    # A job in the background ignores it, and so would the processes that it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    found, unbroken = attempts(*((1, 4, 30) if arguments.smoke else (arguments.kills, 3000, 600)))
    from side_by_side import table

    rows = [
        [
            *where,
            str(len(of_one)),
            str(sum(attempt.other for attempt in of_one)),
            str(max(attempt.lost for attempt in of_one)),
            f"{statistics.median(attempt.since for attempt in of_one):.1f}",
            f"{max(attempt.since for attempt in of_one):.1f}",
            f"{statistics.median(attempt.seconds for attempt in of_one):.1f}",
            f"{unbroken:.1f}",
        ]
        for where, of_one in sorted(found.items())
    ]
    print(table(HEADER, rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--traced"]:
        sys.exit(run_traced(pathlib.Path(sys.argv[2]), sys.argv[3:]))
    main()
