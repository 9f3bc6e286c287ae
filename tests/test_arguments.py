import pytest
from argument_checks import refusal

from vqbeam.pipelines.cli.main import VERBS, parse
from vqbeam.pipelines.cli.parser import UsageError


@pytest.mark.parametrize(
    "words,message",
    [
        (["run"], "vqbeam run: missing PRESET, --run-dir (see vqbeam run --help)"),
        (["encode", "x"], "vqbeam encode: missing --run-dir (see vqbeam encode --help)"),
        (["run", "x", "--run-dir", ""], "vqbeam run: --run-dir: is empty (see"),
        (["sample"], "vqbeam sample: missing DIR (see"),
        (["sample", "d", "--runner", "x"], "vqbeam: unknown flag --runner; see vqbeam sample"),
        (
            ["sample", "d", "--label", "-cat"],
            "vqbeam: unknown flag -cat; a value that begins with a dash is given as --label=-cat",
        ),
        (["sample", "d", "--topk", "1"], "vqbeam: unknown flag --topk; did you mean --top-k?"),
        (["sample", "d", "--top-k", "x"], "vqbeam sample: --top-k: 'x' is not an integer"),
        (["sample", "d", "--label"], "vqbeam sample: --label: needs a value"),
        (["reconstruct", "d"], "vqbeam reconstruct: missing --output"),
        (
            ["reconstruct", "d", "--output", "a.png", "--num", "0"],
            "vqbeam reconstruct: --num: 0 is",
        ),
        (["evaluate"], "vqbeam evaluate: missing DIR (see"),
        (
            ["evaluate", "d", "--features", "x"],
            "vqbeam evaluate: --features: invalid choice: 'x' (choose from 'classifier', 'incep",
        ),
        (["gradients"], "vqbeam gradients: missing PRESET-OR-DIR (see"),
        (
            ["gradients", "glyphs", "--steps", "9"],
            "vqbeam gradients: --steps needs --no-straight-through",
        ),
        (
            ["gradients", "glyphs", "--no-straight-through", "--steps", "0"],
            "vqbeam gradients: --steps: 0 is not at least 1",
        ),
        (["gradients", "glyphs", "--prior.layers", "1"], "vqbeam: unknown flag --prior.layers"),
        (["gradients", "glyphs", "--output", ""], "vqbeam gradients: --output: is empty"),
        (["inspect", "d", "e"], "vqbeam inspect: several folders need --json or --csv"),
        (["presets", "d", "e"], "vqbeam presets: unexpected argument 'e'"),
        (["help", "zzz"], "vqbeam: unknown command 'zzz'; see vqbeam --help"),
        (["smaple", "d"], "vqbeam: unknown command 'smaple'; did you mean sample?"),
        (["zzz"], "vqbeam: unknown command 'zzz'; see vqbeam --help"),
        (["--verison"], "vqbeam: unknown flag --verison; did you mean --version?"),
        (["--run-dir", "d"], "vqbeam: unknown flag --run-dir; see vqbeam --help"),
    ],
)
def test_other_wrong_command_lines(words, message):
    assert refusal(*words).startswith(message)


def test_without_a_word_the_help_is_the_error():
    with pytest.raises(UsageError, match="make images:"):
        parse([])


@pytest.mark.parametrize("flag", ["--help", "-h", "--version"])
@pytest.mark.parametrize("verb", [None, *VERBS])
def test_help_and_version(verb, flag, capsys):
    with pytest.raises(SystemExit) as end:
        parse([verb, flag] if verb else [flag])
    assert not end.value.code
    shown = capsys.readouterr().out
    assert shown.startswith(
        "vqbeam" if flag == "--version" else f"usage: vqbeam {verb or 'COMMAND'}"
    )
    assert max(map(len, shown.splitlines())) <= 100


@pytest.mark.parametrize(
    ("words", "same"), [(["help"], ["--help"]), (["help", "run"], ["run", "--help"])]
)
def test_help_is_a_verb_too(words, same, capsys):
    shown = []
    for line in (words, same):
        with pytest.raises(SystemExit):
            parse(line)
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] != ""


def test_top_level_help_lists_each_verb(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    shown = capsys.readouterr().out
    for name, verb in VERBS.items():
        assert f"  {name:<13} {verb.summary}\n" in shown
