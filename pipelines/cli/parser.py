"""Parses the words of a command, including Beam's own flags."""

import argparse
import dataclasses
import difflib
import importlib.metadata
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn, get_args

from vqbeam import configs
from vqbeam.configs import SECTIONS, Config, VqbeamError
from vqbeam.configs.schema import fsq_codes
from vqbeam.pipelines.paths import HUB, SUPPORTED_PATHS, is_supported, with_absolute_paths


class UsageError(Exception):
    """A mistake on the command line; the message is all that the user needs."""


class Parser(argparse.ArgumentParser):
    """An argument parser of one command, whose errors are one line each."""

    def __init__(self, verb: str, summary: str = ""):
        self.verb = verb
        super().__init__(
            prog=f"vqbeam {verb}".strip(),
            description=f"{summary[:1].upper()}{summary[1:]}." if summary else None,
            formatter_class=_formatter,
            allow_abbrev=False,
            add_help=False,
        )
        self.add_argument("-h", "--help", action="help", help="show this text and exit")
        self.add_argument(
            "--version", action="version", version=_version(), help="show the version and exit"
        )

    def describe(self, usage: str, **texts: str) -> None:
        """Sets the usage in the help, and optionally its `description` and `epilog`."""
        self.usage = " ".join(filter(None, ("vqbeam", self.verb, usage)))
        for name, text in texts.items():
            setattr(self, name, text)

    def add(self, name: str, kind: Any, help: str, group: Any = None, **options: Any) -> None:
        """Adds a positional argument or a flag; `parse_words` returns it by name, if given."""
        if name.startswith("-"):
            options = {"dest": name, "default": argparse.SUPPRESS} | options
        convert, metavar = KINDS.get(kind, (kind, None))
        options = {"type": convert, "metavar": metavar, "help": help.replace("%", "%%")} | options
        (group or self).add_argument(name, **options)

    def add_switch(self, flag: str, help: str) -> None:
        """Adds a flag without a value; `parse_words` returns whether it was given."""
        self.add_argument(flag, dest=flag, action="store_true", help=help)

    def add_fields(
        self, names: Iterable[str], prefix: str, group: Any, defaults: Any = None
    ) -> dict[str, str]:
        """Adds a flag for each config field; returns the flags by the field's dotted name.

        Args:
            names: Dotted names of the fields.
            prefix: The part of the flag before the field's own name, such as "--vqvae.".
            group: The group of flags in the help.
            defaults: The config section whose values the help shows as defaults; None for none.
        """
        flags, wanted = {}, set(names)
        for name, field, kind in configs.field_types():
            if name in wanted:
                flags[name] = prefix + field.name.replace("_", "-")
                choices = field.metadata["choices"]
                metavar = f"{{{','.join(choices)}}}" if choices else KINDS[kind][1]
                convert = _optional(kind) if _takes_none(field) else kind
                help = _field_help(field, getattr(defaults, field.name, None))
                self.add(flags[name], convert, help, group, metavar=metavar)
        return flags

    def parse_words(self, words: Sequence[str], beam: bool = False) -> dict[str, Any]:
        """Returns the given arguments by name; with `beam`, Beam's options as "beam_args"."""
        words = self._spelled(words)
        unknown = self._unknown_flags(words)
        if unknown and beam:
            add_beam_flags(self)
            words = self._spelled(words)
            unknown = self._unknown_flags(words)
        if unknown:
            hint = _flag_hint(unknown[0], self.flags) or self._value_hint(words, unknown[0])
            raise UsageError(f"vqbeam: unknown flag {unknown[0]}; {hint}")
        given, stray = self.parse_known_args(words)
        if stray:
            self.error(f"unexpected argument {stray[0]!r}")
        return vars(given)

    @property
    def flags(self) -> list[str]:
        """All flags added so far."""
        return list(self._option_string_actions)

    def _spelled(self, words: Sequence[str]) -> list[str]:
        """Returns the words with flags spelled as registered, with dashes or underscores."""
        registered = {flag.replace("_", "-"): flag for flag in self.flags}
        spelled = []
        for word in words:
            flag = _flag(word)
            known = registered.get(flag.replace("_", "-"), flag)
            spelled.append(known + word[len(flag) :])
        return spelled

    def _unknown_flags(self, words: Sequence[str]) -> list[str]:
        return [_flag(word) for word in words if _flag(word) and _flag(word) not in self.flags]

    def _value_hint(self, words: Sequence[str], unknown: str) -> str:
        """Returns how to give a value that begins with a dash, if the word may be one."""
        before = [_flag(word) for word in words[: list(map(_flag, words)).index(unknown)]]
        if before and before[-1] and not unknown.startswith("--"):
            return f"a value that begins with a dash is given as {before[-1]}={unknown}"
        return f"see {self.prog} --help"

    def error(self, message: str) -> NoReturn:
        """Raises a UsageError; argparse would print the usage and exit."""
        message = message.removeprefix("argument ")
        message = message.replace("the following arguments are required:", "missing")
        message = re.sub(r"expected (one|at least one) argument$", "needs a value", message)
        message = re.sub(r"ignored explicit argument .*", "takes no value", message)
        raise UsageError(f"{self.prog}: {message} (see {self.prog} --help)")


