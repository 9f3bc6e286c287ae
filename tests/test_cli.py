import errno
import os
import subprocess
import sys
import types

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import PipelineOptions

import configs
from configs import VqbeamError
from pipelines import cli
from pipelines.cli import main, user_message

PRESET = """
from configs import Config, DataConfig

CONFIG = Config(name="own", data=DataConfig(source="glyphs"))
"""
MESSAGE = "folder 'x' holds no image; give another"


@pytest.fixture(autouse=True)
def loud(monkeypatch):
    """Keeps the logging and importing of the test process as they are."""
    monkeypatch.setattr(cli, "_be_quiet", lambda: None)


@pytest.fixture
def target(monkeypatch):
    """Replaces a function that `main` dispatches to; returns the list of its calls."""

    def replace(module, function, outcome=None):
        calls = []

        def called(**arguments):
            calls.append(arguments)
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome

        fake = types.SimpleNamespace(**{function: called})
        monkeypatch.setitem(sys.modules, f"pipelines.{module}", fake)
        return calls

    return replace


def vqbeam(*words):
    return subprocess.run(
        [sys.executable, "-m", "pipelines", *words], capture_output=True, text=True, timeout=120
    )


def test_run_dispatch(target, tmp_path):
    preset = tmp_path / "own.py"
    preset.write_text(PRESET)
    calls = target("run", "run_stages")
    assert main(["encode", str(preset), "--run-dir", "d"]) == 0
    assert calls == [
        {
            "config": configs.load_preset(str(preset)),
            "run_dir": "d",
            "stages": ("encode",),
            "beam_args": ["--runner=FnApiRunner"],
        }
    ]


def test_sample_dispatch(target):
    calls = target("sample", "sample")
    assert main(["sample", "d", "--num", "2", "--label", "A"]) == 0
    assert calls[0]["run_dir"] == "d"
    assert calls[0]["num"] == 2
    assert calls[0]["labels"] == ["A"]


def test_reconstruct_dispatch(target):
    calls = target("reconstruct", "reconstruct")
    assert main(["reconstruct", "d", "--output", "a.png", "--num", "3"]) == 0
    assert calls == [{"run_dir": "d", "output": "a.png", "num": 3}]


def test_evaluate_dispatch(target):
    calls = target("evaluate", "evaluate")
    assert main(["evaluate", "d", "--features", "inception"]) == 0
    assert [(call["run_dir"], call["features"]) for call in calls] == [("d", "inception")]


def test_inspect_dispatch(target, capsys):
    calls = target("inspect", "describe", "all about it")
    assert main(["inspect", "d"]) == 0
    assert calls == [{"run_dir": "d"}]
    assert capsys.readouterr().out == "all about it\n"


