"""Parser of `run` and of the single stages: a preset, changes to it, and Beam's options."""

from collections.abc import Sequence
from typing import Any, NoReturn

from vqbeam import configs
from vqbeam.configs import SECTIONS
from vqbeam.pipelines.cli.beam_flags import BEAM_HELP
from vqbeam.pipelines.cli.parser import (
    Parser,
    above_zero,
    add_config,
    location,
    nonempty,
    overridden,
)
from vqbeam.pipelines.paths import with_runner

STAGES = ("prepare", "train-vqvae", "encode", "train-prior", "sample")

# The flags that `--help` shows without a topic.
_COMMON = (
    "data.source",
    "data.height",
    "data.width",
    "vqvae.quantizer",
    "vqvae.num_codes",
    "vqvae.code_dim",
    "vqvae.batch_size",
    "vqvae.steps",
    "prior.layers",
    "prior.width",
    "prior.batch_size",
    "prior.steps",
    "sample.num",
    "sample.guidance",
)
_TOPICS = (*SECTIONS, "all")

_EXAMPLE = """

example:
  vqbeam {verb} glyphs --run-dir runs/glyphs --vqvae.num-codes 128 --seed 1"""


def parse_stages(parser: Parser, words: Sequence[str]) -> dict[str, Any]:
    """Returns the arguments of `run_stages`: one stage, or for `run` all of them."""
    rest = "PRESET --run-dir DIR [--smoke] [--SECTION.FIELD VALUE ...] [Beam options]"
    parser.describe(rest, epilog=BEAM_HELP + _EXAMPLE.format(verb=parser.verb))
    _add_own_flags(parser)
    if {"-h", "--help"} & {*words}:
        _show_help(parser, words)
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
        "retrain": given.get("--retrain", []),
        "minutes": given.get("--minutes"),
    }


def _show_help(parser: Parser, words: Sequence[str]) -> NoReturn:
    """Prints the help of a topic with the defaults of a preset, if the words name them; exits."""
    named = [word for word in words if not word.startswith("-")]
    topic = next((word for word in named if word in _TOPICS), None)
    preset = next((word for word in named if word in configs.preset_names()), None)
    if topic is None:
        sections, fields = SECTIONS, _COMMON
        parser.epilog = (
            f"More flags: vqbeam {parser.verb} --help {'|'.join(_TOPICS)}\n"
            f"Defaults of a preset: vqbeam {parser.verb} PRESET --help\n\n{parser.epilog}"
        )
    else:
        sections, fields = (SECTIONS if topic == "all" else [topic]), None
    add_config(parser, sections, fields, configs.load_preset(preset) if preset else None)
    parser.print_help()
    raise SystemExit(0)


def _add_own_flags(parser: Parser) -> None:
    parser.add("PRESET", nonempty, "a name from `vqbeam presets`, or a .py file that sets CONFIG")
    folder = "the run's folder; created if needed"
    parser.add("--run-dir", location, folder, metavar="DIR", required=True)
    parser.add_argument(
        "--smoke",
        dest="--smoke",
        action="store_true",
        help="a tiny version of the preset that runs in seconds, to try the commands",
    )
    if parser.verb == "run":
        minutes = "choose the training steps so that all stages take about X minutes"
        parser.add("--minutes", above_zero, minutes, metavar="X")
    again = "train the model of this stage again: deletes the stage's folder first"
    models = ("train-vqvae", "train-prior")
    parser.add("--retrain", str, again, choices=models, action="append", metavar="STAGE")


def run_stages(**arguments: Any) -> str | None:
    """Does the work; its libraries load only now."""
    from vqbeam.pipelines.run import run_stages

    return run_stages(**arguments)
