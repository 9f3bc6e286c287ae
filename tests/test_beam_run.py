import logging
import socket

import apache_beam as beam
import pytest
from apache_beam.runners.runner import PipelineResult, PipelineRunner

from vqbeam.configs import VqbeamError
from vqbeam.pipelines import beam as beam_run
from vqbeam.pipelines.beam import run_pipeline


def test_runs_to_the_end_and_closes_the_bars(tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr(beam_run, "close_all", lambda: events.append("closed"))
    path = tmp_path / "seen"

    def build(*numbers):
        steps = beam.Create(numbers) | beam.Map(lambda number: path.write_text(str(12 / number)))
        return lambda pipeline: pipeline | steps

    run_pipeline(["--runner=FnApiRunner"], build(3))
    assert path.read_text() == "4.0" and events == ["closed"]
    with pytest.raises(ZeroDivisionError):
        run_pipeline(["--runner=FnApiRunner"], build(0))
    assert events == ["closed", "closed"]


def test_an_interrupted_job_is_cancelled(monkeypatch):
    events = []

    class Job(PipelineResult):
        def wait_until_finish(self, duration=None):
            raise KeyboardInterrupt

        def cancel(self):
            events.append("cancelled")

    class Remote(PipelineRunner):
        def run_pipeline(self, pipeline, options):
            events.append("submitted")
            return Job("RUNNING")

    pipeline = beam.Pipeline
    monkeypatch.setattr(beam, "Pipeline", lambda options: pipeline(runner=Remote()))
    with pytest.raises(KeyboardInterrupt):
        run_pipeline([], lambda pipeline: pipeline | beam.Create([1]))
    assert events == ["submitted", "cancelled"]


def test_a_job_service_that_does_not_answer(monkeypatch):
    monkeypatch.setattr(beam, "Pipeline", None)  # which would wait for five minutes
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
        words = ["--runner=PortableRunner", f"--job_endpoint=localhost:{port}"]
        with pytest.raises(VqbeamError, match=f"nothing answers at localhost:{port}, the --job_e"):
            run_pipeline(words, None)
        listener.listen()
        with pytest.raises(TypeError, match="NoneType"):  # it got as far as the pipeline
            run_pipeline(words, None)


def test_what_is_shown_of_a_job_on_dataflow(capsys):
    logger = logging.getLogger("apache_beam.runners.dataflow")
    logger.handlers.clear()  # of a test before
    try:
        beam_run._tell_of_the_job()
        beam_run._tell_of_the_job()
        client = logger.getChild("internal.apiclient")
        client.info("Starting GCS upload to gs://x")
        client.info("Created job with id: [%s]", "7")
        client.warning("something is wrong")
        logger.getChild("dataflow_runner").info("Pipeline has additional dependencies, consider")
        logger.getChild("dataflow_runner").info("Job 7 is in state JOB_STATE_RUNNING")
    finally:
        logger.handlers.clear()
        logger.setLevel(logging.NOTSET)
        logger.propagate = True
    assert capsys.readouterr().err.splitlines() == [
        "Dataflow: Created job with id: [7]",
        "Dataflow: something is wrong",
        "Dataflow: Job 7 is in state JOB_STATE_RUNNING",
    ]
