"""Runs the whole pipeline on gs:// paths of a storage on this machine."""

import threading
import time
from collections import Counter

import pytest
from commands import started, status_of
from etils import epath
from image_files import ENDINGS, KINDS, encoded_images, names_of, write_file
from pipeline_fixtures import (
    assert_same_run,
    read_records,
    shard_contents,
    small_config,
    write_images,
    write_preset,
)

from vqbeam.configs import VqbeamError
from vqbeam.pipelines import lock
from vqbeam.pipelines.run import run_stages
from vqbeam.pipelines.sources.folder import image_keys
from vqbeam.vqvae.storage.run_folder import STAGES, RunFolder

pytestmark = pytest.mark.cloud

RUN = "gs://bucket/runs/small"


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """A storage that holds a folder of images."""
    from cloud_storage import storage

    folder = tmp_path_factory.mktemp("storage")
    write_images(folder / "source", 24)
    with storage(folder) as running:
        running.upload(folder / "source")
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


@pytest.fixture
def said(bucket, tmp_path):
    """Runs a command line, which must succeed; returns its output."""
    log = tmp_path / "log.txt"

    def run(*words):
        log.unlink(missing_ok=True)
        assert status_of(log, *words, environment=bucket.environment) == 0, log.read_text()
        return log.read_text()

    return run


def test_every_stage_reads_and_writes_a_bucket(bucket, said, config, expected, tmp_path):
    preset = write_preset(tmp_path / "preset.py", config)
    said("run", preset, "--run-dir", RUN)
    again = said("run", preset, "--run-dir", RUN)
    assert again.count(f"done already, in {RUN}/") == len(STAGES)
    assert_same_run(RunFolder(bucket.download(tmp_path) / "runs" / "small"), expected)

    assert "prepare      done" in said("inspect", RUN)
    said("sample", RUN, "--num", 3, "--output", "gs://bucket/new/samples.png")
    flags = ("--num", 6, "--shard-images", 3, "--format", "tfrecord")
    said("generate", RUN, *flags, "--output", "gs://bucket/new/many")
    found = bucket.download(tmp_path / "new") / "new"
    assert (found / "samples.png").stat().st_size > 0
    assert len(read_records(found / "many")["train"]) == 6


def test_a_storage_that_is_out_of_order_for_a_while(bucket, config, expected, tmp_path):
    preset, log = write_preset(tmp_path / "preset.py", config), tmp_path / "log.txt"
    words = ("run", preset, "--run-dir", "gs://bucket/runs/refused")
    bucket.fail_at_upload(4)
    times, end = 0, time.monotonic() + 600
    with started(log, *words, environment=bucket.environment) as process:
        while process.poll() is None:
            assert time.monotonic() < end
            before = bucket.requests
            time.sleep(1)
            if bucket.requests > before and times < 4:
                bucket.fail_for(4)
                times += 1
                time.sleep(4)
        assert process.returncode == 0, log.read_text()
    assert bucket.refused > 2
    assert_same_run(RunFolder(bucket.download(tmp_path) / "runs" / "refused"), expected)


@pytest.fixture
def bucket_here(bucket, monkeypatch):
    """The storage, which this process finds too."""
    for name, value in bucket.environment.items():
        monkeypatch.setenv(name, value)
    return bucket


@pytest.fixture
def lock_path(bucket_here, monkeypatch):
    """The path of a lock in the bucket."""
    monkeypatch.setattr(lock, "_SECONDS_TO_BE_DEAD", 1)
    return epath.Path("gs://bucket/locked/.lock.json")


def lease(token):
    return {"host": "a", "pid": 1, "kernel": token, "token": token, "signs": 0}


def test_one_lock_of_a_bucket_is_written_over_one_generation(lock_path):
    one, other = lock._lock_file(lock_path), lock._lock_file(lock_path)
    assert one.read() is other.read() is None
    lock._take(one, lease("one"), "--run-dir", is_flocked=False)
    other.write(lease("other"))  # it has read that there is none
    assert one.read()["token"] == other.read()["token"] == "one"
    told = "gs://bucket/locked is in use by process 1"
    signs = threading.Timer(0.3, lambda: one.write(lease("one") | {"signs": 1}))
    signs.start()
    with pytest.raises(VqbeamError, match=told):
        lock._take(other, lease("other"), "--run-dir", is_flocked=False)
    signs.join()
    lock._take(other, lease("other"), "--run-dir", is_flocked=False)  # one gives no more signs
    assert one.read()["token"] == "other"
    other.remove()
    assert one.read() is None


def test_two_that_take_a_lock_of_a_bucket_at_the_same_moment(lock_path):
    files = [lock._lock_file(lock_path) for _ in range(8)]
    inside, together = [], threading.Barrier(len(files))

    def take(number):
        assert files[number].read() is None
        together.wait(20)
        files[number].write(lease(f"{number}"))
        inside.append(files[number].read()["token"] == f"{number}")

    threads = [threading.Thread(target=take, args=(i,)) for i in range(len(files))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    files[0].remove()
    assert len(inside) == len(files) and sum(inside) == 1


def test_a_run_in_the_folder_that_it_reads_is_skipped(bucket_here, tmp_path):
    for name in ("a/1.png", "run/config.json", "run/images/2.png", "run/vqvae/3.png"):
        (tmp_path / "mixed" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mixed" / name).write_bytes(b"content")
    bucket_here.upload(tmp_path / "mixed")
    left_out = Counter()
    found = image_keys(epath.Path("gs://bucket/mixed"), left_out)
    assert found == ["a/1.png"] and left_out == {"folders of runs": 1}


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_many_images_in_a_bucket(kind, bucket_here, tmp_path):
    folder = tmp_path / f"{kind}-files"
    for split in ("train", "test"):
        path = folder / split / f"some{ENDINGS[kind]}"
        write_file(kind, path, encoded_images(20), names_of(20))
    bucket_here.upload(folder)
    places = (folder, f"gs://bucket/{folder.name}", f"gs://bucket/{folder.name}/t*/some*")
    found = []
    for number, place in enumerate(places):
        run = tmp_path / f"run-{number}"
        config = small_config(f"{kind}:{place}")
        run_stages(config, str(run), ("prepare",), ["--runner=FnApiRunner"])
        found.append(shard_contents(run / "images"))
    assert found[0] == found[1] == found[2] and len(found[0]) == 8
