"""Running a Beam pipeline from the command line."""

import logging
import socket
from collections.abc import Callable, Sequence

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions, PortableOptions

from vqbeam.configs import VqbeamError
from vqbeam.pipelines.cli.beam_flags import is_dataflow
from vqbeam.pipelines.progress import close_all

_DATAFLOW = "apache_beam.runners.dataflow"


def run_pipeline(beam_args: Sequence[str], build: Callable[[beam.Pipeline], object]) -> None:
    """Runs what `build` puts into a pipeline, to its end; an interrupted job is cancelled.

    Args:
        beam_args: Beam's own options, such as `["--runner=FnApiRunner"]`.
        build: Gets the pipeline.

    Raises:
        VqbeamError: Nothing answers where the job service is said to be.
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
        # On another machine it would go on, and be in the way of the same command.
        if getattr(pipeline, "result", None):
            pipeline.result.cancel()
        raise
    finally:
        close_all()


def _check_service(endpoint: str | None) -> None:
    """Finds out in a moment what takes Beam five minutes, and ends with a traceback there."""
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
    said = record.getMessage()
    if record.levelno >= logging.WARNING:
        return True
    if record.name.endswith(".apiclient"):  # which tells of all that it uploads as well
        return said.startswith(("Created job", "To access"))
    return not said.startswith("Pipeline has additional dependencies")  # advice, and a long one
