import contextlib
import os
import subprocess

import numpy as np
import pytest
from pipeline_fixtures import drawn_pixels, read_records, small_config, write_images, write_preset

from vqbeam.pipelines.cli import main as cli
from vqbeam.pipelines.run import run_stages
from vqbeam.vqvae.storage.run_folder import STAGES, RunFolder

pytestmark = pytest.mark.system

LEFT = 8 * 1024  # less than any stage writes


@pytest.fixture
def disk(tmp_path):
    """A disk of its own, of 32 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=32m", "vqbeam-test", str(place)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only root may make a small disk")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@contextlib.contextmanager
def full(disk):
    """Leaves hardly any space on the disk while the block runs."""
    filler = disk / "filler"
    room = os.statvfs(disk)
    filler.write_bytes(bytes(room.f_bavail * room.f_frsize - LEFT))
    yield
    filler.unlink()


def test_each_stage_goes_on_once_there_is_space(failure, disk, tmp_path):
    write_images(tmp_path / "source", 24)
    config = small_config(f"folder:{tmp_path / 'source'}")
    preset = write_preset(tmp_path / "preset.py", config)
    run = RunFolder(disk / "run")
    words = [str(preset), "--run-dir", str(run.root)]
    for number, stage in enumerate(STAGES):
        with full(disk):
            message = failure("run", *words, alone=False)
            assert "No space left on device; free some space and run the same command" in message
            assert [name for name in STAGES if run.is_done(name)] == list(STAGES)[:number]
        if stage != "sample":
            assert cli.main([stage, *words]) == 0
    assert cli.main(["run", *words]) == 0

    # Nothing was lost, and nothing is left of what was broken off.
    unbroken = RunFolder(tmp_path / "unbroken")
    run_stages(config, str(unbroken.root), tuple(STAGES), ["--runner=FnApiRunner"])
    np.testing.assert_array_equal(drawn_pixels(run), drawn_pixels(unbroken))
    for stage in ("prepare", "encode"):
        ours, theirs = (read_records(which.folder(stage)) for which in (run, unbroken))
        assert [e["key"] for e in ours["train"]] == [e["key"] for e in theirs["train"]]
        found = {path.name for path in run.folder(stage).iterdir()}
        reports = f".reports-{run.fingerprint(stage)}"
        assert found == {*run.manifest(stage)["outputs"], "manifest.json", reports}
    assert {path.name for path in run.root.iterdir()} == {
        path.name for path in unbroken.root.iterdir()
    }
