"""The grammar of the command line: words in, a checked `Command` out. Starts nothing."""

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any

from vqbeam.pipelines.cli.parser import Parser, UsageError
from vqbeam.pipelines.cli.verbs import VERBS, function

_TOP_DESCRIPTION = """\
Learns to draw images like those of a dataset: a VQ-VAE turns them into grids of codes,
a transformer learns the codes. Every stage scales with Apache Beam.

verbs:
{verbs}

example:
  vqbeam run glyphs --run-dir runs/glyphs
  vqbeam sample runs/glyphs --num 26 --output letters.png

"vqbeam VERB --help" says more about a verb."""


@dataclasses.dataclass(frozen=True)
class Command:
    """What the user asked for.

    Attributes:
        verb: One of `VERBS`.
        arguments: The keyword arguments of the function that does the verb's work.
    """

    verb: str
    arguments: dict[str, Any]


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
    if verb == "help":
        verb, words = [*words, "--help"][0], ["--help"]
    if verb.startswith("-"):
        _top_parser().parse_words([verb])
    if verb not in VERBS:
        close = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean {close[0]}?" if close else "see vqbeam --help"
        raise UsageError(f"vqbeam: unknown verb {verb!r}; {hint}")
    return Command(verb, function(VERBS[verb].grammar)(verb, words))


def _top_parser() -> Parser:
    verbs = "\n".join(f"  {name:<13} {verb.summary}" for name, verb in VERBS.items())
    return Parser("", "VERB ...", description=_TOP_DESCRIPTION.format(verbs=verbs))
