import dataclasses
import json
import os
import platform
import subprocess
import sys

import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from pipeline_fixtures import small_config

from vqbeam.configs import VqbeamError
from vqbeam.pipelines.stages.shards import (
    ShardReport,
    ShardWriter,
    remove_leftovers,
    write_dataset_metadata,
)
from vqbeam.vqvae.storage.records import Shard, open_dataset, read_split
from vqbeam.vqvae.storage.run_folder import RunFolder

STAGE = "prepare"
SHARD = Shard("images", "train", 0, 2)


@pytest.fixture
def run(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.start(small_config("glyphs"))
    run.begin(STAGE)
    return run


def write(run, *contents, shard=SHARD, fail=False, content=""):
    """Writes a shard of the contents; returns its report and whether it was written now."""
    writer = ShardWriter(run.folder(STAGE), run.fingerprint(STAGE), shard, content)
    if writer.report:
        return writer.report, False
    with writer:
        for record in contents:
            writer.write(record)
        if fail:
            raise RuntimeError("gone")
        writer.facts["seen"] = len(contents)
    return writer.report, True


def read(run, shard=SHARD):
    path = str(run.folder(STAGE) / shard.filename)
    return list(tf.data.TFRecordDataset(path).as_numpy_iterator())


def test_a_shard_is_written_once(run):
    report, asked = write(run, b"one", b"three")
    assert asked and read(run) == [b"one", b"three"]
    size = (run.folder(STAGE) / SHARD.filename).stat().length
    assert report == ShardReport(SHARD, "", 2, size, {"seen": 2})
    again, asked = write(run, b"another")
    assert not asked and again == report and read(run) == [b"one", b"three"]


@pytest.mark.parametrize("damage", ["missing", "truncated", "content", "inputs", "report"])
def test_a_report_that_does_not_fit_is_ignored(run, damage, monkeypatch):
    write(run, b"one", b"three", content="a")
    path = run.folder(STAGE) / SHARD.filename
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "report":  # as after a loss of power
        (report,) = run.folder(STAGE).glob(".reports-*/*.json")
        report.write_text("")
    elif damage == "inputs":
        monkeypatch.setattr(run, "fingerprint", lambda stage: "another")
    content = "b" if damage == "content" else "a"
    report, asked = write(run, b"new", content=content)
    assert asked and report.records == 1 and read(run) == [b"new"]
    assert not write(run, b"newer", content=content)[1]


def test_a_failure_leaves_neither_shard_nor_report(run):
    with pytest.raises(RuntimeError, match="gone"):
        write(run, b"one", fail=True)
    assert [path for path in run.folder(STAGE).iterdir() if not path.is_dir()] == []
    assert list(run.folder(STAGE).glob(".reports-*/*")) == []
    report, asked = write(run, b"one")
    assert asked and report.records == 1


def test_killed_between_shard_and_report(run, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("vqbeam.pipelines.stages.shards.write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            write(run, b"one")
    assert write(run, b"other")[1] and read(run) == [b"other"]


FEATURES = tfds.features.FeaturesDict({"key": tfds.features.Text()})


def reports_of(run, *sizes):
    reports = []
    for index, size in enumerate(sizes):
        shard = Shard("images", "train", index, len(sizes))
        records = [FEATURES.serialize_example({"key": f"{index}-{i}"}) for i in range(size)]
        reports.append(write(run, *records, shard=shard)[0])
    return reports


def metadata(run, reports):
    folder = run.folder(STAGE)
    return write_dataset_metadata(folder, reports, FEATURES, version="1.0.0", description="Keys.")


def test_makes_a_dataset_of_shards_in_any_order(run):
    reports = reports_of(run, 3, 2, 4)
    files, counts = metadata(run, reports[::-1])
    assert counts == {"train": 9}
    examples = read_split(open_dataset(run.folder(STAGE)), "train").as_numpy_iterator()
    keys = [example["key"].decode() for example in examples]
    assert keys == [f"{shard}-{i}" for shard, size in enumerate((3, 2, 4)) for i in range(size)]
    names = {path.name for path in files}
    assert {report.shard.filename for report in reports} < names
    assert {"dataset_info.json", "features.json"} < names
    assert all(path.exists() for path in files)


def test_a_manifest_is_no_part_of_the_dataset(run):
    # Where a runner does the last step of a stage a second time, it is there already.
    reports = reports_of(run, 1)
    first, _ = metadata(run, reports)
    run.finish(STAGE, first)
    again, _ = metadata(run, reports)
    assert again == first and "manifest.json" not in {path.name for path in again}


def test_a_shard_that_was_not_reported(run):
    reports = reports_of(run, 3, 2, 4)
    with pytest.raises(VqbeamError, match="lacks 1 of 3 shards of split train; run the"):
        metadata(run, [reports[0], reports[2]])
    with pytest.raises(VqbeamError, match="has a shard twice of split train"):
        metadata(run, [*reports, reports[0]])


def test_removes_what_does_not_belong(run):
    reports = reports_of(run, 3, 2)
    files, _ = metadata(run, reports)
    folder = run.folder(STAGE)
    (folder / f".{SHARD.filename}.{'01' * 16}").write_text("half a shard of a killed worker")
    (folder / "images-train.tfrecord-00000-of-00003").write_text("of an older division")
    (folder / ".reports-0123456789abcdef").mkdir()
    (folder / ".reports-0123456789abcdef" / "x.json").write_text("{}")
    # What the user has put there stays.
    own = [folder / ".git", folder / "notes.txt", folder / "cat.png"]
    own[0].mkdir()
    for path in own[1:]:
        path.write_text("mine")
    remove_leftovers(folder, files, run.fingerprint(STAGE))
    reports = folder / f".reports-{run.fingerprint(STAGE)}"
    assert sorted(folder.iterdir()) == sorted([*files, reports, *own])


def test_reports_are_json(run):
    # They are read by other processes, of another start perhaps.
    report, _ = write(run, b"one", content="a")
    path = next(run.folder(STAGE).glob(".reports-*/*.json"))
    assert json.loads(path.read_text()) == json.loads(json.dumps(dataclasses.asdict(report)))


ARENAS = """
import ctypes, re, sys, tempfile, threading

if sys.argv[2] == "write":
    from etils import epath
    from vqbeam.pipelines.stages.shards import ShardWriter
    from vqbeam.vqvae.storage.records import Shard

    folder = epath.Path(sys.argv[1])
    with ShardWriter(folder, "f", Shard("images", "train", 0, 1)) as writer:
        writer.write(b"one")
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.fdopen.restype = ctypes.c_void_p
count = 8 * int(sys.argv[3])
together = threading.Barrier(count)

def work():
    libc.malloc(1000)
    together.wait()

threads = [threading.Thread(target=work) for _ in range(count)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
with tempfile.TemporaryFile() as file:
    stream = ctypes.c_void_p(libc.fdopen(file.fileno(), b"w"))
    libc.malloc_info(0, stream)
    libc.fflush(stream)
    file.seek(0)
    print(len(re.findall(b"<heap nr", file.read())))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc alone")
@pytest.mark.system
def test_threads_do_not_each_keep_memory_of_their_own(tmp_path):
    cores, counts = max(2, os.cpu_count()), {}
    for what in ("write", "nothing"):
        words = [sys.executable, "-c", ARENAS, str(tmp_path / what), what, str(cores)]
        counts[what] = int(subprocess.run(words, capture_output=True, check=True).stdout)
    # Those that were there before the first shard stay.
    assert counts["write"] <= cores + 2 < counts["nothing"]
