"""The grammar of the command line: words in, a checked `Command` out. Starts nothing."""

import argparse
import dataclasses
import difflib
import importlib.metadata
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn, get_args

import configs
from configs import SECTIONS, Config, SampleConfig, VqbeamError

STAGES = ("prepare", "train-vqvae", "encode", "train-prior", "sample")

VERBS = {
    "run": "take a dataset to new images: all stages as one Beam pipeline",
    "prepare": "write the images of a dataset, cropped and resized, as TFRecords",
    "train-vqvae": "train the VQ-VAE on the prepared images",
    "encode": "turn every image into a grid of codes, as TFRecords",
    "train-prior": "train the transformer prior on the codes",
    "sample": "draw new images from a trained run",
    "reconstruct": "draw held-out images above their reconstructions",
    "inspect": "show what is in a run: stages, sizes, losses, codebook use",
    "presets": "list the presets, a line each",
}

_TOP_DESCRIPTION = """\
Learns to draw images like those of a dataset: a VQ-VAE turns them into grids of codes,
a transformer learns the codes. Every stage scales with Apache Beam.

verbs:
{verbs}

example:
  vqbeam run glyphs --run-dir runs/glyphs
  vqbeam sample runs/glyphs --num 26 --output letters.png

"vqbeam VERB --help" says more about a verb."""

_BEAM_HELP = """\
Beam options:
  Every option of Apache Beam is passed on to Beam, for example
    --direct_num_workers 4 --direct_running_mode multi_processing
    --runner DataflowRunner --project P --region R --temp_location gs://BUCKET/tmp
  Without --runner the work is done on this machine, by Beam's FnApiRunner.

example:
  vqbeam {verb} glyphs --run-dir runs/glyphs --vqvae.num-codes 128 --seed 1"""


@dataclasses.dataclass(frozen=True)
class Command:
    """What the user asked for.

    Attributes:
        verb: One of `VERBS`.
        arguments: The keyword arguments of the function that does the verb's work.
    """

    verb: str
    arguments: dict[str, Any]


class UsageError(Exception):
    """The command line is wrong; the message is all that the user needs to see."""


def parse(argv: Sequence[str]) -> Command:
    """Returns the command that the words of a command line stand for.

    Args:
        argv: The words behind `vqbeam`.

    Raises:
        UsageError: A verb or flag is unknown, or something is missing or malformed.
        VqbeamError: The preset does not exist, or a value is out of its range.
        SystemExit: Help or the version was asked for, and has been printed.
    """
    if not argv:
        raise UsageError(_top_parser().format_help().rstrip())
    verb, words = argv[0], argv[1:]
    if verb.startswith("-"):
        _top_parser().parse_words([verb])
    if verb not in VERBS:
        close = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean {close[0]}?" if close else "see vqbeam --help"
        raise UsageError(f"vqbeam: unknown verb {verb!r}; {hint}")
    parse_verb = {
        "sample": _parse_sample,
        "reconstruct": _parse_reconstruct,
        "inspect": _parse_inspect,
        "presets": _parse_presets,
    }
    if verb in parse_verb:
        return Command(verb, parse_verb[verb](words))
    return Command(verb, _parse_stages(verb, words))


def _parse_stages(verb: str, words: Sequence[str]) -> dict[str, Any]:
    rest = "PRESET --run-dir DIR [--smoke] [--SECTION.FIELD VALUE ...] [Beam options]"
    parser = _Parser(verb, rest, epilog=_BEAM_HELP.format(verb=verb))
    parser.add("PRESET", _text, "a name from `vqbeam presets`, or a .py file that sets CONFIG")
    parser.add("--run-dir", _text, "the run's folder, which may be gs://...", required=True)
    parser.add_argument(
        "--smoke", dest="--smoke", action="store_true", help="shrink the preset to run in seconds"
    )
    parser.add("--seed", int, "seed of all random numbers (unset: the preset's)")
    flags = {"seed": "--seed"}
    for section, cls in SECTIONS.items():
        title = f"config: {section} (unset: the preset's value)"
        group = parser.add_argument_group(title, cls.__doc__)
        flags |= parser.add_fields(section, f"--{section}.", group)

    given = parser.parse_words(words, beam=True)
    config = configs.load_preset(given["PRESET"])
    if given["--smoke"]:
        config = configs.smoke(config)
    values = {name: given[flag] for name, flag in flags.items() if flag in given}
    return {
        "config": _in_range(lambda: configs.override(config, values), flags),
        "run_dir": given["--run-dir"],
        "stages": STAGES if verb == "run" else (verb,),
        "beam_args": _with_runner(given["beam_args"]),
    }


