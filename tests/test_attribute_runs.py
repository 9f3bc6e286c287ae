"""Tests new images of a run with attributes instead of classes.

Other files test how they get there: test_prepare, test_encode and test_prior_training.
"""

import json

import numpy as np
import pytest
import tensorflow_datasets as tfds
from measured_run import add_models
from PIL import Image
from pipeline_fixtures import small_config

from vqbeam.pipelines.cli import main as cli

pytestmark = pytest.mark.slow

NAMES = ("young", "smiling", "hat")


@pytest.fixture(scope="module")
def run(prepared_run):
    config = small_config("glyphs", sample__guidance=2.0)
    run, pixels = prepared_run(config, labels=NAMES, kind="attributes")
    add_models(run, pixels, labels=NAMES, kind="attributes")
    return run


def test_samples_have_the_attributes_asked_for(run, tmp_path):
    folder = tmp_path / "new"
    words = ["sample", run.root, "--label", "smiling,Young", "hat", "--num", 3, "--output", folder]
    assert cli.main([*map(str, words)]) == 0
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [line["label"] for line in lines] == [[1, 1, 0], [0, 0, 1], [1, 1, 0]]
    assert [line["name"] for line in lines] == ["young,smiling", "hat", "young,smiling"]
    # The second image once more.
    again = tmp_path / "again.png"
    words = ["sample", run.root, "--like", folder / "00001.png", "--output", again]
    assert cli.main([*map(str, words)]) == 0
    one, two = (np.asarray(Image.open(path)) for path in (folder / "00001.png", again))
    np.testing.assert_array_equal(one, two)


def test_a_dataset_of_new_images_has_them(run, tmp_path):
    words = "--label smiling,young hat --num 3 --format tfrecord --output".split()
    assert cli.main(["generate", str(run.root), *words, str(tmp_path / "new")]) == 0
    dataset = tfds.builder_from_directory(str(tmp_path / "new")).as_dataset(split="train")
    found = [example["attributes"].tolist() for example in dataset.as_numpy_iterator()]
    assert found == [[1, 1, 0], [0, 0, 1], [1, 1, 0]]


def test_an_attribute_that_is_not_known(run, tmp_path, capsys):
    words = ["sample", str(run.root), "--label", "young,old", "--output", str(tmp_path / "x.png")]
    assert cli.main(words) == 1
    assert "no label 'old'; it has young, smiling, hat" in capsys.readouterr().err
