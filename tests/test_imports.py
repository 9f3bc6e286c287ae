"""Holds the import rule: configs ← vqvae ← prior ← pipelines, and Beam in pipelines alone."""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
ORDER = ["configs", "vqvae", "prior", "pipelines"]
FILES = sorted(path for package in ORDER for path in (ROOT / package).rglob("*.py"))


def imported_packages(source, package):
    """The top-level packages that a module imports, at its top or inside any function."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(package if node.level else node.module.partition(".")[0])
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "importlib.import_module",
            "__import__",
        ):
            name = ast.unparse(node.args[0]).strip("f'\"")
            found.add(name.partition(".")[0])
    return found


def test_sees_every_kind_of_import():
    source = """
import a.b, c as d
from e.f import g
from . import h
def lazy():
    from i import j
    if True:
        import k
    importlib.import_module("l.m")
    importlib.import_module(f"n.{o}")
"""
    assert imported_packages(source, "own") == {"a", "c", "e", "own", "i", "k", "l", "n"}


def test_there_are_files_in_each_package():
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == set(ORDER)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_only_from_the_left(path):
    package = path.relative_to(ROOT).parts[0]
    found = imported_packages(path.read_text(), package)
    right = set(ORDER[ORDER.index(package) + 1 :])
    assert not found & right
    assert not found & {"tests", "benchmarks"}
    if package != "pipelines":
        assert "apache_beam" not in found
    if package == "configs":
        assert found <= set(sys.stdlib_module_names) | {"configs"}
