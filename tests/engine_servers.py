"""Engines for Beam pipelines, started on this machine and stopped after use."""

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

from commands import ROOT

# Where `make test-engines` has put the jars.
JARS = pathlib.Path(os.environ.get("VQBEAM_ENGINES", ROOT / ".venv" / "engines"))
_FLINK, _SPARK = "flink.FlinkJobServerDriver", "spark.SparkJobServerDriver"
# Spark 3.5 reaches into the JDK, which from Java 17 on must be allowed.
_OPEN_TO_SPARK = [
    f"--add-opens=java.base/{package}=ALL-UNNAMED"
    for package in (
        "java.io java.lang java.lang.invoke java.lang.reflect java.net java.nio java.util "
        "java.util.concurrent java.util.concurrent.atomic sun.nio.ch sun.nio.cs "
        "sun.security.action sun.util.calendar"
    ).split()
]


@contextlib.contextmanager
def one_process(folder: pathlib.Path) -> Iterator[list[str]]:
    """Beam's local runner; each engine gives the flags that make Beam use it."""
    yield ["--runner=FnApiRunner"]


@contextlib.contextmanager
def two_processes(folder: pathlib.Path) -> Iterator[list[str]]:
    """Beam's local runner with two worker processes."""
    processes = ["--direct_num_workers=2", "--direct_running_mode=multi_processing"]
    yield ["--runner=FnApiRunner", *processes]


@contextlib.contextmanager
def worker_pool(folder: pathlib.Path) -> Iterator[list[str]]:
    """A job service in one process, and a pool that starts workers in others."""
    service = [sys.executable, "-m", "apache_beam.runners.portability.local_job_service_main"]
    with (
        _server(lambda port: [*service, "--port", str(port)], folder / "service.log") as job,
        _pool(folder) as workers,
    ):
        yield _external(job, workers)


@contextlib.contextmanager
def flink_in_one_process(folder: pathlib.Path) -> Iterator[list[str]]:
    """Flink's mini-cluster inside the job server, and a worker pool."""
    master = "--flink-master=[local]"
    with _job_server("flink", _FLINK, master, folder) as job, _pool(folder) as workers:
        yield _external(job, workers)


@contextlib.contextmanager
def flink_cluster(folder: pathlib.Path) -> Iterator[list[str]]:
    """A Flink cluster of one JobManager and two TaskManagers, each a process, and a worker pool."""
    rest, rpc, blob = free_ports(3)
    settings = {
        "jobmanager.rpc.address": "localhost",
        "jobmanager.rpc.port": rpc,
        "jobmanager.memory.process.size": "1g",
        "jobmanager.memory.jvm-metaspace.size": "256m",
        "blob.server.port": blob,
        "rest.address": "localhost",
        "rest.bind-port": rest,
        "rest.port": rest,
        "taskmanager.numberOfTaskSlots": 2,
        "taskmanager.cpu.cores": 1,
        # Flink's own scripts would fill in all of these.
        "taskmanager.memory.framework.heap.size": "128m",
        "taskmanager.memory.framework.off-heap.size": "128m",
        "taskmanager.memory.jvm-metaspace.size": "256m",
        "taskmanager.memory.jvm-overhead.min": "128m",
        "taskmanager.memory.jvm-overhead.max": "128m",
        "taskmanager.memory.task.heap.size": "256m",
        "taskmanager.memory.task.off-heap.size": "64m",
        "taskmanager.memory.managed.size": "64m",
        "taskmanager.memory.network.min": "64m",
        "taskmanager.memory.network.max": "64m",
        "parallelism.default": 2,
        # What a lost worker breaks off is started again by Flink itself.
        "restart-strategy": "fixed-delay",
        "restart-strategy.fixed-delay.attempts": 5,
        "restart-strategy.fixed-delay.delay": "1 s",
        "io.tmp.dirs": folder / "flink",
    }
    conf = folder / "conf"
    conf.mkdir()
    lines = [f"{name}: {value}\n" for name, value in settings.items()]
    (conf / "flink-conf.yaml").write_text("".join(lines))
    runtime = "org.apache.flink.runtime"
    manager = f"{runtime}.entrypoint.StandaloneSessionClusterEntrypoint"
    task = f"{runtime}.taskexecutor.TaskManagerRunner"
    words = ["--configDir", str(conf)]
    with contextlib.ExitStack() as stack:
        start = stack.enter_context
        start(_process(_java("flink", manager, words), folder / "manager.log"))
        _wait_for(rest, folder / "manager.log")
        for number in (1, 2):
            start(_process(_java("flink", task, words), folder / f"task-{number}.log"))
        master = f"--flink-master=localhost:{rest}"
        workers = start(_pool(folder))
        yield _external(start(_job_server("flink", _FLINK, master, folder)), workers)


