import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest
from pipeline_fixtures import (
    CLASSES,
    SIDE,
    TWO_THREADS,
    small_config,
    write_images,
    write_preset,
    write_tfds,
)

from vqbeam import configs
from vqbeam.pipelines.cli import main as cli
from vqbeam.vqvae.storage.run_folder import STAGES, RunFolder

pytestmark = pytest.mark.system

ROOT = pathlib.Path(__file__).parent.parent


def vqbeam(folder, *words):
    """Runs the command line in another process and folder, as a user would."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "vqbeam", *map(str, words)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a folder of images, a preset file for it, and the run made of them."""
    folder = tmp_path_factory.mktemp("place")
    write_images(folder / "source", 30)
    (folder / "source" / "apple" / "broken.png").write_bytes(b"not an image")
    # Relative paths, as one types them.
    write_preset(folder / "own.py", small_config("folder:source", data__max_failed=0.1))
    done = vqbeam(folder, "run", "own.py", "--run-dir", "run", "--seed", 3)
    assert done.returncode == 0, done.stderr
    return folder, done


def test_says_what_was_made_and_what_to_type_next(place):
    folder, done = place
    lines = done.stdout.splitlines()
    assert lines[0].startswith("prepare → train-vqvae → encode → train-prior → sample: done in ")
    assert lines[1].startswith("images: ") and lines[1].endswith(", in run/images")
    assert lines[2] == "classes, 3: Banana 9, apple 8, cherry 7 (training images)"
    letters = "run/images/dead_letters.jsonl"
    assert lines[3] == f"could not be decoded: 1 image, listed in {letters}"
    assert [line.partition(": ")[0] for line in lines[4:8]] == [
        "held-out reconstructions",
        "their PSNR",
        "codes in use",
        "prior",
    ]
    assert lines[8:] == [
        "new images: run/samples/samples.png",
        "all about the run, in a browser: run/report.html",
        "next: vqbeam sample run --output samples.png",
    ]
    run = RunFolder(folder / "run")
    assert run.load_config().seed == 3
    assert all(run.is_done(stage) for stage in STAGES)
    # Each stage has its bar, and no library talks besides.
    for title in ("prepare", "train vqvae", "encode", "train prior", "sample"):
        assert title in done.stderr
    for noise in ("WARNING", "Traceback", "I0000", "oneDNN", "Deprecation"):
        assert noise not in done.stderr


def test_the_next_command_works(place):
    folder, _ = place
    done = vqbeam(folder, "sample", "run", "--output", "samples.png")
    assert (done.returncode, done.stdout) == (0, "7 new images: samples.png\n"), done.stderr
    assert (folder / "samples.png").stat().st_size > 0


def test_done_again_ends_within_seconds(place):
    folder, _ = place
    start = time.monotonic()
    done = vqbeam(folder, "run", "own.py", "--run-dir", "run", "--seed", 3)
    assert time.monotonic() - start < 60  # on a busy machine; alone it takes one
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.partition(":")[0] for line in done.stdout.splitlines()[:5]] == list(STAGES)
    assert done.stdout.count("done already, in run/") == 5


def test_another_config_is_refused(place):
    folder, _ = place
    done = vqbeam(folder, "run", "own.py", "--run-dir", "run")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "vqbeam: run contains a run with a different config (seed: 3 → 0); choose "
        "another --run-dir, or repeat the settings of that run\n"
    )


