"""Tests a run with attributes instead of classes, from a folder with a table to new images."""

import json

import numpy as np
import pytest
import tensorflow_datasets as tfds
from event_files import events
from PIL import Image
from pipeline_fixtures import small_config, write_images

from vqbeam.pipelines.cli import main as cli
from vqbeam.pipelines.cli.stage_commands import STAGES
from vqbeam.pipelines.run import run_stages
from vqbeam.vqvae.storage.run_folder import RunFolder

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("attributes")
    keys = sorted(write_images(folder / "source", 24))
    rows = [f"{key},{i % 2},{i // 2 % 2},{i // 4 % 2}" for i, key in enumerate(keys)]
    table = "\n".join(["path,young,smiling,hat", *rows])
    (folder / "source" / "attributes.csv").write_text(table)
    config = small_config(
        f"folder:{folder / 'source'}",
        encode__augment="flip",
        prior__pictures=4,
        prior__weight_ema=0.5,
        sample__guidance=2.0,
    )
    run_stages(config, str(folder / "run"), STAGES, ["--runner=FnApiRunner"])
    return RunFolder(folder / "run")


def test_manifests_say_which_kind_it_is(run, capsys):
    for stage in ("prepare", "encode", "train-prior"):
        manifest = run.manifest(stage)
        assert manifest["label_kind"] == "attributes"
        assert manifest["label_names"] == ["young", "smiling", "hat"]
    assert sorted(events(run.folder("train-prior") / "logs" / "images")["samples"]) == [0, 1]
    cli.main(["inspect", str(run.root)])
    assert "  3 attributes\n" in capsys.readouterr().out


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
