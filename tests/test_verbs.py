import pytest

from vqbeam.pipelines.cli.main import _GROUPS, VERBS
from vqbeam.pipelines.cli.parser import Parser
from vqbeam.vqvae.storage.run_folder import STAGES


def test_the_parser_of_a_verb(capsys):
    parser = Parser("presets", "list the presets")
    parser.describe("WORDS", epilog="An example.")
    with pytest.raises(SystemExit):
        parser.parse_words(["--help"])
    shown = capsys.readouterr().out
    assert shown.startswith("usage: vqbeam presets WORDS\n\nList the presets.\n")
    assert shown.endswith("An example.\n")


def test_only_stages_are_needed():
    for verb in VERBS.values():
        assert set(verb.needs) <= set(STAGES)


def test_the_help_shows_every_verb_once():
    shown = [name for names in _GROUPS.values() for name in names]
    assert sorted(shown) == sorted(VERBS)
