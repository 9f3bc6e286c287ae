import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import tensorflow as tf
from commands import ROOT
from etils import epath
from pipeline_fixtures import small_config

from vqbeam.configs import VqbeamError
from vqbeam.pipelines import lock as run_lock
from vqbeam.vqvae.storage.run_folder import RunFolder

HOLD = """
import sys
from etils import epath
from vqbeam.pipelines.lock import locked
with locked(epath.Path(sys.argv[1]), "--run-dir"):
    print("inside", flush=True)
    input()
"""


def locked(folder, flag="--run-dir"):
    return run_lock.locked(epath.Path(folder), flag)


@pytest.fixture
def run(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.start(small_config("glyphs"))
    return run


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Commands of other machines are waited for a second, not two minutes."""
    monkeypatch.setattr(run_lock, "_SECONDS_TO_BE_DEAD", 1)
    monkeypatch.setattr(run_lock, "_SECONDS_BETWEEN_LOOKS", 0.01)


def lock_of(run):
    return run.root / ".lock.json"


def hold(run, **holder):
    """Leaves the lock of another command."""
    lease = {"host": "elsewhere", "pid": 1, "kernel": "another", "token": "x", "signs": 0}
    lock_of(run).write_text(json.dumps(lease | holder))


def refused(run, told):
    with pytest.raises(VqbeamError, match=told), locked(run.root):
        raise AssertionError


@pytest.fixture
def signs(run):
    """Makes another command give signs of life while the test runs."""
    stop, given = threading.Event(), []

    def give(**holder):
        while not stop.wait(0.02):
            given.append(None)
            lease = {"host": "elsewhere", "pid": 1, "kernel": "another", "token": "x"}
            content = json.dumps(lease | holder | {"signs": len(given)})
            lock_of(run).with_name("new").write_text(content)
            lock_of(run).with_name("new").replace(lock_of(run))

    threads = []

    def start(**holder):
        hold(run, **holder)
        threads.append(threading.Thread(target=give, kwargs=holder))
        threads[0].start()

    yield start
    stop.set()
    threads[0].join()


def test_is_there_while_the_block_runs(run):
    with locked(run.root):
        assert json.loads(lock_of(run).read_text())["pid"] == os.getpid()
        refused(run, f"in use by process {os.getpid()} on")
    assert not lock_of(run).exists()
    with pytest.raises(ZeroDivisionError), locked(run.root):
        _ = 1 / 0
    assert not lock_of(run).exists()


@pytest.fixture
def other(run):
    """A process that holds the lock; it ends with the test."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run.root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert process.stdout.readline() == b"inside\n"
    yield process
    process.kill()
    process.wait()


@pytest.mark.system
def test_of_a_process_that_is_alive_or_dead(run, other):
    told = rf"run is in use by process {other.pid} on \S+; wait until it ends, or choose another"
    refused(run, told)
    # Stopped for long, by Ctrl-Z for example, it has the lock nevertheless.
    other.send_signal(signal.SIGSTOP)
    time.sleep(1.1)
    refused(run, told)
    # As where the command is the first process of a container, in which nobody waits for it.
    other.kill()
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
    assert json.loads(lock_of(run).read_text())["pid"] == other.pid
    with locked(run.root):
        assert json.loads(lock_of(run).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize(
    "holder",
    [
        {"host": socket.gethostname(), "pid": os.getppid()},  # the number of another process now
        {"host": socket.gethostname(), "pid": os.getpid()},  # two containers, both process 1
        {"host": "a container that was killed"},
    ],
)
def test_of_this_kernel_the_flock_alone_counts(run, capsys, holder):
    hold(run, kernel=run_lock._kernel(), **holder)
    future = time.time() + 1e6
    os.utime(lock_of(run), (future, future))
    with locked(run.root):
        assert json.loads(lock_of(run).read_text())["token"] != "x"
    assert capsys.readouterr().err == ""


def test_of_another_machine_goes_by_its_signs_of_life(run, signs):
    signs(host=socket.gethostname())  # a container may have any host name
    refused(run, f"in use by process 1 on '{socket.gethostname()}'")


@pytest.mark.slow
@pytest.mark.parametrize("stamp", [0, 1e10])
def test_without_signs_a_command_is_dead(run, capsys, stamp):
    hold(run, host=socket.gethostname(), pid=os.getppid())  # before the machine was started anew
    os.utime(lock_of(run), (stamp, stamp))
    begun = time.monotonic()
    with locked(run.root):
        pass
    assert time.monotonic() - begun > 1
    assert "it may still be: waiting up to 1 seconds" in capsys.readouterr().err
    assert sorted(path.name for path in run.root.iterdir()) == ["config.json"]


def test_a_lock_that_is_removed_meanwhile(run):
    hold(run)
    threading.Timer(0.2, lock_of(run).unlink).start()
    begun = time.monotonic()
    with locked(run.root):
        assert time.monotonic() - begun < 1


@pytest.fixture
def no_flock(monkeypatch):
    """A file system without flock for folders, such as NFS."""

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setitem(run_lock._SECONDS_TO_SETTLE, "remote", 0.1)


def test_without_flock_the_signs_count(run, no_flock, signs):
    signs(kernel=run_lock._kernel())
    refused(run, "in use by process 1 on 'elsewhere'")


@pytest.mark.slow
def test_without_flock_and_signs(run, no_flock, capsys):
    hold(run, kernel=run_lock._kernel())
    with locked(run.root):
        assert "waiting up to" in capsys.readouterr().err


def test_a_clock_that_jumps_changes_nothing(run, signs, monkeypatch):
    signs()
    for jump in (-1e6, 1e6):
        monkeypatch.setattr(time, "time", lambda jump=jump: 1.8e9 + jump)
        refused(run, "in use by process 1")


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
    monkeypatch.setitem(run_lock._SECONDS_TO_SETTLE, "remote", 2)
    monkeypatch.setattr(run_lock, "_SECONDS_TO_BE_DEAD", 60)
    # Each as if it were a process of its own, on a machine of its own.
    inside, refused = [], []
    together = threading.Barrier(2)

    def work(host):
        try:
            together.wait(20)
            own = {"host": host, "pid": 1, "kernel": host, "token": host, "signs": 0}
            file = run_lock._lock_file(epath.Path(tmp_path / ".lock.json"))
            run_lock._take(file, own, "--run-dir", is_flocked=False)
            inside.append(host)
            with run_lock._renewed(file, own):
                time.sleep(3)
        except VqbeamError as error:
            refused.append(str(error))

    monkeypatch.setattr(run_lock, "_SECONDS_BETWEEN_SIGNS", 0.05)
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


@pytest.mark.parametrize(
    "content",
    [
        b'{"host": ',
        b"",
        b"[]",
        b"7",
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b'{"host": 1, "pid": "x", "token": []}',
        b'{"host": "elsewhere"}',
    ],
)
def test_what_is_no_lock_keeps_nobody_out(run, content):
    lock_of(run).write_bytes(content)
    with locked(run.root):
        pass


def test_something_else_with_the_name_of_the_lock(run):
    os.mkfifo(lock_of(run))
    refused(run, r"cannot write to \S+\.lock\.json \(not a regular file\); choose another")
    lock_of(run).unlink()
    lock_of(run).mkdir()
    refused(run, r"cannot write to \S+\.lock\.json")


def test_the_name_of_a_holder_is_not_printed_raw(run, signs, capsys):
    signs(host="\x1b[31m" + "long" * 100)
    with pytest.raises(VqbeamError) as refusal, locked(run.root):
        raise AssertionError
    said = str(refusal.value) + capsys.readouterr().err
    assert "\x1b" not in said and r"\x1b[31mlong" in said and len(said) < 1000


def test_gives_signs_of_life(run, monkeypatch):
    monkeypatch.setattr(run_lock, "_SECONDS_BETWEEN_SIGNS", 0.01)
    with locked(run.root):
        end = time.monotonic() + 20
        while json.loads(lock_of(run).read_text())["signs"] < 3:
            assert time.monotonic() < end
            time.sleep(0.01)


def ended(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("ctrl_c", "sigterm"), [(ended, signal.SIG_IGN), (signal.SIG_IGN, ended)], ids=("C", "TERM")
)
def test_a_command_whose_lock_was_taken_ends(run, monkeypatch, capsys, ctrl_c, sigterm):
    monkeypatch.setattr(run_lock, "_SECONDS_BETWEEN_SIGNS", 0.01)
    before = signal.signal(signal.SIGINT, ctrl_c), signal.signal(signal.SIGTERM, sigterm)
    try:
        with pytest.raises(KeyboardInterrupt), locked(run.root):
            hold(run, token="of one that counted it as dead")
            time.sleep(20)
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])
    assert "run was taken by process 1 on 'elsewhere', since" in capsys.readouterr().err
    assert lock_of(run).exists()


def test_two_that_start_at_the_same_moment(run, monkeypatch):
    def late(path, own):
        path.write_text(json.dumps({"host": "elsewhere", "pid": 7, "token": "y"}))

    monkeypatch.setattr(run_lock, "write_json", late)
    refused(run, "was taken by process 7 on 'elsewhere' at this moment")
