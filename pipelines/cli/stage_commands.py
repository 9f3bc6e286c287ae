"""Parsers of `run` and of the single stages: a preset, changes to it, and Beam's options."""

from collections.abc import Sequence
from typing import Any, NoReturn

from vqbeam import configs
from vqbeam.configs import SECTIONS, DataConfig
from vqbeam.pipelines.cli.parser import (
    BEAM_HELP,
    RUN,
    Parser,
    above_zero,
    add_config,
    in_range,
    location,
    nonempty,
    overridden,
    run_location,
)
from vqbeam.pipelines.paths import with_runner

STAGES = ("prepare", "train-vqvae", "encode", "train-prior", "sample")
MODELS = ("train-vqvae", "train-prior")

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
    """Returns the arguments of `run_stages`, with one stage, or all of them for `run`."""
    rest = "PRESET --run-dir DIR [--smoke] [--SECTION.FIELD VALUE ...] [Beam options]"
    others = _OTHERS if parser.verb == "encode" else ""
    parser.describe(rest, epilog=BEAM_HELP + _EXAMPLE.format(verb=parser.verb) + others)
    _add_own_flags(parser)
    if {"-h", "--help"} & {*words}:
        _show_help(parser, words)
    flags = add_config(parser, SECTIONS) | add_log(parser)

    given = parser.parse_words(words, beam=True)
    config = configs.load_preset(given["PRESET"])
    if given["--smoke"]:
        config = configs.smoke(config)
    if "--init-from" in given:
        for section in ("vqvae", "prior"):
            given.setdefault(flags[f"{section}.init_from"], given["--init-from"])
    if given.get("--extend") and given.get("--minutes"):
        parser.error("--minutes and --extend exclude each other; give the steps")
    return {
        "config": overridden(config, given, flags),
        "run_dir": given["--run-dir"],
        "stages": STAGES if parser.verb == "run" else (parser.verb,),
        "beam_args": with_runner(given.get("beam_args", [])),
        "retrain": given.get("--retrain", []),
        "minutes": given.get("--minutes"),
        "extend": given.get("--extend", False),
    }


_MODEL_EXAMPLE = """

example:
  vqbeam encode --model runs/fashion --data.source folder:shoes --output codes/shoes"""
_OTHERS = """

The codes of other images by a trained model: vqbeam encode --model --help"""


def parse_encode(parser: Parser, words: Sequence[str]) -> dict[str, Any]:
    """Returns the arguments of `run_encode`, for the stage of a run or for `--model`."""
    if not any(word.partition("=")[0] == "--model" for word in words):
        return parse_stages(parser, words)
    rest = "--model RUN --data.source SOURCE --output DIR [--data.FIELD VALUE ...] [Beam options]"
    parser.describe(rest, epilog=BEAM_HELP + _MODEL_EXAMPLE)
    folder = f"{RUN}, with a trained VQ-VAE; it also says how large images are"
    parser.add("--model", run_location, folder, metavar="RUN", required=True)
    output = "the folder of the codes; images that are there already, by key, are skipped"
    parser.add("--output", location, output, metavar="DIR", required=True)
    names = [name for name, *_ in configs.field_types() if name.startswith("data.")]
    of_run = ("data.height", "data.width", "data.channels", "data.fit")
    group = parser.add_argument_group("data", "The images; by default, none is held out.")
    wanted = [name for name in names if name not in of_run]
    flags = parser.add_fields(wanted, "--data.", group)
    if {"-h", "--help"} & {*words}:
        parser.print_help()
        raise SystemExit(0)
    given = parser.parse_words(words, beam=True)
    if "--data.source" not in given:
        parser.error("missing --data.source")
    values = {name.partition(".")[2]: given[flag] for name, flag in flags.items() if flag in given}
    return {
        "run_dir": given["--model"],
        "output": given["--output"],
        "data": in_range(lambda: DataConfig(**{"validation_share": 0.0} | values), flags),
        "beam_args": with_runner(given.get("beam_args", [])),
    }


def run_encode(**arguments: Any) -> str | None:
    """Does the work; its libraries load only now."""
    if "stages" in arguments:
        return run_stages(**arguments)
    from vqbeam.pipelines.stages.encode_source import encode_source

    return encode_source(**arguments)


def _show_help(parser: Parser, words: Sequence[str]) -> NoReturn:
    """Prints the help, of the topic and with the defaults of the preset in the words; exits."""
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
    add_log(parser)
    add_config(parser, sections, fields, configs.load_preset(preset) if preset else None)
    parser.print_help()
    raise SystemExit(0)


def add_log(parser: Parser) -> dict[str, str]:
    """Adds `--log`; returns the flag by the field's name."""
    return parser.add_fields(["log"], "--", group=None)


def _add_own_flags(parser: Parser) -> None:
    parser.add("PRESET", nonempty, "a name from `vqbeam presets`, or a .py file that sets CONFIG")
    folder = "the run's folder; created if needed"
    parser.add("--run-dir", location, folder, metavar="DIR", required=True)
    parser.add_switch(
        "--smoke", "a tiny version of the preset that runs in seconds, to try the commands"
    )
    if parser.verb == "run":
        minutes = "choose the training steps so that all stages take about X minutes"
        parser.add("--minutes", above_zero, minutes, metavar="X")
    models = [stage for stage in MODELS if parser.verb in ("run", stage)]
    if models:
        again = "train the model of this stage again: deletes the stage's folder first"
        parser.add("--retrain", str, again, choices=models, action="append", metavar="STAGE")
    begin = "start training from the weights of another run or hf://USER/NAME, both if it has them"
    parser.add("--init-from", run_location, begin, metavar="DIR")
    if models:
        parser.add_switch("--extend", "a finished model goes on to more training steps")


def run_stages(**arguments: Any) -> str | None:
    """Does the work; its libraries load only now."""
    from vqbeam.pipelines.run import run_stages

    return run_stages(**arguments)
