import errno
import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest
import tensorflow as tf
from etils import epath
from pipeline_fixtures import small_config

from vqbeam.configs import VqbeamError
from vqbeam.pipelines import lock as run_lock
from vqbeam.vqvae.storage.run_folder import RunFolder


def locked(folder, flag="--run-dir"):
    return run_lock.locked(epath.Path(folder), flag)


@pytest.fixture
def run(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.start(small_config("glyphs"))
    return run


def lock_of(run):
    return run.root / ".lock.json"


def hold(run, **holder):
    """Leaves the lock of another command."""
    lock_of(run).write_text(json.dumps({"host": "elsewhere", "pid": 1, "token": "x"} | holder))


def test_is_there_while_the_block_runs(run):
    with locked(run.root):
        assert json.loads(lock_of(run).read_text())["pid"] == os.getpid()
    assert not lock_of(run).exists()
    with pytest.raises(ZeroDivisionError), locked(run.root):
        _ = 1 / 0
    assert not lock_of(run).exists()


@pytest.fixture
def other():
    """A process, which ends with the test."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.wait()


def test_of_a_process_that_is_alive_or_dead(run, other):
    hold(run, host=socket.gethostname(), pid=other.pid)
    told = rf"run is in use by process {other.pid} on \S+; wait until it ends, or choose another"
    with pytest.raises(VqbeamError, match=told), locked(run.root):
        raise AssertionError
    assert lock_of(run).exists()
    other.kill()
    other.wait()
    with locked(run.root):
        assert json.loads(lock_of(run).read_text())["pid"] == os.getpid()


def test_of_another_machine_goes_by_its_signs_of_life(run):
    hold(run)
    with (
        pytest.raises(VqbeamError, match="in use by process 1 on elsewhere"),
        locked(run.root),
    ):
        raise AssertionError
    old = time.time() - 601
    os.utime(lock_of(run), (old, old))
    with locked(run.root):
        pass
    assert sorted(path.name for path in run.root.iterdir()) == ["config.json"]


def test_a_clock_that_jumps_changes_nothing(run, monkeypatch):
    hold(run)
    for jump in (-1e6, 1e6):
        monkeypatch.setattr(time, "time", lambda jump=jump: 1.8e9 + jump)
        with pytest.raises(VqbeamError, match="in use by process 1"), locked(run.root):
            raise AssertionError


def test_nothing_can_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        message = "cannot write to .*file.*; choose another --output"
        with pytest.raises(VqbeamError, match=message), locked(folder, "--output"):
            raise AssertionError

    # Tests may run as root, whom no mode bits stop.
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(run_lock, "write_json", refuse)
    with pytest.raises(VqbeamError, match=r"cannot write to .* \(Permission denied\)"):
        with locked(tmp_path / "run"):
            raise AssertionError


def test_a_storage_that_fails_ends_neither_signs_nor_work(run, monkeypatch):
    monkeypatch.setattr(run_lock, "_SECONDS_BETWEEN_SIGNS", 0.01)
    tries = []

    def fail(path, own):
        tries.append(own)
        raise tf.errors.UnavailableError(None, None, "try again")

    with locked(run.root):
        monkeypatch.setattr(run_lock, "write_json", fail)
        end = time.monotonic() + 20
        while len(tries) < 3:
            assert time.monotonic() < end
            time.sleep(0.01)


@pytest.mark.slow
def test_two_threads_find_no_lock_at_the_same_time(tmp_path, monkeypatch):
    # Longer than a busy machine may keep one of them waiting.
    monkeypatch.setitem(run_lock._SECONDS_TO_SETTLE, "local", 2)
    # Each as if it were a process of its own, on a machine of its own.
    inside, refused = [], []
    together = threading.Barrier(2)

    def work(host):
        try:
            together.wait(20)
            own = {"host": host, "pid": 1, "token": host}
            run_lock._take(epath.Path(tmp_path / ".lock.json"), own, "--run-dir")
            inside.append(host)
        except VqbeamError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=work, args=(host,)) for host in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(inside) == len(refused) == 1
    assert "was taken by process 1 on" in refused[0] or "is in use by process 1" in refused[0]


def test_a_place_that_cannot_be_written_to(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(run_lock, "write_json", fail)
    told = r"cannot write to \S+ \(Read-only file system\); choose another --run-dir"
    with pytest.raises(VqbeamError, match=told), locked(tmp_path):
        pass


def test_half_a_lock_keeps_nobody_out(run):
    lock_of(run).write_text('{"host": ')
    with locked(run.root):
        pass


def test_gives_signs_of_life(run, monkeypatch):
    monkeypatch.setattr(run_lock, "_SECONDS_BETWEEN_SIGNS", 0.01)
    with locked(run.root):
        os.utime(lock_of(run), (0, 0))
        end = time.monotonic() + 20
        while lock_of(run).stat().mtime == 0:
            assert time.monotonic() < end
            time.sleep(0.01)


def test_two_that_start_at_the_same_moment(run, monkeypatch):
    def late(path, own):
        path.write_text(json.dumps({"host": "elsewhere", "pid": 7, "token": "y"}))

    monkeypatch.setattr(run_lock, "write_json", late)
    told = "was taken by process 7 on elsewhere at this moment"
    with pytest.raises(VqbeamError, match=told), locked(run.root):
        raise AssertionError
