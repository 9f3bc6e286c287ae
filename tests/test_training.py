import dataclasses
import json
import pathlib

import numpy as np
import pytest
import tensorflow as tf
from etils import epath
from PIL import Image

from configs import VqbeamError, to_dict
from vqvae.fitting import load_model
from vqvae.metrics import perplexity
from vqvae.model import build_model, scale_images
from vqvae.records import Shard
from vqvae.run_folder import RunFolder
from vqvae.training import (
    MODEL_FILE,
    STAGE,
    check_fits,
    evaluate,
    load_vqvae,
    reconstruct,
    scale_batch,
    train_vqvae,
)


def array(tensor):
    return np.asarray(tensor).copy()


def train(run):
    return train_vqvae(str(run.root))


@pytest.fixture(scope="module")
def trained(prepared_run, tiny_config):
    """One finished stage for all tests that only look at it."""
    run, pixels = prepared_run(tiny_config())
    return run, pixels, train(run)


def test_writes_model_picture_logs_and_manifest(trained):
    run, pixels, manifest = trained
    assert run.is_done(STAGE) and manifest == run.manifest(STAGE)
    assert set(manifest["outputs"]) == {MODEL_FILE, "reconstructions.png"}
    assert len(manifest["history"]) == 4  # 8 steps, 2 an epoch
    names = {"loss", "reconstruction", "codebook", "commitment", "perplexity", "codes_used"}
    assert set(manifest["history"][0]) >= names | {f"val_{name}" for name in names}
    assert manifest["seconds"] > 0
    model = load_vqvae(run)
    assert manifest["parameters"] == model.count_params()
    # Ten validation images in a row above their reconstructions.
    with Image.open(run.folder(STAGE) / "reconstructions.png") as figure:
        assert figure.size == (10 * 68 + 4, 2 * 68 + 4)
        shown = np.asarray(figure)
    original = pixels["validation"][3].repeat(8, 0).repeat(8, 1)
    left = 4 + 3 * 68
    np.testing.assert_array_equal(shown[4:68, left : left + 64, :1], original)
    copy = reconstruct(model, pixels["validation"])[3].repeat(8, 0).repeat(8, 1)
    np.testing.assert_array_equal(shown[72:136, left : left + 64, :1], copy)
    assert list((run.folder(STAGE) / "logs" / "images").glob("events*"))


def test_measures_in_numpy(trained):
    run, pixels, manifest = trained
    model, images = load_vqvae(run), pixels["validation"]
    measures = manifest["measures"]
    # Three batches of 4, 4 and 2: the mean must be over images.
    copies = reconstruct(model, images)
    mse = np.square(images.astype("float64") - copies).mean()
    # Pixels are rounded: an error of 1/12 in the mean, and clipped where they leave the range.
    assert measures["mse"] == pytest.approx(mse, rel=0.01, abs=0.2)
    assert measures["psnr"] == pytest.approx(10 * np.log10(255**2 / mse), abs=0.05)

    result = model(array(scale_images(images)))
    exact = np.square(array(scale_images(images)) - array(result["reconstruction"])).mean()
    assert measures["mse"] == pytest.approx(exact * 127.5**2, rel=1e-3)
    variance = np.var(pixels["train"] / 127.5 - 1)
    assert measures["reconstruction"] == pytest.approx(exact / variance, rel=1e-3)
    counts = np.bincount(array(model.encode(images)).ravel(), minlength=model.num_codes)
    assert measures["perplexity"] == pytest.approx(perplexity(counts), rel=1e-4)
    assert measures["codes_used"] == pytest.approx((counts > 0).mean(), rel=1e-5)
    parts = sum(measures[name] for name in ("reconstruction", "codebook", "commitment"))
    assert measures["loss"] == pytest.approx(parts, rel=1e-4)


def test_a_finished_stage_is_left_alone(trained):
    run, _, manifest = trained
    before = times_of_files(run.folder(STAGE))
    assert len(before) > 4
    assert train(run) == manifest
    assert times_of_files(run.folder(STAGE)) == before


def times_of_files(folder):
    return {path: path.stat().st_mtime_ns for path in pathlib.Path(folder).rglob("*")}


