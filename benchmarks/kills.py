"""Ends a run at moments spread evenly, restarts it, and checks whether anything was lost.

    python benchmarks/kills.py --kills 100

The run is small and has all stages, on images of noise. Its command is ended by SIGKILL, SIGTERM
and SIGINT (Ctrl-C) in turn, and given again until it ends by itself; then the run's records,
weights and images are compared with those of an unbroken run, and the next run begins. The moments
are spread evenly over the duration of the unbroken run, also the first of them, so that Ctrl-C may
end the benchmark at any time. As the run is short, an epoch is all of a training, and a checkpoint
is due after a second, not a minute. Each command is a process that is forked where the libraries
are loaded already, and its plan foretells no times, so that the moments fall into the work.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import multiprocessing
import os
import pathlib
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
ROOT = pathlib.Path(__file__).parents[1]
sys.path += [str(ROOT), str(ROOT / "tests")]

HEADER = ["ended in", "by", "times", "training steps lost, at most"]
HEADER += ["seconds of work lost, median", "at most"]
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
INTERVAL = 1.0  # seconds between checkpoints
GOLDEN = (5**0.5 - 1) / 2  # its multiples, without their whole parts, are spread evenly


class Kill(NamedTuple):
    """What the end of a command cost.

    Attributes:
        stage: The stage at work.
        by: Name of the signal.
        lost: Training steps that the next command does again.
        since: Seconds from the last file that was kept to the signal: work that was done again, or
            the time in which the libraries load and the models are compiled.
    """

    stage: str
    by: str
    lost: int
    since: float


def run_traced(log: pathlib.Path, steps: pathlib.Path, words: list[str]) -> None:
    """Runs a command line of vqbeam, which writes each training step that is done to a file.

    Args:
        log: File for all that it says.
        steps: Folder of the files, which are named as the folders of the stages.
        words: The words after `vqbeam`.
    """
    from vqbeam.pipelines import plan
    from vqbeam.pipelines.cli import main as cli
    from vqbeam.vqvae.fitting.checkpoints import Checkpoints

    begin = Checkpoints.on_train_batch_begin

    def write_and_begin(self, batch, logs=None):
        new = steps / "new"
        new.write_text(str(self._begin + batch))
        new.replace(steps / self.folders[0].parts[-3])  # or a kill could leave an empty file
        begin(self, batch, logs)

    Checkpoints.on_train_batch_begin = write_and_begin
    Checkpoints.seconds, Checkpoints.largest_share = INTERVAL, 1.0
    plan.measure = lambda *_: {}
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(cli.main(words))


def forked(function: Callable, *arguments: Any) -> multiprocessing.Process:
    """Starts a function in a process of its own.

    This process must have loaded the libraries, and must not have computed anything with them.
    """
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    return process


def load() -> None:
    """Loads the libraries, and the modules of vqbeam that a run takes."""
    import vqbeam.pipelines.beam
    import vqbeam.pipelines.report.page
    import vqbeam.pipelines.run
    import vqbeam.pipelines.sampling.sample
    import vqbeam.pipelines.stages.transforms  # noqa: F401


def write_result(run, path: pathlib.Path) -> None:
    """Writes a hash of each record file, weight and image of a run."""
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
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in made.items()}
    path.write_text(json.dumps(hashes))


def result(run) -> dict[str, str]:
    """Returns what `write_result` writes."""
    path = pathlib.Path(run.root) / "result.json"
    forked(write_result, run, path).join()
    return json.loads(path.read_text())


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


def lost_steps(run, stage: str, steps: pathlib.Path) -> int:
    """Returns the steps of the training at work that are in no checkpoint; see `run_traced`."""
    from vqbeam.vqvae.storage.run_folder import MODELS

    path = steps / run.folder(stage).name if stage in MODELS else None
    if path is None or not path.exists():
        return 0
    return max(0, int(path.read_text()) - run.trained_steps(stage))


def write_run(folder: pathlib.Path, steps: int, images: int) -> pathlib.Path:
    """Writes the images and the preset of the run; returns the path of the preset."""
    from pipeline_fixtures import small_config, write_images, write_preset

    write_images(folder / "source", images)
    settings = {f"{part}__steps": steps for part in ("vqvae", "prior")}
    settings |= {f"{part}__steps_per_epoch": steps for part in ("vqvae", "prior")}
    config = small_config(f"folder:{folder / 'source'}", data__images_per_shard=25, **settings)
    return write_preset(folder / "preset.py", config)


def kill_often(kills: int, steps: int, images: int) -> Iterator[Kill | bool]:
    """Yields each kill, and for each run that was completed, whether its result was the same."""
    from vqbeam.vqvae.storage.run_folder import RunFolder

    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        preset, done, log = write_run(folder, steps, images), folder / "steps", folder / "log"

        def command(run):
            shutil.rmtree(done, ignore_errors=True)
            done.mkdir()
            return forked(run_traced, log, done, ["run", str(preset), "--run-dir", str(run.root)])

        def completed(process):
            process.join()
            assert process.exitcode == 0, log.read_text()

        whole, begun = RunFolder(folder / "unbroken"), time.monotonic()
        completed(command(whole))
        unbroken, expected = time.monotonic() - begun, result(whole)
        print(f"unbroken: {unbroken:.1f} seconds", file=sys.stderr)
        killed, run = 0, RunFolder(folder / "run")
        for index in itertools.count(1):
            begun, process = time.time(), command(run)
            process.join(unbroken * (index * GOLDEN % 1) if killed < kills else None)
            if process.is_alive():
                number = SIGNALS[killed % len(SIGNALS)]
                os.kill(process.pid, number)
                ended = time.time()
                process.join()
                stage = stage_at_work(run)
                since = max(0.0, ended - (last_kept(run) or begun))
                yield Kill(stage, number.name, lost_steps(run, stage, done), since)
                killed += 1
                continue
            completed(process)
            yield result(run) == expected
            shutil.rmtree(run.root)
            if killed == kills:
                return


def main() -> None:
    """Ends runs and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=21, help="commands to end (default 21)")
    parser.add_argument("--smoke", action="store_true", help="one kill of a run of few steps")
    arguments = parser.parse_args()
    # A job in the background ignores it, and so would the processes that it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    load()
    kills, same = [], []
    with contextlib.suppress(KeyboardInterrupt):
        for found in kill_often(*((1, 4, 30) if arguments.smoke else (arguments.kills, 400, 75))):
            print(found, file=sys.stderr)
            (kills if isinstance(found, Kill) else same).append(found)
    from side_by_side import table

    by_place = defaultdict(list)
    for kill in kills:
        by_place[kill.stage, kill.by].append(kill)
    rows = [row(*place, of_one) for place, of_one in sorted(by_place.items())]
    if kills:
        print(table(HEADER, [*rows, row("all", "all", kills)]))
    print(f"{len(same)} runs completed, {same.count(False)} of them with another result")


def row(stage: str, by: str, kills: list[Kill]) -> list[str]:
    """Returns the line of the table for some kills."""
    return [
        stage,
        by,
        str(len(kills)),
        str(max(kill.lost for kill in kills)),
        f"{statistics.median(kill.since for kill in kills):.1f}",
        f"{max(kill.since for kill in kills):.1f}",
    ]


if __name__ == "__main__":
    main()
