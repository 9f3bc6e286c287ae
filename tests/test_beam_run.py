import apache_beam as beam
import pytest
from apache_beam.runners.runner import PipelineResult, PipelineRunner

from pipelines import beam_run
from pipelines.beam_run import run_pipeline


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
