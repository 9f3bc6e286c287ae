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
from configs import SECTIONS, SampleConfig, VqbeamError
from pipelines.beam_flags import add_beam_flags, with_runner

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
    --direct_num_workers 4 --direct_running_mode multi_threading
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
    folder = "the run's folder, which may be gs://..."
    parser.add("--run-dir", _text, folder, metavar="DIR", required=True)
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
        "beam_args": with_runner(given.get("beam_args", [])),
    }


def _parse_sample(words: Sequence[str]) -> dict[str, Any]:
    parser = _Parser("sample", "DIR [options]")
    parser.add("DIR", _text, "the run's folder")
    forms = "a .png (labelled grid), a .npz (arrays) or a folder (unset: samples.png)"
    parser.add("--output", _text, forms, metavar="PATH")
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
            usage=" ".join(filter(None, ("vqbeam", verb, usage))),
            **{"description": f"{summary[:1].upper()}{summary[1:]}."} | texts,
            formatter_class=_formatter,
            allow_abbrev=False,
            add_help=False,
        )
        self.add_argument("-h", "--help", action="help", help="show this text and exit")
        self.add_argument(
            "--version", action="version", version=_version(), help="show the version and exit"
        )

    def add(self, name: str, kind: Any, help: str, group: Any = None, **options: Any) -> None:
        """Adds a positional or a flag; `parse_words` answers with it by its name, if given."""
        if name.startswith("-"):
            options = {"dest": name, "default": argparse.SUPPRESS} | options
        convert, metavar = _KINDS.get(kind, (kind, None))
        options = {"type": convert, "metavar": metavar, "help": help.replace("%", "%%")} | options
        (group or self).add_argument(name, **options)

    def add_fields(self, section: str, prefix: str, group: Any) -> dict[str, str]:
        """Adds a flag for each field of a config section; returns them by dotted name."""
        flags = {}
        for name, field, kind in configs.field_types():
            if name.startswith(f"{section}."):
                flags[name] = prefix + field.name.replace("_", "-")
                choices = field.metadata["choices"]
                metavar = f"{{{','.join(choices)}}}" if choices else _KINDS[kind][1]
                convert = _optional(kind) if _takes_none(field) else kind
                self.add(flags[name], convert, _field_help(field), group, metavar=metavar)
        return flags

    def parse_words(self, words: Sequence[str], beam: bool = False) -> dict[str, Any]:
        """Returns what the words set, by name; with `beam`, Beam's flags under "beam_args"."""
        words = self._spelled(words)
        unknown = self._unknown_flags(words)
        if unknown and beam:
            add_beam_flags(self)
            words = self._spelled(words)
            unknown = self._unknown_flags(words)
        if unknown:
            hint = _flag_hint(unknown[0], self.flags) or f"see {self.prog} --help"
            raise UsageError(f"vqbeam: unknown flag {unknown[0]}; {hint}")
        given, stray = self.parse_known_args(words)
        if stray:
            self.error(f"unexpected argument {stray[0]!r}")
        return vars(given)

    @property
    def flags(self) -> list[str]:
        return list(self._option_string_actions)

    def _spelled(self, words: Sequence[str]) -> list[str]:
        """Returns the words with dashes and underscores in flags as they are registered."""
        registered = {flag.replace("_", "-"): flag for flag in self.flags}
        spelled = []
        for word in words:
            flag = _flag(word)
            known = registered.get(flag.replace("_", "-"), flag)
            spelled.append(known + word[len(flag) :])
        return spelled

    def _unknown_flags(self, words: Sequence[str]) -> list[str]:
        return [_flag(word) for word in words if _flag(word) and _flag(word) not in self.flags]

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ")
        message = message.replace("the following arguments are required:", "missing")
        message = re.sub(r"expected (one|at least one) argument$", "needs a value", message)
        message = re.sub(r"ignored explicit argument .*", "takes no value", message)
        raise UsageError(f"{self.prog}: {message} (see {self.prog} --help)")


def _top_parser() -> _Parser:
    verbs = "\n".join(f"  {verb:<13} {summary}" for verb, summary in VERBS.items())
    return _Parser("", "VERB ...", description=_TOP_DESCRIPTION.format(verbs=verbs))


def _formatter(prog: str) -> argparse.HelpFormatter:
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=36, width=100)


def _version() -> str:
    try:
        return f"vqbeam {importlib.metadata.version('vqbeam')}"
    except importlib.metadata.PackageNotFoundError:
        return "vqbeam (not installed)"


def _flag(word: str) -> str:
    """Returns the flag that a word of the command line sets; empty if it is none."""
    is_flag = word.startswith("-") and not re.fullmatch(r"-+|-[\d.].*", word)
    return word.partition("=")[0] if is_flag else ""


def _flag_hint(flag: str, known: Iterable[str]) -> str:
    spelled = {name.replace("_", "-"): name for name in known}
    wanted = "--" + flag.strip("-").replace("_", "-").lower()
    fields = [name for name in spelled if name.endswith("." + wanted.strip("-"))]
    close = fields or difflib.get_close_matches(wanted, spelled, n=1)
    return f"did you mean {' or '.join(spelled[name] for name in close)}?" if close else ""


def _takes_none(field: dataclasses.Field) -> bool:
    return type(None) in get_args(field.type)


def _field_help(field: dataclasses.Field) -> str:
    limits = field.metadata
    low, high = (
        f"{limits[key]:,}" if limits[key] is not None else "" for key in ("minimum", "maximum")
    )
    span = f"{low} to {high}" if low and high else f"at least {low}" if low else f"at most {high}"
    notes = [span] if low or high else []
    if _takes_none(field):
        notes.append('or "none"')
    return field.metadata["help"] + (f" ({', '.join(notes)})" if notes else "")


def _in_range(build: Callable[[], Any], flags: Mapping[str, str]) -> Any:
    """Returns `build()`; what it says of a field, it says of the flag that sets the field."""
    try:
        return build()
    except VqbeamError as error:
        message = re.sub(r"[a-z]+\.[a-z_]+", lambda name: flags.get(name[0], name[0]), str(error))
        raise VqbeamError(message) from None


def _text(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("is empty")
    return text


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def _count(text: str) -> int:
    if _whole(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return int(text)


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return number


def _optional(kind: type) -> Callable[[str], Any]:
    convert = _KINDS[kind][0]
    return lambda text: None if text == "none" else convert(text)


_KINDS = {int: (_whole, "N"), float: (_number, "X"), str: (_text, "TEXT")}
