import errno

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import PipelineOptions

from vqbeam.configs import VqbeamError
from vqbeam.pipelines.errors import is_interrupt, user_message

MESSAGE = "folder 'x' holds no image; give another"


class Raise(beam.DoFn):
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


class BugAfterAnError(beam.DoFn):
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
    assert user_message(error_of(Raise(VqbeamError(MESSAGE), at))) == MESSAGE


def test_an_interrupt_within_a_worker_is_an_interrupt(error_of):
    with pytest.raises(RuntimeError) as caught:
        with beam.Pipeline(options=PipelineOptions(["--runner=FnApiRunner"])) as pipeline:
            pipeline | beam.Create([1]) | "my step" >> beam.ParDo(Raise(KeyboardInterrupt()))
    assert is_interrupt(caught.value) and is_interrupt(KeyboardInterrupt())
    assert not is_interrupt(RuntimeError("KeyboardInterrupted")) and not is_interrupt(OSError())


@pytest.mark.parametrize("do_fn", [Raise(ValueError("a bug")), BugAfterAnError()])
def test_a_bug_within_a_worker_is_none_of_the_users(error_of, do_fn):
    error = error_of(do_fn)
    assert "a bug" in str(error)
    assert user_message(error) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "error,message",
    [
        (
            PermissionError(errno.EACCES, "Permission denied", "/a/b"),
            "/a/b: Permission denied; choose another place, or ask for the permission",
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
    assert user_message(error_of(Raise(error))) == message


def test_the_worker_of_a_remote_runner():
    error = RuntimeError(
        "Pipeline job-1 failed in state FAILED: java.lang.RuntimeException: Error received from "
        "SDK harness for instruction 2: Traceback (most recent call last):\n"
        '  File "pipelines/stages/prepare.py", line 9, in process\n'
        f"vqbeam.configs.fields.VqbeamError: {MESSAGE} [while running 'prepare/Read']\n\n"
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


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            "ResourceExhaustedError: OOM when allocating a tensor with shape[9] on GPU:0",
            "the device has not enough memory; lower batch_size, or for the prior raise ",
        ),
        (
            "jaxlib.XlaRuntimeError: RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.",
            "the device has not enough memory; lower batch_size, or for the prior raise ",
        ),
        (
            "tensorflow.python.framework.errors_impl.PermissionDeniedError: Error executing an "
            'HTTP request: HTTP response code 403 with body \'{\n "error": {\n "code": 403\'\n'
            "\t when reading metadata of gs://bucket/run/config.json",
            "gs://bucket/run/config.json: 403 Forbidden; check the path, your login and its rights",
        ),
        (
            "AbortedError: All 10 retry attempts failed. The last failure: Error executing an HTTP "
            "request: libcurl code 6 meaning 'Couldn't resolve host name', error details: Could "
            "not resolve host: x\n\t when reading gs://bucket/run",
            "gs://bucket/run: Couldn't resolve host name; check the path, your login and its",
        ),
        (
            "FileNotFoundError: [Errno 2] No usable temporary directory found in ['/tmp', '/']",
            "no folder for temporary files can be written to; free some space, or set TMPDIR to",
        ),
        (
            "google.api_core.exceptions.Forbidden: 403 GET b/bucket: no access\nmore",
            "Google's storage says: 403 GET b/bucket: no access",
        ),
        (
            "DataflowRuntimeException: Dataflow pipeline failed. State: CANCELLED, Error:\nNone",
            "the job on Dataflow was cancelled; run the same command again to go on",
        ),
        (
            "DataflowRuntimeException: Dataflow pipeline failed. State: FAILED, Error:\nno quota",
            "the job on Dataflow has failed; its page says why. Once that is fixed, the same",
        ),
        (
            "DataflowRuntimeException: Dataflow pipeline failed. State: FAILED, Error:\n"
            'Traceback (most recent call last):\n  File "x.py", line 9, in process\n'
            f"vqbeam.configs.fields.VqbeamError: {MESSAGE} [while running 'prepare/Read']\n",
            MESSAGE,
        ),
    ],
)
def test_what_others_say(error, message):
    found = user_message(RuntimeError(error))
    assert found.startswith(message) and "\n" not in found


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


def test_what_is_not_installed():
    error = ModuleNotFoundError("No module named 'gradio'")
    assert user_message(error) == "the studio needs the package gradio: pip install gradio"
    error = ModuleNotFoundError("No module named 'shtab'")
    told = "completion needs the package shtab: pip install shtab"
    assert user_message(error) == told


@pytest.mark.slow
@pytest.mark.parametrize("runner", ["DataflowRunner", "PortableRunner"])
def test_what_beam_says_of_its_options(runner):
    with pytest.raises((ValueError, NotImplementedError)) as caught:
        with beam.Pipeline(options=PipelineOptions([f"--runner={runner}"])) as pipeline:
            pipeline | beam.Create([1])
    message = user_message(caught.value)
    assert "\n" not in message
    assert "--job_endpoint" in message or "Missing required option: region" in message
