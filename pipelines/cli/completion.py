"""Shell completion of commands and flags."""

import argparse
import contextlib
import io
from collections.abc import Sequence
from typing import Any

from vqbeam import configs
from vqbeam.pipelines.cli.parser import Parser, location, run_location

_EXAMPLE = """
examples:
  vqbeam completion bash > ~/.local/share/bash-completion/completions/vqbeam
  vqbeam completion zsh > ~/.zfunc/_vqbeam     (a folder of zsh's fpath)"""


def parse_completion(parser: Parser, words: Sequence[str]) -> dict[str, Any]:
    """Returns the arguments of `run_completion`."""
    parser.describe("SHELL", epilog=_EXAMPLE)
    parser.add("SHELL", str, "bash or zsh", metavar="SHELL", choices=("bash", "zsh"))
    return {"shell": parser.parse_words(words)["SHELL"]}


def run_completion(shell: str) -> str:
    """Returns a script with which a shell completes commands, flags, presets and paths."""
    import shtab

    from vqbeam.pipelines.cli.main import VERBS

    root = argparse.ArgumentParser(prog="vqbeam")
    root.add_argument("--version", action="store_true", help="show the version and exit")
    commands = root.add_subparsers()
    for name, verb in VERBS.items():
        parser = Parser(name, verb.summary)
        # To print its complete help, a command adds all its flags.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
            verb.parse(parser, ["--help", "all"])
        for action in parser._actions:
            if action.type in (location, run_location):
                action.complete = shtab.FILE
            elif action.dest == "PRESET":
                action.choices = configs.preset_names()
            elif (action.metavar or "").startswith("{"):  # argparse leaves settings unchecked
                action.choices = action.metavar.strip("{}").split(",")
        commands.add_parser(name, help=verb.summary, parents=[parser], add_help=False)
    return shtab.complete(root, shell)
