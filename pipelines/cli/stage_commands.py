"""The words of `run` and of each stage: a preset, changes to it, and Beam's own flags."""

from collections.abc import Sequence
from typing import Any

from vqbeam import configs
from vqbeam.configs import SECTIONS
from vqbeam.pipelines.cli.beam_flags import BEAM_HELP
from vqbeam.pipelines.cli.config_flags import add_config, overridden
from vqbeam.pipelines.cli.parser import Parser, location, nonempty
from vqbeam.pipelines.places import with_runner

STAGES = ("prepare", "train-vqvae", "encode", "train-prior", "sample")

_EXAMPLE = """

example:
  vqbeam {verb} glyphs --run-dir runs/glyphs --vqvae.num-codes 128 --seed 1"""


def parse_stages(parser: Parser, words: Sequence[str]) -> dict[str, Any]:
    """Returns the arguments of `run_stages`: one stage, or for `run` all of them."""
    rest = "PRESET --run-dir DIR [--smoke] [--SECTION.FIELD VALUE ...] [Beam options]"
    parser.describe(rest, epilog=BEAM_HELP + _EXAMPLE.format(verb=parser.verb))
    parser.add("PRESET", nonempty, "a name from `vqbeam presets`, or a .py file that sets CONFIG")
    folder = "the run's folder; made if it is not there"
    parser.add("--run-dir", location, folder, metavar="DIR", required=True)
    parser.add_argument(
        "--smoke",
        dest="--smoke",
        action="store_true",
        help="shrink the preset to run in seconds; its pictures are gray",
    )
    flags = add_config(parser, SECTIONS)

    given = parser.parse_words(words, beam=True)
    config = configs.load_preset(given["PRESET"])
    if given["--smoke"]:
        config = configs.smoke(config)
    return {
        "config": overridden(config, given, flags),
        "run_dir": given["--run-dir"],
        "stages": STAGES if parser.verb == "run" else (parser.verb,),
        "beam_args": with_runner(given.get("beam_args", [])),
    }


def run_stages(**arguments: Any) -> str | None:
    """Does the work; its libraries load only now."""
    from vqbeam.pipelines.run import run_stages

    return run_stages(**arguments)
