import pytest

from pipelines.verbs import VERBS, function, verb_parser


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
def test_names_of_functions_that_exist(verb):
    assert callable(function(verb.grammar))
    assert callable(function(verb.work))


def test_the_parser_of_a_verb(capsys):
    with pytest.raises(SystemExit):
        verb_parser("presets", "WORDS").parse_words(["--help"])
    shown = capsys.readouterr().out
    assert shown.startswith("usage: vqbeam presets WORDS\n\nList the presets, a line each.\n")
