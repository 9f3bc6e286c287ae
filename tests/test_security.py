"""Checks that an untrusted run, image or dataset can do no harm."""

import io
import json
import os
import pathlib
import zipfile

import keras
import numpy as np
import pytest
from measured_run import add_models
from pipeline_fixtures import (
    SIDE,
    finish_again,
    run_transform,
    small_config,
    write_images,
    write_tfds,
)

from vqbeam.pipelines.run import run_stages
from vqbeam.pipelines.sampling.sample import sample
from vqbeam.pipelines.stages.encode import EncodeStage
from vqbeam.vqvae.storage.run_folder import RunFolder

pytestmark = pytest.mark.slow


def lambda_layer(sign):
    """A model with a layer that holds Python code, as Keras stores it."""
    touch = eval(f"lambda x: __import__('pathlib').Path({str(sign)!r}).touch() or x")
    model = keras.Sequential([keras.Input((2,)), keras.layers.Lambda(touch)])
    file = sign.parent / "lambda.keras"
    model.save(file)
    keras.saving.load_model(file, safe_mode=False)(np.zeros((1, 2)))
    assert sign.exists(), "the attack works without protection"
    sign.unlink()
    return file.read_bytes()


def named_in_config(sign, original, spoil):
    """The stored model with its config changed by `spoil`."""
    data = io.BytesIO()
    with zipfile.ZipFile(original) as old, zipfile.ZipFile(data, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name == "config.json":
                config = json.loads(content)
                spoil(config, f"touch {sign}")
                content = json.dumps(config).encode()
            new.writestr(name, content)
    return data.getvalue()


def a_command_as_the_model(config, command):
    config |= {"module": "os", "class_name": "system", "config": {"command": command}}
    config["registered_name"] = None


def a_command_as_an_argument(config, command):
    # Of either model, the policy is an object that Keras makes from its config.
    config["config"]["dtype"] = {
        "module": "builtins",
        "class_name": "function",
        "config": f"__import__('os').system({command!r})",
        "registered_name": None,
    }


def a_call_of_a_library(config, command):
    config["config"]["dtype"] = {
        "module": "subprocess",
        "class_name": "Popen",
        "config": {"args": command, "shell": True},
        "registered_name": "Popen",
    }


@pytest.mark.parametrize(
    ("attack", "stage"),
    [
        (lambda_layer, "train-prior"),
        (a_command_as_the_model, "train-prior"),
        (a_command_as_an_argument, "train-vqvae"),
        (a_command_as_an_argument, "train-prior"),
        (a_call_of_a_library, "train-vqvae"),
    ],
)
def test_a_model_runs_no_code(failure, own_run, tmp_path, stage, attack):
    run, _ = own_run
    sign, file = tmp_path / "the code was run", run.folder(stage) / "model.keras"
    if attack is lambda_layer:
        file.write_bytes(lambda_layer(sign))
    else:
        file.write_bytes(named_in_config(sign, file, attack))
    for each in ("train-vqvae", "encode", "train-prior", "sample"):
        finish_again(run, each)
    message = failure("sample", run.root, "--output", tmp_path / "samples.png", alone=False)
    assert f"{file} cannot be read by this version of vqbeam" in message
    assert not sign.exists()


class Pickled:
    def __init__(self, sign):
        self.sign = sign

    def __reduce__(self):
        return pathlib.Path.touch, (self.sign,)


def test_an_array_file_runs_no_code(failure, finished_run, tmp_path):
    sign = tmp_path / "the code was run"
    np.savez(tmp_path / "new.npz", vqbeam=np.array([Pickled(sign)], object))
    with np.load(tmp_path / "new.npz", allow_pickle=True) as arrays:
        arrays["vqbeam"]
    assert sign.exists()
    sign.unlink()
    message = failure("sample", finished_run.root, "--like", tmp_path / "new.npz")
    assert "does not hold the settings of its images" in message
    assert not sign.exists()


def everything_below(folder):
    return {path for path in folder.rglob("*")}


def run_through(config, path, labels):
    """A run of images, codes and new images, whose models have learned nothing."""
    run_stages(config, str(path), ("prepare",), ["--runner=FnApiRunner"])
    run = RunFolder(path)
    pixels = np.random.default_rng(0).integers(0, 256, (20, SIDE, SIDE, 3), np.uint8)
    add_models(run, {"train": pixels}, labels)
    run_transform(EncodeStage(), run)
    sample(str(path), output=str(path / "new"))
    return run


def test_names_in_a_dataset_lead_nowhere(tmp_path):
    names = ["../../../outside", str(tmp_path / "outside"), "..\\outside", "a/b"]
    counts = {"train": 8, "test": 4}
    write_tfds(tmp_path / "data", "cifar10", "3.0.2", (SIDE, SIDE, 3), counts, names, ("id",))
    config = small_config("tfds:cifar10", data__data_dir=str(tmp_path / "data"))
    before = everything_below(tmp_path)
    run = run_through(config, tmp_path / "a" / "b" / "run", names)
    assert run.manifest("encode")["label_names"] == names
    new = everything_below(tmp_path) - before - {tmp_path / "a", tmp_path / "a" / "b"}
    assert new and all(path.is_relative_to(run.root) for path in new)


def test_files_in_a_folder_lead_nowhere(tmp_path):
    pixels = write_images(tmp_path / "source", 6, classes=())
    (tmp_path / "secret.txt").write_text("a secret")
    os.symlink(tmp_path / "secret.txt", tmp_path / "source" / "link.png")
    names = ("a\\..\\outside.png", "%2e%2e%2foutside.png", "line\nbreak.png", "$(touch x).png")
    others = write_images(tmp_path / "others", len(names), classes=(), seed=1)
    for name, key in zip(names, others, strict=True):
        (tmp_path / "source" / name).write_bytes((tmp_path / "others" / key).read_bytes())
    before = everything_below(tmp_path)
    config = small_config(f"folder:{tmp_path / 'source'}", data__max_failed=0.2)
    run = run_through(config, tmp_path / "a" / "run", ())
    new = everything_below(tmp_path) - before
    assert new and all(path.is_relative_to(tmp_path / "a") for path in new)
    assert sum(run.manifest("encode")["counts"].values()) == len(pixels) + 4
    letters = (run.folder("prepare") / "dead_letters.jsonl").read_text()
    assert json.loads(letters)["key"] == "link.png" and "a secret" not in letters
