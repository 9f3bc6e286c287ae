import json

import numpy as np
import pytest
from PIL import Image
from pipeline_fixtures import SIDE

from vqbeam.pipelines.cli.main import main
from vqbeam.pipelines.sampling.sample import sample
from vqbeam.vqvae.storage.run_folder import RunFolder

pytestmark = pytest.mark.slow


def test_from_one_class_to_another(finished_run, tmp_path, capsys):
    path = tmp_path / "between.png"
    words = ["--from", "cherry", "--to", "0", "--steps=3", "--num=2", "--seed=5"]
    assert main(["interpolate", str(finished_run.root), *words, "--output", str(path)]) == 0
    said = capsys.readouterr().out
    assert said == f"2 rows from cherry to Banana in 3 columns: {path}\n"
    with Image.open(path) as figure:
        facts, shown = json.loads(figure.text["vqbeam"]), np.asarray(figure)
    assert (facts["from"], facts["to"], facts["seed"]) == ("cherry", "Banana", 5)
    assert shown.shape[:2] == (4 + 16 + 2 * 68 + 4, 4 + 3 * 68)
    # The ends are the images of the two classes, of the same random numbers.
    for label, left in (("cherry", 4), ("banana", 4 + 2 * 68)):
        one = str(tmp_path / label)
        sample(str(finished_run.root), labels=[label], num=2, seed=5, output=one)
        for row in range(2):
            with Image.open(tmp_path / label / f"{row:05d}.png") as image:
                top = 4 + 16 + row * 68
                tile = shown[top : top + 64 : 8, left : left + 64 : 8]
                assert tile.shape[:2] == (SIDE, SIDE)
                # Decoded in a batch of another size, a pixel may round in another way.
                assert np.abs(tile.astype(int) - np.asarray(image)).max() <= 1


@pytest.mark.parametrize(
    "words,message",
    [
        (["--to", "cherry"], "the first and the last class are both cherry; give two classes"),
        (["--to", "melon"], "the run has no label 'melon'"),
        (["--output", "a.jpg"], "--output is 'a.jpg'; give a name that ends in .png"),
    ],
)
def test_what_a_user_can_mend(finished_run, capsys, words, message):
    given = ["--from", "cherry", "--to", "apple", "--output", "a.png"]
    assert main(["interpolate", str(finished_run.root), *given, *words]) == 1
    assert capsys.readouterr().err.startswith(f"vqbeam: {message}")


def test_a_run_without_classes(finished_run, monkeypatch, capsys):
    require = RunFolder.require
    monkeypatch.setattr(
        RunFolder,
        "require",
        lambda self, stage, among: require(self, stage, among) | {"label_names": []},
    )
    given = ["--from", "cherry", "--to", "apple", "--output", "a.png"]
    assert main(["interpolate", str(finished_run.root), *given]) == 1
    assert "the run has no classes" in capsys.readouterr().err
