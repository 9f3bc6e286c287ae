import dataclasses
import io
import itertools
import json
import pathlib

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
from broken_off import Killed, broken_off, kill
from etils import epath
from event_files import events
from PIL import Image

from vqbeam.configs import VqbeamError, to_dict
from vqbeam.vqvae import training
from vqbeam.vqvae.building import build_model
from vqbeam.vqvae.finetuning.decoder import DecoderTraining
from vqbeam.vqvae.finetuning.features import _Classification
from vqbeam.vqvae.fitting.fit import load_model
from vqbeam.vqvae.fitting.optimizers import ConvolutionMuon
from vqbeam.vqvae.metrics import perplexity
from vqbeam.vqvae.model import VQVAE, scale_images
from vqbeam.vqvae.storage.records import Shard
from vqbeam.vqvae.storage.run_folder import RunFolder
from vqbeam.vqvae.training import (
    MODEL_FILE,
    STAGE,
    check_fits,
    evaluate,
    load_vqvae,
    reconstruct,
    scale_batch,
    train_vqvae,
)

pytestmark = pytest.mark.slow


def array(tensor):
    return np.asarray(tensor).copy()


def train(run):
    return train_vqvae(str(run.root))


@pytest.fixture(autouse=True, scope="module")
def small_kernels_for_muon():
    """Those of these models are smaller than any that it takes elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConvolutionMuon, "smallest", 4)
        patch.setattr("vqbeam.vqvae.finetuning.features.FEATURES_BATCH", 8)
        yield


@pytest.fixture(scope="module")
def trained(prepared_run, tiny_config):
    """One finished stage for all tests that only look at it."""
    run, pixels = prepared_run(tiny_config(vqvae__steps=4))
    return run, pixels, train(run)


# Every option that keeps state of its own, at once. JAX would compile two grids and a network of
# features for two minutes.
SMALLER = keras.backend.backend() == "jax"
STATEFUL = dict(
    vqvae__steps=4,
    vqvae__grids=1 if SMALLER else 2,
    vqvae__weight_ema=0.7,
    vqvae__augment="flip_crop",
    vqvae__finetune_steps=3,
    vqvae__perceptual=0.0 if SMALLER else 1.0,
    vqvae__adversarial=0.1,
    vqvae__warmup_steps=3,
    vqvae__clip_norm=0.5,
    vqvae__codebook_init="kmeans",
    vqvae__restart_below=0.3,
    vqvae__optimizer="muon",
)


@pytest.fixture(scope="module")
def stateful(prepared_run, tiny_config):
    """One finished stage of this kind."""
    run, pixels = prepared_run(tiny_config(**STATEFUL))
    return run, pixels, train(run)


def test_writes_model_picture_logs_and_manifest(trained):
    run, pixels, manifest = trained
    assert run.is_done(STAGE) and manifest == run.manifest(STAGE)
    assert set(manifest["outputs"]) == {MODEL_FILE}
    assert len(manifest["history"]) == 2  # 4 steps, 2 an epoch
    names = {"loss", "reconstruction", "commitment", "quantization_error", "perplexity"}
    names |= {"codes_used"}
    assert set(manifest["history"][0]) == names | {f"val_{name}" for name in names}
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
    counts = np.bincount(array(model.encode(images)).ravel(), minlength=model.quantizer.num_codes)
    assert measures["perplexity"] == pytest.approx(perplexity(counts), rel=1e-4)
    assert measures["codes_used"] == pytest.approx((counts > 0).mean(), rel=1e-5)
    parts = sum(measures[name] for name in ("reconstruction", "commitment"))
    assert measures["loss"] == pytest.approx(parts, rel=1e-4)


def test_a_finished_stage_is_left_alone(trained):
    run, _, manifest = trained
    before = times_of_files(run.folder(STAGE))
    assert len(before) > 4
    assert train(run) == manifest
    assert times_of_files(run.folder(STAGE)) == before


def times_of_files(folder):
    return {path: path.stat().st_mtime_ns for path in pathlib.Path(folder).rglob("*")}


def arrays_of_last_checkpoint(run):
    """Every array of it: model, optimizer, averages, random states; and the history."""
    found = {}

    def add(name, item):
        if isinstance(item, h5py.Dataset):
            found[name] = item[()]

    path = max(pathlib.Path(run.folder(STAGE)).glob("checkpoints/*/step-*.h5"))
    with h5py.File(path) as file:
        file.visititems(add)
    return found


def assert_same_training(one, other):
    for name in ("history", "measures"):
        assert one.manifest(STAGE)[name] == other.manifest(STAGE)[name]
    models = [load_model(run.folder(STAGE) / MODEL_FILE) for run in (one, other)]
    for a, b in zip(models[0].weights, models[1].weights, strict=True):
        np.testing.assert_array_equal(array(a), array(b), err_msg=a.path)
    states = [arrays_of_last_checkpoint(run) for run in (one, other)]
    assert states[0].keys() == states[1].keys() and len(states[0]) > 40
    for name, value in states[0].items():
        np.testing.assert_array_equal(value, states[1][name], err_msg=name)


@pytest.mark.backend
def test_all_state_goes_on_where_training_was_broken_off(
    stateful, prepared_run, tiny_config, monkeypatch
):
    other, _ = prepared_run(tiny_config(**STATEFUL))
    # In the middle of an epoch and of the warm-up, and of training each network of the second part.
    kinds = (VQVAE, DecoderTraining) if SMALLER else (VQVAE, _Classification, DecoderTraining)
    for kind in kinds:
        with broken_off(3 if kind is VQVAE else 1, kind):
            train(other)
    with monkeypatch.context() as patch:
        # And once more after the last epoch, before the model is written.
        patch.setattr("vqbeam.vqvae.training.save_model", kill)
        with pytest.raises(Killed):
            train(other)
    train(other)
    assert_same_training(stateful[0], other)
    assert len(stateful[2]["history"]) == len(stateful[2]["finetune_history"]) == 2


def all_changes(image):
    """All that an image of 8x8 pixels can become by `flip_crop`."""
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode="reflect")
    for down, right in itertools.product(range(3), repeat=2):
        crop = padded[down : down + 8, right : right + 8]
        yield from (crop, crop[:, ::-1])


def test_batches_are_augmented_by_step(trained, monkeypatch):
    run, pixels, _ = trained

    def batches(augmentation, first_step=0):
        inputs = training.training_images(run, augmentation).inputs(first_step)
        return [np.asarray(batch) for batch in itertools.islice(inputs, 2)]

    plain, first, later = batches("none"), batches("flip_crop"), batches("flip_crop", 1)
    for one, other in zip(plain, first, strict=True):
        assert (one != other).any() and one.dtype == other.dtype == np.float32
        # Each image is one of itself moved by up to a pixel, mirrored or not.
        for image, changed in zip(one, other, strict=True):
            assert any((way == changed).all() for way in all_changes(image))
    # From another step on they are the same: resuming changes nothing.
    for one, other in zip(first[1:], later, strict=False):
        np.testing.assert_array_equal(one, other)
    # Validation images are never varied.
    held_out = np.concatenate(list(training._validation(run, 4).as_numpy_iterator()))
    np.testing.assert_allclose(held_out, pixels["validation"] / 127.5 - 1, atol=1e-6)


def test_tensorboard_shows_pictures_and_the_use_of_each_codebook(stateful):
    run, pixels, manifest = stateful
    found = events(run.folder(STAGE) / "logs" / "images")
    names = {"codebook_use/level_0", "codebook_use/level_1", "reconstructions"}
    assert set(found) == names
    for steps in found.values():
        assert list(steps) == [0, 1]
    for shown in found["reconstructions"].values():
        with Image.open(io.BytesIO(shown[2])) as figure:
            assert figure.size == (10 * 68 + 4, 2 * 68 + 4)
            picture = np.asarray(figure)
        original = pixels["validation"][3].repeat(8, 0).repeat(8, 1)
        left = 4 + 3 * 68
        np.testing.assert_array_equal(picture[4:68, left : left + 64, :1], original)
    for level, positions in enumerate([1, 4]):
        for epoch, buckets in found[f"codebook_use/level_{level}"].items():
            # Rows of left edge, right edge and count: how many codes were chosen how often.
            assert buckets[:, 2].sum() == 12
            chosen = (buckets[:, :2].mean(1) * buckets[:, 2]).sum()
            assert chosen == pytest.approx(10 * positions, rel=0.3)
            used = manifest["history"][epoch][f"val_codes_used_{level}"]
            least = buckets[0]
            assert used == 1 or least[0] <= 0 < least[2]


def test_tensorboard_shows_every_measure(stateful):
    run, _, manifest = stateful
    history = manifest["history"]
    for part, prefix in (("train", ""), ("validation", "val_")):
        found = events(run.folder(STAGE) / "logs" / part)
        own = [name for name in history[0] if name.startswith("val_") == bool(prefix)]
        assert len(own) == 10
        for name in own:
            shown = found[f"epoch_{name.removeprefix(prefix)}"]
            values = [shown[epoch].item() for epoch in range(2)]
            expected = [epoch[name] for epoch in history]
            np.testing.assert_allclose(values, expected, rtol=1e-5, err_msg=name)


def test_needs_prepared_images(tmp_path, tiny_config):
    run = RunFolder(tmp_path / "run")
    run.start(tiny_config())
    with pytest.raises(VqbeamError, match="no finished prepare stage; run vqbeam prepare"):
        train(run)
    with pytest.raises(VqbeamError, match="no finished train-vqvae stage"):
        load_vqvae(run)


def test_a_truncated_shard_is_named(prepared_run, tiny_config):
    run, _ = prepared_run(tiny_config())
    shard = run.folder("prepare") / Shard("images", "train", 0, 2).filename
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(VqbeamError, match="images-train.tfrecord-00000-of-00002 has .* instead of"):
        train(run)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_codes", 16, "model.keras has .* 2×2 grid, K = 12, .* says 2×2 grid, K = 16"),
        ("downsampling", 2, "has .* 2×2 grid, K = 12, .* says 4×4 grid, K = 12"),
        ("grids", 2, "has .* 2×2 grid, K = 12, .* says 1×1 and 2×2 grids, K = 12"),
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
    model = load_vqvae(run)
    found = model.get_config() | model.quantizer.get_config()
    shared = set(config) & set(found) - {"dtype", "quantizer"}
    assert len(shared) >= 12
    assert {name: found[name] for name in shared} == {name: config[name] for name in shared}