READER = """
import importlib.machinery, json, sys

OURS = {"vqbeam", "keras", "keras_hub", "keras_nlp", "apache_beam"}

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in OURS:
            spec = importlib.machinery.PathFinder.find_spec(name, path, target)
            if spec is None:  # an editable install has a finder of its own
                raise ModuleNotFoundError(name + " is not to be had here", name=name)
            spec.loader.exec_module = self.refuse  # TensorFlow asks where Keras would be
            return spec

    def refuse(self, module):
        raise ImportError(module.__name__ + " is not to be had here")

sys.meta_path.insert(0, Refuse())
for name in OURS:
    try:
        __import__(name)
        sys.exit(name + " was imported")
    except ImportError:
        pass
import tensorflow_datasets as tfds

content = {}
for name in ("images", "codes"):
    builder = tfds.builder_from_directory(sys.argv[1] + "/" + name)
    for split, info in builder.info.splits.items():
        examples = list(builder.as_dataset(split=split).as_numpy_iterator())
        assert len(examples) == info.num_examples
        content[name + "/" + split] = [
            {
                "key": example["key"].decode(),
                "label": builder.info.features["label"].int2str(int(example["label"])),
                "content": example[name.rstrip("s") if name == "images" else name].tolist(),
                "dtype": str(example[name.rstrip("s") if name == "images" else name].dtype),
            }
            for example in examples
        ]
print(json.dumps(content))
"""


def test_a_python_without_vqbeam_reads_the_datasets(place, tmp_path):
    folder, _ = place
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", READER, str(folder / "run")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)
    # Drawn from the same seed, the source once more.
    source = write_images(tmp_path / "again", 30)
    for name in ("images", "codes"):
        records = [*content[f"{name}/train"], *content[f"{name}/validation"]]
        assert sorted(record["key"] for record in records) == sorted(source)
        for record in records:
            assert record["label"] == record["key"].partition("/")[0]
            if name == "images":
                assert record["dtype"] == "uint8"
                np.testing.assert_array_equal(record["content"], source[record["key"]])
            else:
                assert record["dtype"] == "uint16"
                assert np.shape(record["content"]) == (SIDE // 4, SIDE // 4)
                assert np.max(record["content"]) < 12
    for split in ("train", "validation"):
        keys = [[r["key"] for r in content[f"{name}/{split}"]] for name in ("images", "codes")]
        assert keys[0] == keys[1] and len(keys[0]) > 0
    assert {record["label"] for record in content["codes/train"]} == set(CLASSES)


# What TFDS would have prepared: version, image shape, splits, classes.
TFDS_SETS = {
    "fashion_mnist": ("3.0.1", (28, 28, 1), ("train", "test"), 10),
    "cifar10": ("3.0.2", (32, 32, 3), ("train", "test"), 10),
    "imagenet_resized/64x64": ("0.1.0", (64, 64, 3), ("train", "validation"), 1000),
}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("tfds")
    for name, (version, shape, splits, classes) in TFDS_SETS.items():
        counts = dict(zip(splits, (70, 20), strict=True))
        labels = [f"class {i}" for i in range(classes)]
        texts = ("id",) if name == "cifar10" else ()
        write_tfds(data_dir, name, version, shape, counts, labels, texts)
    return data_dir


# glyphs in a program of its own by test_package.py; photos128 is photos256 with one level less.
ELSEWHERE = {"glyphs", "photos128"}


@pytest.mark.parametrize("preset", sorted({*configs.preset_names()} - ELSEWHERE))
def test_every_preset_runs_when_shrunk(preset, data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "_be_quiet", lambda: None)
    words = ["run", preset, "--run-dir", str(tmp_path / "run"), "--smoke"]
    if preset.startswith("photos"):  # on two workers besides
        write_images(tmp_path / "photos", 90)
        words += ["--data.source", f"folder:{tmp_path / 'photos'}", *TWO_THREADS]
    else:
        words += ["--data.data-dir", str(data_dir)]
    assert cli.main(words) == 0, capsys.readouterr().err
    run = RunFolder(tmp_path / "run")
    config = run.load_config()
    assert all(run.is_done(stage) for stage in STAGES)
    counts = run.manifest("prepare")["counts"]
    assert counts["train"] == 64 and counts["validation"] >= 8
    views = 2 if config.encode.augment == "flip" else 1
    assert run.manifest("encode")["counts"] == {**counts, "train": 64 * views}
    names = run.manifest("prepare")["label_names"]
    if preset.startswith("photos"):
        assert names == list(CLASSES)
    else:
        assert len(names) == TFDS_SETS[config.data.source.removeprefix("tfds:")][3]
    assert (run.folder("sample") / "samples.png").exists()
