"""Checks that the table of faults fits the code: it names code, files and tests that exist."""

import ast
import functools
import pathlib

import pytest
from mutants import FAULTS

ROOT = pathlib.Path(__file__).parent.parent
MUTANTS = [mutant for faults in FAULTS.values() for mutant in faults]


@functools.cache
def without_docstrings(source):
    """The code of a file, in which no comment and no docstring is left."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            if ast.get_docstring(node) is not None:
                node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


@functools.cache
def functions(path):
    """The names of the functions of a file."""
    return {n.name for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_fault_is_one_change_of_code(mutant):
    source = (ROOT / mutant.file).read_text()
    message = f"{mutant.file} must have this exactly once; adapt `old` in tests/mutants.py"
    assert source.count(mutant.old) == 1, f"{message}: {mutant.old}"
    assert without_docstrings(mutant.apply(source)) != without_docstrings(source)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_its_tests_exist(mutant):
    assert mutant.nodes
    for node in mutant.nodes:
        file, _, name = node.partition("::")
        assert not name or name in functions(ROOT / file)


def test_each_fault_has_a_name_of_its_own():
    names = [mutant.name for mutant in MUTANTS]
    assert len(set(names)) == len(names) >= 45


def test_the_page_has_a_row_for_each():
    page = (ROOT / "docs" / "mutants.md").read_text()
    rows = [line.split(" | ")[1] for line in page.splitlines() if line.startswith("| ")][1:]
    assert rows == [mutant.name for mutant in MUTANTS]
