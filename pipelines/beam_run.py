"""Running a Beam pipeline from the command line."""

from collections.abc import Callable, Sequence

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions

from pipelines.progress import close_all


def run_pipeline(beam_args: Sequence[str], build: Callable[[beam.Pipeline], object]) -> None:
    """Runs what `build` puts into a pipeline, to its end; an interrupted job is cancelled.

    Args:
        beam_args: Beam's own options, such as `["--runner=FnApiRunner"]`.
        build: Gets the pipeline.
    """
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