def _parse_sample(words: Sequence[str]) -> dict[str, Any]:
    parser = _Parser("sample", "DIR [options]")
    parser.add("DIR", _text, "the run's folder")
    parser.add("--output", _text, ".png: a labelled grid; .npz: arrays; else a folder of PNGs")
    parser.add(
        "--label",
        _text,
        "the classes to draw, in turn (unset: all of them)",
        nargs="+",
        action="extend",
        metavar="NAME-OR-ID",
    )
    parser.add("--seed", int, "image i of a seed is always the same image")
    group = parser.add_argument_group("settings", "What is unset is as the run's config says.")
    flags = parser.add_fields("sample", "--", group)

    given = parser.parse_words(words)
    settings = {name.partition(".")[2]: given.get(flag) for name, flag in flags.items()}
    changes = {name: value for name, value in settings.items() if value is not None}
    _in_range(lambda: SampleConfig(**changes), flags)
    return settings | {
        "run_dir": given["DIR"],
        "labels": given.get("--label"),
        "seed": given.get("--seed"),
        "output": given.get("--output"),
    }


def _parse_reconstruct(words: Sequence[str]) -> dict[str, Any]:
    parser = _Parser("reconstruct", "DIR --output FILE.png [--num N]")
    parser.add("DIR", _text, "the run's folder")
    parser.add("--output", _text, "the .png file to write", metavar="FILE.png", required=True)
    parser.add("--num", _count, "images to draw (default: 16)", metavar="N", default=16)
    given = parser.parse_words(words)
    return {"run_dir": given["DIR"], "output": given["--output"], "num": given["--num"]}


def _parse_inspect(words: Sequence[str]) -> dict[str, Any]:
    parser = _Parser("inspect", "DIR")
    parser.add("DIR", _text, "the run's folder")
    return {"run_dir": parser.parse_words(words)["DIR"]}


def _parse_presets(words: Sequence[str]) -> dict[str, Any]:
    _Parser("presets", "").parse_words(words)
    return {}


class _Parser(argparse.ArgumentParser):
    """An argument parser of one verb, whose errors are one line each."""

    def __init__(self, verb: str, usage: str, **texts: str):
        summary = VERBS.get(verb, "")
        super().__init__(
            prog=f"vqbeam {verb}".strip(),
            usage=f"vqbeam {verb} {usage}".rstrip(),
            **{"description": f"{summary[:1].upper()}{summary[1:]}."} | texts,
            formatter_class=_formatter,
            allow_abbrev=False,
            add_help=False,
        )
        self.add_argument("-h", "--help", action="help", help="show this text and exit")
        self.add_argument(
            "--version", action="version", version=_version(), help="show the version and exit"
        )

    def add(
        self, name: str, convert: Callable[[str], Any], help: str, group: Any = None, **options: Any
    ) -> None:
        """Adds a flag or positional; it is in `parse_words`'s answer, by its name, if given."""
        convert, metavar = _KINDS.get(convert, (convert, None))
        if name.startswith("-"):
            options = {"dest": name, "default": argparse.SUPPRESS, "metavar": metavar} | options
        (group or self).add_argument(
            name, type=convert, help=help.replace("%", "%%"), **options
        )
