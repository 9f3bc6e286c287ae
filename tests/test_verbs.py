import pytest

from vqbeam.pipelines.cli.verbs import VERBS, function, verb_parser
from vqbeam.vqvae.storage.run_folder import STAGES


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
def test_names_of_functions_that_exist(verb):
    assert callable(function(verb.grammar))
    assert callable(function(verb.work))


def test_the_parser_of_a_verb(capsys):
    with pytest.raises(SystemExit):
        verb_parser("presets", "WORDS").parse_words(["--help"])
    shown = capsys.readouterr().out
    summary = "List the presets, or the settings of one."
    assert shown.startswith(f"usage: vqbeam presets WORDS\n\n{summary}\n")


def test_only_stages_are_needed():
    for verb in VERBS.values():
        assert set(verb.needs) <= set(STAGES)
