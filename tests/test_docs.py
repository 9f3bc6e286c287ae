"""Checks that the commands in README.md and docs parse, and that their links exist."""

import importlib.util
import json
import pathlib
import re
import shlex

import pytest

from vqbeam.configs import VqbeamError
from vqbeam.pipelines.cli import main as cli
from vqbeam.pipelines.cli.parser import UsageError

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def commands(text):
    """The command lines in the fenced and indented blocks of a page, as lists of words."""
    inside = FENCED.findall(text)
    indented = [line[4:] for line in FENCED.sub("", text).splitlines() if line.startswith("    ")]
    code = "\n".join([*inside, *indented]).replace("\\\n", " ")
    lines = re.findall(r"^(?:\$ )?(vqbeam .*)$", code, re.MULTILINE)
    return [shlex.split(line, comments=True)[1:] for line in lines]


def spans(text):
    """The inline code of a page, each on one line."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", FENCED.sub("", text))]


def problem(words):
    """What is wrong with a command line; empty if it parses."""
    try:
        cli.parse(["glyphs" if word == "PRESET" else word for word in words])
    except (UsageError, VqbeamError) as error:
        return str(error)
    except SystemExit:  # it prints the help
        pass
    return ""


def anchors(path):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", path.read_text(encoding="utf-8")), re.M)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_commands_finds_every_kind_of_block():
    text = """
```sh
vqbeam run a --b 'c d'  # comment
$ vqbeam run \\
    e
KEY=value
```

    vqbeam inspect f

vqbeam is not a command here.
"""
    expected = [["run", "a", "--b", "c d"], ["run", "e"], ["inspect", "f"]]
    assert commands(text) == expected


def test_problem_names_unknown_commands_and_flags():
    assert problem(["inspect", "DIR"]) == ""
    assert problem(["inspekt", "DIR"]).startswith("vqbeam: unknown")
    assert problem(["inspect", "DIR", "--nothing"]).startswith("vqbeam: unknown flag --nothing")
    assert "no_such_preset" in problem(["run", "no_such_preset", "--run-dir", "DIR"])


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_commands_in_blocks_parse(page, tmp_path, monkeypatch):
    preset = (ROOT / "configs" / "presets" / "glyphs.py").read_text(encoding="utf-8")
    (tmp_path / "my_preset.py").write_text(preset, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    wrong = {" ".join(words): problem(words) for words in commands(page.read_text("utf-8"))}
    assert not {line: error for line, error in wrong.items() if error}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_commands_and_flags_in_text_are_known(page):
    """Inline code may leave out arguments, but it names no unknown command or flag."""
    wrong = {}
    for span in spans(page.read_text("utf-8")):
        if span.startswith("vqbeam "):
            wrong[span] = problem(shlex.split(span)[1:])
        elif re.match(r"--[a-z]+\.[a-z-]+", span):
            wrong[span] = problem(["run", "glyphs", "--run-dir", "DIR", *shlex.split(span)])
    assert not {span: error for span, error in wrong.items() if "unknown" in error}


def text_of(page):
    """The Markdown of a page or notebook, without its code."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".ipynb":
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells)
    return FENCED.sub("", text)


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "CHANGELOG.md", *NOTEBOOKS], ids=lambda path: path.name
)
def test_relative_links_lead_to_files_and_headings(page):
    text = text_of(page)
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        file = page.parent / target if target else page
        if not file.exists() or anchor and anchor not in anchors(file):
            broken.append(link)
    assert not broken


def test_the_navigation_of_the_site_has_every_page():
    """`make docs` notices it too, but not in `make test`."""
    path = ROOT / "docs" / "conf.py"
    spec = importlib.util.spec_from_file_location("conf", path)
    conf = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conf)
    listed = [page for pages in conf.NAVIGATION.values() for page in pages]
    files = [*(ROOT / "docs").glob("*.md"), *NOTEBOOKS]
    there = [str(file.relative_to(path.parent).with_suffix("")) for file in files]
    assert sorted(["index", *listed]) == sorted(there)
