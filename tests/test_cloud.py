"""The whole pipeline on gs:// paths, of a storage on this machine."""

import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest
from pipeline_fixtures import read_records, small_config, write_images, write_preset

from pipelines.run import run_stages
from vqvae.run_folder import STAGES, RunFolder

pytestmark = pytest.mark.cloud

ROOT = pathlib.Path(__file__).parent.parent
RUN = "gs://bucket/runs/small"


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """A storage that holds a folder of images."""
    from cloud_storage import storage

    folder = tmp_path_factory.mktemp("storage")
    write_images(folder / "source", 24)
    with storage(folder) as running:
        for path in (folder / "source").rglob("*.png"):
            running.write(f"source/{path.relative_to(folder / 'source')}", path.read_bytes())
        yield running


@pytest.fixture(scope="module")
def config():
    return small_config("folder:gs://bucket/source")


@pytest.fixture(scope="module")
def expected(config, tmp_path_factory):
    """The same run on the disk of this machine."""
    folder = tmp_path_factory.mktemp("expected")
    write_images(folder / "source", 24)
    local = small_config(f"folder:{folder / 'source'}")
    run_stages(local, str(folder / "run"), tuple(STAGES), ["--runner=FnApiRunner"])
    return RunFolder(folder / "run")


def vqbeam(bucket, *words):
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines", *map(str, words)],
        env=os.environ | bucket.environment | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def said(process):
    out, _ = process.communicate(timeout=400)
    assert process.returncode == 0, out
    return out


def assert_same(run, expected):
    for stage in ("prepare", "encode"):
        ours, theirs = read_records(run.folder(stage)), read_records(expected.folder(stage))
        assert ours.keys() == theirs.keys()
        for split, examples in theirs.items():
            for mine, wanted in zip(ours[split], examples, strict=True):
                for name, value in wanted.items():
                    np.testing.assert_array_equal(mine[name], value, err_msg=name)
    pictures = [which.folder("sample") / "samples.png" for which in (run, expected)]
    assert pictures[0].read_bytes() == pictures[1].read_bytes()


def test_every_stage_reads_and_writes_a_bucket(bucket, config, expected, tmp_path):
    preset = write_preset(tmp_path / "preset.py", config)
    said(vqbeam(bucket, "run", preset, "--run-dir", RUN))
    again = said(vqbeam(bucket, "run", preset, "--run-dir", RUN))
    assert again.count(f"done already, in {RUN}/") == len(STAGES)
    assert_same(RunFolder(bucket.download(tmp_path) / "runs" / "small"), expected)

    assert "prepare      done" in said(vqbeam(bucket, "inspect", RUN))
    said(vqbeam(bucket, "sample", RUN, "--num", 3, "--output", "gs://bucket/new/samples.png"))
    flags = ("--num", 6, "--shard-images", 3, "--format", "tfrecord")
    said(vqbeam(bucket, "generate", RUN, *flags, "--output", "gs://bucket/new/many"))
    found = bucket.download(tmp_path / "new") / "new"
    assert (found / "samples.png").stat().st_size > 0
    assert len(read_records(found / "many")["train"]) == 6


def test_a_storage_that_is_out_of_order_for_a_while(bucket, config, expected, tmp_path):
    preset = write_preset(tmp_path / "preset.py", config)
    process = vqbeam(bucket, "run", preset, "--run-dir", "gs://bucket/runs/refused")
    times, end = 0, time.monotonic() + 600
    while process.poll() is None:
        assert time.monotonic() < end
        before = bucket.requests
        time.sleep(1)
        if bucket.requests > before and times < 4:
            bucket.fail_for(4)
            times += 1
            time.sleep(4)
    said(process)
    assert bucket.refused > 2
    assert_same(RunFolder(bucket.download(tmp_path) / "runs" / "refused"), expected)
