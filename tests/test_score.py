import json
import math
import os
import shutil

import keras
import numpy as np
import pytest
from measured_run import add_models
from PIL import Image

from vqbeam.pipelines.cli import main as cli
from vqbeam.pipelines.cli.main import main
from vqbeam.pipelines.sources.images import encode_png

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def scored(prepared_run, tiny_config, tmp_path_factory):
    """A run, its models and a folder with its held-out images, one of them as JPEG of any size."""
    run, pixels = prepared_run(tiny_config())
    models = add_models(run, pixels)
    folder = tmp_path_factory.mktemp("scored")
    (folder / "sub").mkdir()
    for index, image in enumerate(pixels["validation"]):
        (folder / "sub" / f"{index}.png").write_bytes(encode_png(image))
    (folder / "broken.png").write_bytes(b"no image")
    Image.new("RGB", (30, 20), "red").save(folder / "wide.jpg")
    return run, pixels["validation"], models, folder


@pytest.fixture(autouse=True)
def loud(monkeypatch):
    monkeypatch.setattr(cli, "_be_quiet", lambda: None)


def score(run, *words):
    return main(["score", str(run.root), *map(str, words)])


@pytest.mark.parametrize(
    ("label", "precision", "tolerance"),
    [(None, "exact", 1e-4), ("b", "exact", 1e-4), ("b", "fast", 0.02)],
)
def test_figures_in_numpy(scored, capsys, label, precision, tolerance):
    run, images, (vqvae, prior), folder = scored
    words = ["--label", label] if label else []
    words += ["--precision", precision]
    assert score(run, "--input", folder / "sub", *words) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["file"] for line in lines] == [f"{index}.png" for index in range(10)]
    codes = keras.ops.convert_to_numpy(vqvae.encode(images))
    copies = keras.ops.convert_to_numpy(vqvae.decode(codes)).astype("float64")
    labels = np.full(10, 1 if label else -1, "int32")
    logits = keras.ops.convert_to_numpy(prior({"codes": codes, "labels": labels}))
    logits = logits.astype("float64")
    chosen = np.take_along_axis(logits, codes.reshape(10, -1, 1), axis=-1)[..., 0]
    nats = (chosen - np.log(np.exp(logits).sum(axis=-1))).sum(axis=1)
    for index, line in enumerate(lines):
        assert line["log_likelihood"] == pytest.approx(nats[index], rel=tolerance)
        assert line["nats_per_code"] == pytest.approx(-nats[index] / 4, rel=tolerance)
        bits = -nats[index] / math.log(2) / 64
        assert line["bits_per_dim"] == pytest.approx(bits, rel=tolerance)
        error = np.square(images[index] - copies[index]).mean()
        assert line["mse"] == pytest.approx(error, rel=0.02)  # a pixel may be rounded otherwise
        assert (line["label"], line["precision"]) == (label, precision)
    assert np.ptp(nats) > 0.1


def test_the_least_likely_first_and_the_broken_last(scored, capsys, tmp_path):
    run, _, _, folder = scored
    path = tmp_path / "new" / "scores.jsonl"
    assert score(run, "--input", folder, "--output", path, "--sort") == 0
    said = capsys.readouterr()
    assert said.out == f"11 images scored: {path}\n"
    assert said.err.endswith("1 of 12 images could not be read\n")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    bits = [line["bits_per_dim"] for line in lines[:-1]]
    assert bits == sorted(bits, reverse=True) and len(bits) == 11
    assert {line["file"] for line in lines} >= {"wide.jpg", "sub/3.png"}
    assert lines[-1]["file"] == "broken.png" and "not an image" in lines[-1]["error"]
    assert set(lines[-1]) == {"file", "error"}


def test_a_file_that_is_none_costs_only_itself(scored, capsys, tmp_path):
    run, _, _, folder = scored
    shutil.copytree(folder, tmp_path / "images")
    os.mkfifo(tmp_path / "images" / "pipe.png")
    path = tmp_path / "scores.jsonl"
    assert score(run, "--input", tmp_path / "images", "--output", path) == 0
    assert "2 of 13 images could not be read" in capsys.readouterr().err
    lines = {line["file"]: line for line in map(json.loads, path.read_text().splitlines())}
    assert "not a regular file" in lines["pipe.png"]["error"]


def test_what_cannot_be_scored(scored, capsys, tmp_path):
    run, _, _, folder = scored
    for words, message in (
        (["--input", folder / "broken.png"], "none of the images in"),
        (["--input", tmp_path / "none"], "there is no file or folder"),
        (["--input", folder, "--label", "melon"], "the run has no label 'melon'; it has a, b"),
    ):
        assert score(run, *words) == 1
        assert message in capsys.readouterr().err