def _formatter(prog: str) -> argparse.HelpFormatter:
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=36, width=100)


def _version() -> str:
    try:
        return f"vqbeam {importlib.metadata.version('vqbeam')}"
    except importlib.metadata.PackageNotFoundError:
        return "vqbeam (not installed)"


def _flag(word: str) -> str:
    """Returns the flag at the start of a word, or "" if it is not a flag."""
    is_flag = word.startswith("-") and not re.fullmatch(r"-+|-[\d.].*", word)
    return word.partition("=")[0] if is_flag else ""


# Names of flags in other programs, with the flags or a hint for the same purpose here.
ELSEWHERE = {
    "epochs max-epochs num-epochs n-epochs": "--vqvae.steps --prior.steps",
    "max-steps iterations iters": "--vqvae.steps --prior.steps",
    "k n-embed codebook-size num-embeddings vocab-size": "--vqvae.num-codes",
    "d embed-dim embedding-dim latent-dim z-channels": "--vqvae.code-dim",
    "beta commitment-cost commitment-weight": "--vqvae.commitment",
    "lr base-lr": "--vqvae.learning-rate --prior.learning-rate",
    "bs batch": "--vqvae.batch-size --prior.batch-size --batch-size",
    "wd": "--prior.weight-decay",
    "layers n-layer depth": "--prior.layers",
    "n-head": "--prior.heads",
    "bf16 fp16 amp precision mixed-precision": "--vqvae.dtype --prior.dtype",
    "data dataset data-path dataset-name": "--data.source",
    "image-size resolution size img-size": "--data.height --data.width",
    "cfg cfg-scale guidance-scale": "--guidance --sample.guidance",
    "temp t": "--temperature --sample.temperature",
    "n n-samples num-samples num-images": "--num --sample.num",
    "class classes class-label cond": "--label",
    "o out output dir out-dir outdir output-dir save-dir logdir": "--output --run-dir",
    "num-workers workers jobs j": "--direct_num_workers",
    "resume continue": "the same command goes on where it stopped",
    "force overwrite restart": "--retrain",
    "retrain extend": "it belongs to vqbeam run and to the stage that trains the model",
    "gpu gpus device cuda": "a GPU is used where the backend finds one",
}


def _flag_hint(flag: str, known: Iterable[str]) -> str:
    spelled = {name.replace("_", "-"): name for name in known}
    wanted = "--" + flag.strip("-").replace("_", "-").lower()
    for words, here in ELSEWHERE.items():
        if wanted.strip("-") in words.split():
            if not here.startswith("--"):
                return here if "--run-dir" in spelled else ""
            if flags := [name for name in here.split() if name in spelled]:
                return f"did you mean {' or '.join(flags)}?"
    fields = [name for name in spelled if name.endswith("." + wanted.strip("-"))]
    close = fields or difflib.get_close_matches(wanted, spelled, n=1)
    return f"did you mean {' or '.join(spelled[name] for name in close)}?" if close else ""


def _takes_none(field: dataclasses.Field) -> bool:
    return type(None) in get_args(field.type)


def _field_help(field: dataclasses.Field, default: Any) -> str:
    limits = field.metadata
    low, high = (
        f"{limits[key]:,}" if limits[key] is not None else "" for key in ("minimum", "maximum")
    )
    span = f"{low} to {high}" if low and high else f"at least {low}" if low else f"at most {high}"
    notes = [span] if low or high else []
    if _takes_none(field):
        notes.append('or "none"')
    if default not in (None, ""):
        notes.append(f"default {default}")
    return field.metadata["help"] + (f" ({'; '.join(notes)})" if notes else "")