def test_same_run_same_weights_even_when_broken_off(
    trained, prepared_run, tiny_config, monkeypatch
):
    run, _, manifest = trained
    other, _ = prepared_run(tiny_config())

    class Killed(BaseException):
        pass

    def kill(callback, epoch, logs=None):
        if epoch == 2:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("vqvae.training.ReconstructionImages.on_epoch_end", kill)
        with pytest.raises(Killed):
            train(other)
    assert not other.is_done(STAGE) and other.manifest(STAGE) is None
    again = train(other)
    assert again["measures"] == manifest["measures"]
    assert again["history"] == manifest["history"]
    models = [load_model(folder.folder(STAGE) / MODEL_FILE) for folder in (run, other)]
    for one, two in zip(models[0].weights, models[1].weights, strict=True):
        np.testing.assert_array_equal(array(one), array(two), err_msg=one.path)


def test_images_without_labels(prepared_run, tiny_config):
    config = tiny_config(vqvae__steps=2, vqvae__codebook_update="gradient")
    run, _ = prepared_run(config, labels=())
    assert len(train(run)["history"]) == 1
    assert load_vqvae(run).quantizer.update == "gradient"


def test_needs_prepared_images(tmp_path, tiny_config):
    run = RunFolder(tmp_path / "run")
    run.start(tiny_config())
    with pytest.raises(VqbeamError, match="no finished prepare stage; run vqbeam prepare"):
        train(run)
    with pytest.raises(VqbeamError, match="no finished train-vqvae stage"):
        load_vqvae(run)


def test_a_damaged_shard_is_named(prepared_run, tiny_config):
    run, _ = prepared_run(tiny_config())
    shard = run.folder("prepare") / Shard("images", "train", 0, 2).filename
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 255
    shard.write_bytes(bytes(data))
    with pytest.raises(VqbeamError, match="a record in .*images is damaged .* run the stage"):
        train(run)
    assert run.manifest(STAGE) is None


def test_a_truncated_shard_is_named(prepared_run, tiny_config):
    run, _ = prepared_run(tiny_config())
    shard = run.folder("prepare") / Shard("images", "train", 0, 2).filename
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(VqbeamError, match="images-train.tfrecord-00000-of-00002 has .* instead of"):
        train(run)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_codes", 16, r"model.keras has 12 codes and grid \(2, 2\), .* says 16 and \(2, 2\)"),
        ("downsampling", 2, r"has 12 codes and grid \(2, 2\), .* says 12 and \(4, 4\)"),
    ],
)
def test_a_model_of_another_config_is_refused(trained, field, value, message, monkeypatch):
    run, _, _ = trained
    config = run.load_config()
    other = dataclasses.replace(config, vqvae=dataclasses.replace(config.vqvae, **{field: value}))
    monkeypatch.setattr(type(run), "load_config", lambda self: other)
    with pytest.raises(VqbeamError, match=message + ".*; delete .*vqvae and train again"):
        load_vqvae(run)


def test_check_fits(tiny_config):
    config = tiny_config()
    check_fits(build_model(config, data_variance=1.0), config, epath.Path("x/model.keras"))


def test_evaluate_counts_each_image_alike(tiny_config):
    model = build_model(tiny_config(), data_variance=0.5)
    model.compile("sgd")
    images = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 1), np.uint8)
    images[4:] //= 16
    whole, parts = (
        evaluate(model, tf.data.Dataset.from_tensor_slices(images).batch(size).map(scale_batch))
        for size in (7, 4)
    )
    assert whole == pytest.approx(parts, rel=1e-4)
    assert all(isinstance(value, float) for value in whole.values())
    assert json.loads(json.dumps(whole)) == whole


def test_images_are_scaled_alike_in_training_and_encoding():
    every = np.arange(256, dtype="uint8").reshape(1, 16, 16, 1)
    # Up to the last bit, which a compiler may round otherwise.
    np.testing.assert_allclose(array(scale_batch(every)), array(scale_images(every)), atol=2e-7)


def test_the_config_of_the_run_is_used(trained):
    run, _, _ = trained
    config = to_dict(run.load_config())["vqvae"]
    found = load_vqvae(run).get_config()
    shared = set(config) & set(found) - {"dtype"}
    assert len(shared) >= 8
    assert {name: found[name] for name in shared} == {name: config[name] for name in shared}
