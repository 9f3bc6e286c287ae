"""Running a Beam pipeline from the command line."""

import logging
from collections.abc import Callable, Sequence

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions

from pipelines.beam_flags import is_dataflow
from pipelines.progress import close_all

_DATAFLOW = "apache_beam.runners.dataflow"


def run_pipeline(beam_args: Sequence[str], build: Callable[[beam.Pipeline], object]) -> None:
    """Runs what `build` puts into a pipeline, to its end; an interrupted job is cancelled.

    Args:
        beam_args: Beam's own options, such as `["--runner=FnApiRunner"]`.
        build: Gets the pipeline.
    """
    if is_dataflow(beam_args):
        _tell_of_the_job()
    pipeline = beam.Pipeline(options=PipelineOptions(list(beam_args)))
    try:
        with pipeline:
            build(pipeline)
    except KeyboardInterrupt:
        # On another machine it would go on, and be in the way of the same command.
        if getattr(pipeline, "result", None):
            pipeline.result.cancel()
        raise
    finally:
        close_all()


def _tell_of_the_job() -> None:
    """Shows what Beam logs of a job on Dataflow: its number, its page, and how it fares."""
    logger = logging.getLogger(_DATAFLOW)
    if not logger.handlers:
        shown = logging.StreamHandler()
        shown.addFilter(_is_of_the_job)
        shown.setFormatter(logging.Formatter("Dataflow: %(message)s"))
        logger.addHandler(shown)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _is_of_the_job(record: logging.LogRecord) -> bool:
    # The client logs all that it uploads as well.
    by_client = record.name.endswith(".apiclient") and record.levelno < logging.WARNING
    return not by_client or record.getMessage().startswith(("Created job", "To access"))
