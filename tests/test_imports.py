"""Holds the import rule: configs ← vqvae ← prior ← pipelines, and Beam in pipelines alone."""

import ast
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
ORDER = ["configs", "vqvae", "prior", "pipelines"]
FILES = sorted(path for package in ORDER for path in (ROOT / package).rglob("*.py"))


def imported_packages(source):
    """The packages that a module imports, at its top or in a function; ours without vqbeam."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {_package(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "vqbeam":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("relative" if node.level else _package(node.module))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "importlib.import_module",
            "__import__",
        ):
            found.add(_package(ast.unparse(node.args[0]).strip("f'\"")))
    return found


def _package(name):
    return name.removeprefix("vqbeam.").partition(".")[0]


def test_sees_every_kind_of_import():
    source = """
import a.b, c as d
from vqbeam.e.f import g
from vqbeam import h
from . import o
def lazy():
    from i import j
    if True:
        import k
    importlib.import_module("vqbeam.l.m")
    importlib.import_module(f"n.{o}")
"""
    found = {"a", "c", "e", "h", "relative", "i", "k", "l", "n"}
    assert imported_packages(source) == found


def test_imports_only_from_the_left():
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == set(ORDER)
    for path in FILES:
        package = path.relative_to(ROOT).parts[0]
        found = imported_packages(path.read_text())
        allowed_below = set(ORDER[: ORDER.index(package) + 1])
        wrong = found & (set(ORDER) - allowed_below | {"tests", "benchmarks", "relative"})
        if package != "pipelines":
            wrong |= found & {"apache_beam"}
        if package == "configs":
            wrong |= found - set(sys.stdlib_module_names) - {"configs"}
        assert not wrong, f"{path.relative_to(ROOT)} imports {', '.join(sorted(wrong))}"


def test_a_folder_called_configs_in_the_working_directory_does_no_harm(tmp_path):
    for name in ORDER:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('the wrong package')")
    code = "from vqbeam.configs import load_preset; print(load_preset('glyphs').name)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == ("glyphs\n", "")
