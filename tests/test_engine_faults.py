import os
import pathlib
import signal

import numpy as np
import pytest
from commands import SIGNS, started, wait_for
from engine_servers import ENGINES
from pipeline_fixtures import png, read_keys, small_config, write_preset

from vqbeam.vqvae.storage.run_folder import STAGES, RunFolder

pytestmark = pytest.mark.engines

IMAGES = 40
SAID = "vqbeam: a worker of the engine has died; run the same command again to go on"
KILLED_IN = ("prepare", "train-vqvae", "encode")


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    """A preset of images that are large, so that it takes a while to prepare them."""
    folder = tmp_path_factory.mktemp("source")
    noise = np.random.default_rng(0)
    for index in range(IMAGES):
        image = noise.integers(0, 256, (600, 600, 3), np.uint8)
        (folder / f"{index:02d}.png").write_bytes(png(image))
    config = small_config(f"folder:{folder}", data__images_per_shard=2, vqvae__steps=24)
    return write_preset(tmp_path_factory.mktemp("preset") / "small.py", config)


def start_run(folder, preset, flags):
    return started(folder / "command.log", "run", preset, "--run-dir", "run", *flags, cwd=folder)


def workers(folder):
    """Returns the worker processes of the pool in a folder."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
            here = pathlib.Path(path.parent / "cwd").resolve() == folder
        except OSError:
            continue  # it has ended meanwhile
        if here and any(b"SdkHarness(" in word for word in words):
            found.append(int(path.parent.name))
    return found


def kill_workers_in(stage, folder, process):
    """Kills the workers once the stage has begun to write."""
    wait_for(SIGNS[stage], folder / "run", process, folder / "command.log")
    pids = workers(folder)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert RunFolder(folder / "run").manifest(stage) is None
    return pids


def assert_nothing_is_lost(folder):
    run = RunFolder(folder / "run")
    assert all(run.is_done(stage) for stage in STAGES)
    for stage in ("prepare", "encode"):
        assert sorted(read_keys(run.folder(stage))) == [
            f"{index:02d}.png" for index in range(IMAGES)
        ]


def test_flink_starts_what_was_broken_off_again(preset, tmp_path):
    with ENGINES["Flink cluster"](tmp_path) as flags:
        with start_run(tmp_path, preset, flags) as process:
            for stage in KILLED_IN:
                assert kill_workers_in(stage, tmp_path, process), "there was no worker to kill"
            assert process.wait(300) == 0, (tmp_path / "command.log").read_text()
    assert_nothing_is_lost(tmp_path)


def test_a_job_that_died_with_its_workers_goes_on_when_started_again(preset, tmp_path):
    with ENGINES["worker pool"](tmp_path) as flags:
        for stage in KILLED_IN:
            with start_run(tmp_path, preset, flags) as process:
                assert kill_workers_in(stage, tmp_path, process), "there was no worker to kill"
                # It ends well, or says so, and does not hang.
                if process.wait(240):
                    assert (tmp_path / "command.log").read_text().splitlines()[-1] == SAID
        with start_run(tmp_path, preset, flags) as process:
            assert process.wait(300) == 0
    assert_nothing_is_lost(tmp_path)