@contextlib.contextmanager
def spark(folder: pathlib.Path) -> Iterator[list[str]]:
    """Spark with two threads inside the job server, and a worker pool."""
    master = "--spark-master-url=local[2]"
    with _job_server("spark", _SPARK, master, folder) as job, _pool(folder) as workers:
        yield _external(job, workers)


ENGINES = {
    "one process": one_process,
    "two processes": two_processes,
    "worker pool": worker_pool,
    "Flink in one process": flink_in_one_process,
    "Flink cluster": flink_cluster,
    "Spark": spark,
}


def _external(job: int, workers: int) -> list[str]:
    endpoint = f"--job_endpoint=localhost:{job}"
    pool = ["--environment_type=EXTERNAL", f"--environment_config=localhost:{workers}"]
    return ["--runner=PortableRunner", endpoint, *pool]


def _pool(folder: pathlib.Path):
    command = [sys.executable, "-m", "apache_beam.runners.worker.worker_pool_main"]
    return _server(lambda port: [*command, f"--service_port={port}"], folder / "pool.log")


def _job_server(kind: str, driver: str, master: str, folder: pathlib.Path):
    def command(port):
        artifacts, expansion = free_ports(2)
        ports = ["--job-host=localhost", f"--job-port={port}"]
        ports += [f"--artifact-port={artifacts}", f"--expansion-port={expansion}"]
        return _java(kind, f"org.apache.beam.runners.{driver}", [master, *ports])

    return _server(command, folder / "job-server.log")


def _java(kind: str, main: str, words: list[str]) -> list[str]:
    opened = _OPEN_TO_SPARK if kind == "spark" else []
    return ["java", "-Xmx768m", *opened, "-cp", f"{JARS / kind}/*", main, *words]


@contextlib.contextmanager
def _server(command: Callable[[int], list[str]], log: pathlib.Path) -> Iterator[int]:
    """Runs a server while the block runs; gives the port at which it answers."""
    (port,) = free_ports(1)
    with _process(command(port), log):
        _wait_for(port, log)
        yield port


@contextlib.contextmanager
def _process(command: list[str], log: pathlib.Path) -> Iterator[subprocess.Popen]:
    # The pool starts workers by the name `python`, which must be this one.
    path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PATH": path}
    with log.open("ab") as out:
        process = subprocess.Popen(
            command,
            cwd=log.parent,
            env=environment,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        # With all that it has started.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_for(port: int, log: pathlib.Path) -> None:
    end = time.monotonic() + 120
    while True:
        try:
            socket.create_connection(("localhost", port), timeout=1).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise TimeoutError(f"nothing answers at port {port}:\n{log.read_text()}") from None
            time.sleep(0.1)


def free_ports(count: int) -> list[int]:
    """Returns different ports of this machine that nothing listens at."""
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(socket.socket()) for _ in range(count)]
        for listener in listeners:
            listener.bind(("localhost", 0))
        return [listener.getsockname()[1] for listener in listeners]