def nonempty(text: str) -> str:
    """Returns the text, which must not be empty."""
    if not text:
        raise argparse.ArgumentTypeError("is empty")
    return text


def location(text: str) -> str:
    """Returns the path, with "~" expanded."""
    if not is_supported(nonempty(text)):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used; {SUPPORTED_PATHS}")
    return os.path.expanduser(text)


# Help text for the location of a run of which only the models are used.
RUN = "the run's folder, or hf://USER/NAME[@REVISION]"


def run_location(text: str) -> str:
    """Returns the path of a run, with "~" expanded; it may begin with hf://."""
    return text if text.startswith(HUB) else location(text)


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer") from None


def count(text: str) -> int:
    """Returns the integer, at least 1."""
    return _at_least(1, text)


def natural(text: str) -> int:
    """Returns the integer, at least 0."""
    return _at_least(0, text)


def above_zero(text: str) -> float:
    """Returns the number, above 0."""
    if _number(text) <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return float(text)


def _at_least(minimum: int, text: str) -> int:
    if _whole(text) < minimum:
        raise argparse.ArgumentTypeError(f"{text} is not at least {minimum}")
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
    convert = KINDS[kind][0]
    return lambda text: None if text == "none" else convert(text)


# By type, the function that converts a word, and its placeholder in the help.
KINDS = {int: (_whole, "N"), float: (_number, "X"), str: (nonempty, "TEXT")}


def add_config(
    parser: Parser,
    sections: Iterable[str],
    fields: Iterable[str] | None = None,
    defaults: Config | None = None,
) -> dict[str, str]:
    """Adds `--seed` and flags for config fields; returns the flags by dotted name.

    Args:
        parser: The parser.
        sections: Names of the sections whose fields are added.
        fields: Dotted names of the fields to add; None for all.
        defaults: The config whose values the help shows as defaults; None for none.
    """
    parser.add("--seed", int, "seed of all random numbers")
    flags = {"seed": "--seed"}
    names = [name for name, *_ in configs.field_types()]
    for section in sections:
        chosen = [name for name in names if name.startswith(f"{section}.")]
        if fields is not None:
            chosen = [name for name in chosen if name in fields]
        if chosen:
            group = parser.add_argument_group(section, SECTIONS[section].__doc__.splitlines()[0])
            values = getattr(defaults, section, None)
            flags |= parser.add_fields(chosen, f"--{section}.", group, values)
    return flags


def overridden(config: Config, given: Mapping[str, Any], flags: Mapping[str, str]) -> Config:
    """Returns the config with the given flags applied."""
    values = {name: given[flag] for name, flag in flags.items() if flag in given}
    levels = values.get("vqvae.fsq_levels", config.vqvae.fsq_levels)
    if values.get("vqvae.quantizer", config.vqvae.quantizer) == "fsq":
        if "vqvae.fsq_levels" in values:
            values.setdefault("vqvae.num_codes", fsq_codes(levels) or config.vqvae.num_codes)
    elif levels != config.vqvae.fsq_levels:
        raise VqbeamError("--vqvae.fsq-levels is for fsq; add --vqvae.quantizer fsq")
    config = in_range(lambda: configs.override(config, values), flags)
    # A run may be resumed from another working directory.
    return dataclasses.replace(config, data=with_absolute_paths(config.data))


def in_range(build: Callable[[], Any], flags: Mapping[str, str]) -> Any:
    """Returns `build()`; error messages name flags in place of config fields."""
    try:
        return build()
    except VqbeamError as error:
        message = re.sub(r"[a-z]+\.[a-z_]+", lambda name: flags.get(name[0], name[0]), str(error))
        raise VqbeamError(message) from None


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
    """Adds Beam's own flags to a parser, which passes them on as text in `beam_args`.

    Beam only warns about unknown flags and accepts abbreviated ones. A parser that knows the full
    names of all flags can refuse both.
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

    # Extensions may redefine a flag of Beam; the last definition wins.
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
    """Returns the name of a runner after checking it; Beam itself would end with a traceback."""
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
