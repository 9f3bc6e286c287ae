import importlib.util
import pathlib
import sys

import pytest

FILES = sorted((pathlib.Path(__file__).parent.parent / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_benchmark_can_be_imported(path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(path.parent)])
    partner = path.stem.rpartition("_")[2]
    if partner in ("torch", "transformers"):
        pytest.importorskip(partner, reason=f"{partner} is for benchmarks alone")
    spec = importlib.util.spec_from_file_location(f"benchmark_{path.stem}", path)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
