import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

import vqbeam.pipelines.evaluation.features as features

FILES = sorted((pathlib.Path(__file__).parent.parent / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_benchmark_can_be_imported(path, monkeypatch):
    partner = path.stem.rpartition("_")[2]
    if partner in ("torch", "transformers"):
        pytest.importorskip(partner, reason=f"{partner} is for benchmarks alone")
    imported(path, monkeypatch)


def imported(path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(path.parent)])
    spec = importlib.util.spec_from_file_location(f"benchmark_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.system
@pytest.mark.parametrize(
    "words",
    [
        ("overhead.py", "--smoke"),
        ("checkpoint_cost.py", "--smoke"),
        ("stage1_vqbeam.py", "quantizer", "64", "16", "4"),
        ("gpu.py", "--smoke", "--without-torch", "--only", "sampling"),
        ("sources.py", "--smoke"),
    ],
    ids=lambda words: words[0],
)
def test_a_benchmark_runs(words):
    program, *arguments = words
    environment = {name: value for name, value in os.environ.items() if name != "KERAS_BACKEND"}
    done = subprocess.run(
        [sys.executable, FILES[0].parent / program, *arguments],
        env=environment | {"SMOKE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    if program == "overhead.py":
        assert [line.split(",")[0] for line in lines[2:]] == ["| prior", "| VQ-VAE"]
    elif program == "checkpoint_cost.py":
        assert [line.split(" | ")[0] for line in lines[2:]] == [
            "| glyphs, vqvae",
            "| glyphs, prior",
        ]
    elif program == "sources.py":
        rows = [line.split(" | ") for line in lines if line.startswith("| ")]
        assert [row[1] for row in rows[1:5]] == ["60 of 60 the same |"] * 4
        assert [row[0] for row in rows[6:]] == ["| 200", "| 400"]
    elif program == "gpu.py":
        rows = [line.split(" | ") for line in lines if line.startswith("| ")][2:]
        assert [row[0] for row in rows] == ["| sampling imagenet64 2"]
        assert all(row[1].partition("/s (")[1] for row in rows)
        measured = [json.loads(line) for line in lines if line.startswith("{")]
        variants = {(line["work"], line["variant"]) for line in measured}
        assert {("sampling", "exact"), ("sampling", "fast")} <= variants
        assert {line["side"] for line in measured} == {"vqbeam"}
    else:
        assert all(json.loads(line)["seconds"] > 0 for line in lines)


@pytest.mark.system
def test_the_second_judge_measures_a_run(finished_run, tmp_path, monkeypatch, capsys):
    judge = imported(FILES[0].parent / "second_judge.py", monkeypatch)
    monkeypatch.setattr(features, "_MOST_STEPS", 4)
    monkeypatch.setattr(features, "build_classifier", None)  # it puts its own there
    words = ["second_judge.py", str(finished_run.root), "--work", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    judge.main()
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| ")]
    assert [row[1] for row in rows] == ["images", "---", "real", "reconstructions", "samples"]
    assert (tmp_path / "classifier.keras").exists()