def test_presets(capsys):
    assert main(["presets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == configs.preset_names()
    for line in lines:
        assert configs.preset_summary(line.split()[0]) in line


@pytest.mark.parametrize(
    "error,status,line",
    [
        (VqbeamError(MESSAGE), 1, f"vqbeam: {MESSAGE}\n"),
        (
            PermissionError(errno.EACCES, "Permission denied", "/a/b"),
            1,
            "vqbeam: /a/b: Permission denied; choose another place, or ask for the permission to "
            "write there\n",
        ),
        (KeyboardInterrupt(), 130, "\nvqbeam: interrupted; run the same command to go on\n"),
    ],
)
def test_errors_are_one_line_and_a_status(target, capsys, error, status, line):
    target("inspect", "describe", error)
    assert main(["inspect", "d"]) == status
    assert capsys.readouterr() == ("", line)


def test_a_bug_keeps_its_traceback(target):
    target("inspect", "describe", ValueError("a bug"))
    with pytest.raises(ValueError, match="a bug"):
        main(["inspect", "d"])


def test_usage_errors(capsys):
    assert main(["smaple"]) == 2
    assert capsys.readouterr().err == "vqbeam: unknown verb 'smaple'; did you mean sample?\n"
    assert main([]) == 2
    assert capsys.readouterr().err.startswith("usage: vqbeam VERB ...")
    assert main(["--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: vqbeam VERB ...")


class _Raise(beam.DoFn):
    def __init__(self, error, at="process"):
        self._error = error
        self._at = at

    def setup(self):
        if self._at == "setup":
            raise self._error

    def process(self, element):
        if self._at == "process":
            raise self._error
        yield element

    def finish_bundle(self):
        if self._at == "finish_bundle":
            raise self._error


class _BugAfterAnError(beam.DoFn):
    def process(self, element):
        try:
            raise VqbeamError("seen to")
        except VqbeamError as error:
            raise ValueError("a bug") from error


@pytest.fixture(params=["in_memory", "multi_threading"])
def error_of(request):
    """Returns what a pipeline raises for an error within it: the error itself, or a text."""

    def run(do_fn):
        options = PipelineOptions(
            ["--runner=FnApiRunner", f"--direct_running_mode={request.param}"]
        )
        with pytest.raises(Exception) as caught:
            with beam.Pipeline(options=options) as pipeline:
                # The shuffle puts the step into a worker's bundle, as in a real run.
                elements = pipeline | beam.Create([1]) | beam.Reshuffle()
                elements | "my step" >> beam.ParDo(do_fn) | beam.Map(print)
        return caught.value

    return run


@pytest.mark.parametrize("at", ["setup", "process", "finish_bundle"])
def test_an_error_within_a_worker_is_shown_without_beam(error_of, at):
    assert user_message(error_of(_Raise(VqbeamError(MESSAGE), at))) == MESSAGE


def test_an_interrupt_within_a_worker_is_an_interrupt(target, capsys):
    with pytest.raises(RuntimeError) as caught:
        with beam.Pipeline(options=PipelineOptions(["--runner=FnApiRunner"])) as pipeline:
            pipeline | beam.Create([1]) | "my step" >> beam.ParDo(_Raise(KeyboardInterrupt()))
    target("inspect", "describe", caught.value)
    assert main(["inspect", "d"]) == 130
    assert "interrupted; run the same command" in capsys.readouterr().err


@pytest.mark.parametrize("do_fn", [_Raise(ValueError("a bug")), _BugAfterAnError()])
def test_a_bug_within_a_worker_is_none_of_the_users(error_of, do_fn):
    error = error_of(do_fn)
    assert "a bug" in str(error)
    assert user_message(error) is None


@pytest.mark.parametrize(
    "error,message",
    [
        (
            PermissionError(errno.EACCES, "Permission denied", "/a/b"),
            "/a/b: Permission denied; choose another place, or ask for the permission to write "
            "there",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "No space left on device; free some space and run the same command to go on",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device", "/a/it's"),
            "/a/it's: No space left on device; free some space and run the same command to go on",
        ),
        (OSError(errno.EROFS, "Read-only file system", "/a"), "/a: Read-only file system"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), None),
    ],
)
def test_file_errors_within_and_without_a_worker(error_of, error, message):
    assert user_message(error) == message
    assert user_message(error_of(_Raise(error))) == message


def test_the_worker_of_a_remote_runner():
    error = RuntimeError(
        "Pipeline job-1 failed in state FAILED: java.lang.RuntimeException: Error received from "
        "SDK harness for instruction 2: Traceback (most recent call last):\n"
        '  File "pipelines/prepare.py", line 9, in process\n'
        f"configs.errors.VqbeamError: {MESSAGE} [while running 'prepare/Read']\n\n"
        "\tat org.apache.beam.runners.fnexecution.control.FnApiControlClient\n"
        "Caused by: java.lang.RuntimeException: Error received from SDK harness\n"
    )
    assert user_message(error) == MESSAGE


@pytest.mark.parametrize(
    "text,message",
    [
        ("/a/b; No space left on device", "/a/b: No space left on device; free some space and"),
        ("/a/b; Permission denied", "/a/b: Permission denied; choose another place"),
    ],
)
def test_file_errors_of_tensorflow(text, message):
    name = "tensorflow.python.framework.errors_impl.ResourceExhaustedError"
    assert user_message(RuntimeError(f"{name}: {text} [while running 'x']")).startswith(message)


def test_tensorflow_out_of_memory_is_not_a_file_error():
    name = "tensorflow.python.framework.errors_impl.ResourceExhaustedError"
    assert user_message(RuntimeError(f"{name}: OOM when allocating a tensor")) is None


@pytest.mark.parametrize(
    "said",
    [
        "'Channel closed prematurely.'",
        "org.apache.beam.StatusRuntimeException: CANCELLED: client cancelled",
    ],
    ids=["job service", "Flink"],
)
def test_a_worker_that_died(said):
    error = RuntimeError(f"Pipeline BeamApp-1 failed in state FAILED: {said}")
    message = "a worker of the engine has died; run the same command again to go on"
    assert user_message(error) == message


@pytest.mark.parametrize("runner", ["DataflowRunner", "PortableRunner"])
def test_what_beam_says_of_its_options(runner):
    with pytest.raises((ValueError, NotImplementedError)) as caught:
        with beam.Pipeline(options=PipelineOptions([f"--runner={runner}"])) as pipeline:
            pipeline | beam.Create([1])
    message = user_message(caught.value)
    assert "\n" not in message
    assert "--job_endpoint" in message or "Missing required option: region" in message


def test_help_answers_without_the_heavy_libraries():
    code = """
import sys
from pipelines.cli import main
words = (["--help"], ["run", "--help"], ["presets"], ["smaple"], ["sample", "d", "--topk", "1"])
print([main(line) for line in words], file=sys.stderr)
heavy = {"tensorflow", "keras", "apache_beam", "tensorflow_datasets", "numpy"} & set(sys.modules)
sys.exit(", ".join(heavy) or 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.endswith("[0, 0, 0, 2, 2]\n")


def test_python_m_pipelines():
    done = vqbeam("run", "glyphs", "--run-dir", "d", "--runer=DataflowRunner")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "vqbeam: unknown flag --runer; did you mean --runner?\n"


@pytest.mark.slow
def test_the_libraries_start_quietly():
    code = """
from pipelines import cli
cli._be_quiet()
import tensorflow as tf, tensorflow_datasets, keras_nlp, apache_beam
import sys
tf.function(lambda x: x @ x, jit_compile=True)(tf.ones((4, 4)))
sys.stderr.write("ours\\n")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "ours\n"


def test_only_log_lines_are_dropped_from_stderr(capfd):
    with pytest.raises(ImportError):
        with cli._without_start_up_noise():
            os.write(2, b"I0000 00:00:1.2 3 port.cc:153] oneDNN\nan error\nE0000 00:00 x\n")
            raise ImportError("libtensorflow")
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "an error\nE0000 00:00 x\nafter\n"
