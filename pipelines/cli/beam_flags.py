"""Beam's own options: checked by name and passed on as given."""

import argparse
import difflib
from collections.abc import Callable
from typing import Any

BEAM_HELP = """\
Beam options:
  Every option of Apache Beam is passed on to Beam, for example
    --direct_num_workers 4 --direct_running_mode multi_threading
    --runner DataflowRunner --project P --region R --temp_location gs://BUCKET/tmp
  Without --runner the work is done on this machine, by Beam's FnApiRunner."""


# Options of Beam that vqbeam cannot support.
_REFUSED = {
    "--no_wait_until_finish": "vqbeam waits for the job, to report its result",
    "--template_location": "vqbeam starts the job itself and makes no template",
}


def add_beam_flags(parser: argparse.ArgumentParser) -> None:
    """Adds Beam's own flags to a parser, which passes them on as text, in `beam_args`.

    Beam itself only warns of unknown flags and accepts abbreviated ones; a parser that knows all
    flags by their full names can refuse both.
    """
    for action in _beam_actions():
        flags = [flag for flag in action.option_strings if flag not in parser.flags]
        if flags:
            parser.add_argument(
                *flags,
                dest="beam_args",
                default=argparse.SUPPRESS,
                action=_PassOn,
                nargs=action.nargs,
                type=_runner if "--runner" in flags else _as_given(action.type or str),
                choices=action.choices,
            )


def _beam_actions() -> list[argparse.Action]:
    from apache_beam.options.pipeline_options import PipelineOptions, _BeamArgumentParser

    # An extension may redefine a flag of Beam; the later definition counts.
    beam = _BeamArgumentParser(add_help=False, conflict_handler="resolve")
    classes = PipelineOptions.__subclasses__()
    while classes:
        options = classes.pop(0)
        options._add_argparse_args(beam)
        classes += options.__subclasses__()
    return beam._actions


class _PassOn(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        if option_string in _REFUSED:
            raise argparse.ArgumentError(self, _REFUSED[option_string])
        word = f"{option_string}={values}" if isinstance(values, str) else option_string
        namespace.beam_args = [*getattr(namespace, "beam_args", []), word]


def _as_given(convert: Callable[[str], Any]) -> Callable[[str], str]:
    def check(text: str) -> str:
        try:
            convert(text)
        except (TypeError, ValueError):
            raise argparse.ArgumentTypeError(f"Beam does not take {text!r} here") from None
        return text

    return check


def _runner(name: str) -> str:
    """Returns the name of a runner; for an unknown one, Beam would end with a traceback."""
    from apache_beam.options.pipeline_options import StandardOptions
    from apache_beam.runners.runner import create_runner

    if "dask" in name.lower():
        raise argparse.ArgumentTypeError(
            "Beam's DaskRunner silently drops data (seen in 2.77); use another runner"
        )
    try:
        create_runner(name)
    except ValueError:
        known = {_short(full): full for full in StandardOptions.KNOWN_RUNNER_NAMES}
        close = difflib.get_close_matches(_short(name), known, n=1)
        others = "use FnApiRunner, FlinkRunner, SparkRunner or DataflowRunner"
        hint = f"did you mean {known[close[0]]}?" if close else others
        raise argparse.ArgumentTypeError(f"there is no runner {name!r}; {hint}") from None
    except (ImportError, AttributeError) as error:
        raise argparse.ArgumentTypeError(f"{name!r} does not load: {error}") from None
    return name


def _short(runner: str) -> str:
    return runner.lower().removesuffix("runner")
