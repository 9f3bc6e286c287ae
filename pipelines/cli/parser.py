"""An argument parser that refuses every flag it does not know, in one line."""

import argparse
import dataclasses
import difflib
import importlib.metadata
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn, get_args

from vqbeam import configs
from vqbeam.pipelines.cli.beam_flags import add_beam_flags
from vqbeam.pipelines.places import KINDS_OF_PLACES, is_known


class UsageError(Exception):
    """The command line is wrong; the message is all that the user needs to see."""


class Parser(argparse.ArgumentParser):
    """An argument parser of one verb, whose errors are one line each."""

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
        """Sets what the help shows behind the verb, and its `description` or `epilog`."""
        self.usage = " ".join(filter(None, ("vqbeam", self.verb, usage)))
        for name, text in texts.items():
            setattr(self, name, text)

    def add(self, name: str, kind: Any, help: str, group: Any = None, **options: Any) -> None:
        """Adds a positional or a flag; `parse_words` answers with it by its name, if given."""
        if name.startswith("-"):
            options = {"dest": name, "default": argparse.SUPPRESS} | options
        convert, metavar = KINDS.get(kind, (kind, None))
        options = {"type": convert, "metavar": metavar, "help": help.replace("%", "%%")} | options
        (group or self).add_argument(name, **options)

    def add_fields(
        self, section: str, prefix: str, group: Any, without: Sequence[str] = ()
    ) -> dict[str, str]:
        """Adds a flag for each field of a config section; returns them by dotted name."""
        flags = {}
        for name, field, kind in configs.field_types():
            if name.startswith(f"{section}.") and field.name not in without:
                flags[name] = prefix + field.name.replace("_", "-")
                choices = field.metadata["choices"]
                metavar = f"{{{','.join(choices)}}}" if choices else KINDS[kind][1]
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
        """Every flag that is known so far."""
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
        """Raises the message as a UsageError; argparse would print the usage and exit."""
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


def nonempty(text: str) -> str:
    """Returns the text of a word that must not be empty."""
    if not text:
        raise argparse.ArgumentTypeError("is empty")
    return text


def location(text: str) -> str:
    """Returns the path that a word stands for; "~" is the user's home."""
    if not is_known(nonempty(text)):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used; {KINDS_OF_PLACES}")
    return os.path.expanduser(text)


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def count(text: str) -> int:
    """Returns the whole number, at least 1, that a word stands for."""
    return _at_least(1, text)


def natural(text: str) -> int:
    """Returns the whole number, at least 0, that a word stands for."""
    return _at_least(0, text)


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


# How a word becomes a value of a type, and what stands for it in the help.
KINDS = {int: (_whole, "N"), float: (_number, "X"), str: (nonempty, "TEXT")}
