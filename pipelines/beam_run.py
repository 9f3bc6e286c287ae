"""Running a Beam pipeline from the command line."""

from collections.abc import Callable, Sequence

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions

from pipelines.progress import close_all


def run_pipeline(beam_args: Sequence[str], build: Callable[[beam.Pipeline], object]) -> None:
    """Runs what `build` puts into a pipeline, to its end.

    Args:
        beam_args: Beam's own options, such as `["--runner=FnApiRunner"]`.
        build: Gets the pipeline.
    """
    try:
        with beam.Pipeline(options=PipelineOptions(list(beam_args))) as pipeline:
            build(pipeline)
    finally:
        close_all()


def runner_of(beam_args: Sequence[str]) -> str:
    """Returns the name of the runner that Beam's options ask for; empty where they do not."""
    return PipelineOptions(list(beam_args)).view_as(StandardOptions).runner or ""
