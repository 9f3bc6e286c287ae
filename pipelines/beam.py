"""Runs Beam pipelines from the command line."""

import dataclasses
import functools
import logging
import socket
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions, PortableOptions

from vqbeam.configs import VqbeamError
from vqbeam.pipelines.paths import is_dataflow
from vqbeam.pipelines.stages.shards import ShardReport
from vqbeam.vqvae.fitting.progress import ProgressBar
from vqbeam.vqvae.storage.run_folder import RunFolder

_DATAFLOW = "apache_beam.runners.dataflow"


def run_pipeline(beam_args: Sequence[str], build: Callable[[beam.Pipeline], object]) -> None:
    """Runs a pipeline to completion; cancels the job if interrupted.

    Args:
        beam_args: Beam's own options, such as `["--runner=FnApiRunner"]`.
        build: A function that adds the steps to the pipeline.

    Raises:
        VqbeamError: The job service does not answer.
    """
    if is_dataflow(beam_args):
        _tell_of_the_job()
    options = PipelineOptions(list(beam_args))
    _check_service(options.view_as(PortableOptions).job_endpoint)
    pipeline = beam.Pipeline(options=options)
    try:
        with pipeline:
            build(pipeline)
    except KeyboardInterrupt:
        # On another machine the job would go on, and collide with a repeated command.
        if getattr(pipeline, "result", None):
            pipeline.result.cancel()
        raise
    finally:
        close_all()


def _check_service(endpoint: str | None) -> None:
    """Checks that the job service answers; Beam would retry for minutes, with a traceback."""
    host, colon, port = (endpoint or "").rpartition(":")
    if not colon or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=20).close()
    except OSError as error:
        raise VqbeamError(
            f"nothing answers at {endpoint}, the --job_endpoint ({error.strerror or error}); start "
            "its job service first, as docs/engines.md says"
        ) from error


def _tell_of_the_job() -> None:
    """Shows Beam's log messages about a Dataflow job: its id, its page and its state."""
    logger = logging.getLogger(_DATAFLOW)
    if not logger.handlers:
        shown = logging.StreamHandler()
        shown.addFilter(_is_of_the_job)
        shown.setFormatter(logging.Formatter("Dataflow: %(message)s"))
        logger.addHandler(shown)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _is_of_the_job(record: logging.LogRecord) -> bool:
    said = record.getMessage()
    if record.levelno >= logging.WARNING:
        return True
    if record.name.endswith(".apiclient"):  # it also logs every upload
        return said.startswith(("Created job", "To access"))
    return not said.startswith("Pipeline has additional dependencies")  # long advice


class Gathered(NamedTuple):
    """The combined reports of some shards of a dataset.

    Attributes:
        reports: The reports of the shards, in any order and without their facts.
        facts: The combined facts of all the shards; None if there are none.
    """

    reports: list[ShardReport]
    facts: dict[str, Any] | None


class GatherReports(beam.CombineFn):
    """Combines the reports of shards into one `Gathered`.

    Each worker combines its own reports first, so the final worker holds only one short report per
    shard, and a single dictionary of facts.

    Args:
        add: Function that combines two dictionaries of facts, in any order.
    """

    def __init__(self, add: Callable[[dict, dict], dict]):
        self.add = add

    def create_accumulator(self) -> Gathered:
        """Returns the accumulator before the first report."""
        return Gathered([], None)

    def add_input(self, gathered: Gathered, report: ShardReport) -> Gathered:
        """Adds a report."""
        gathered.reports.append(dataclasses.replace(report, facts={}))
        return Gathered(gathered.reports, self._sum([gathered.facts, report.facts]))

    def merge_accumulators(self, parts: Iterable[Gathered]) -> Gathered:
        """Combines the accumulators of several workers."""
        parts = list(parts)
        reports = [report for part in parts for report in part.reports]
        return Gathered(reports, self._sum([part.facts for part in parts]))

    def extract_output(self, gathered: Gathered) -> Gathered:
        """Returns the accumulator."""
        return gathered

    def _sum(self, facts: list[dict | None]) -> dict | None:
        seen = [one for one in facts if one is not None]
        return functools.reduce(self.add, seen) if seen else None


class ShardedStage(beam.PTransform):
    """A stage that writes a dataset shard by shard; takes and returns the path of a run.

    Beam shuffles units of work, never pixels: each shard is read and written by one worker.

    Args:
        stage: The name of the stage.
        plan: Function from the path of a run to `(path, unit)` for each shard; starts the stage.
        write: Function from `path, unit` to `(path, report)`; writes the shard.
        add: See `GatherReports`.
        finish: Function from the path and a `Gathered` to the path; finishes the stage.
    """

    def __init__(
        self, stage: str, *, plan: Callable, write: Callable, add: Callable, finish: Callable
    ):
        super().__init__()
        self.stage, self.plan, self.write, self.add, self.finish = stage, plan, write, add, finish

    def expand(self, runs):
        """Builds the steps."""
        pending, done = runs | "IsDone" >> beam.Partition(_is_done, 2, self.stage)
        finished = (
            pending
            | "Plan" >> beam.FlatMap(self.plan)
            | beam.Reshuffle()
            | "WriteShard" >> beam.MapTuple(self.write)
            | "GatherReports" >> beam.CombinePerKey(GatherReports(self.add))
            | "Finish" >> beam.MapTuple(self.finish)
        )
        return (done, finished) | beam.Flatten()


def _is_done(run_path: str, parts: int, stage: str) -> int:
    """Returns 1 if the stage is finished, as when an engine restarts a job; otherwise 0."""
    return int(RunFolder(run_path).is_done(stage))


_bars = {}
_lock = threading.Lock()


def advance(title: str, images: int, total: int) -> None:
    """Advances the progress bar with a title, which is opened if needed and closed at `total`."""
    if not images:
        return
    with _lock:
        bar = _bars.get(title)
        if bar is None:
            bar = _bars[title] = ProgressBar(title, total)
        bar.update(images)
        if bar.n >= total:
            _bars.pop(title).close()


def close_all() -> None:
    """Closes all progress bars, so that an error message starts on a new line."""
    with _lock:
        while _bars:
            _bars.popitem()[1].close()
