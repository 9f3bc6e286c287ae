import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

from vqbeam.vqvae.building import build_model
from vqbeam.vqvae.fitting.fit import load_model, save_model
from vqbeam.vqvae.layout import CodeLayout
from vqbeam.vqvae.metrics import perplexity
from vqbeam.vqvae.model import VQVAE, scale_images
from vqbeam.vqvae.quantizers.vector import VectorQuantizer
from vqbeam.vqvae.storage.records import UNTUNED

SHAPE = (8, 8, 1)
VARIANCE = 0.3


@pytest.fixture
def make(tiny_config):
    def build(**changes):
        changes = {f"vqvae__{name}": value for name, value in changes.items()}
        model = build_model(tiny_config(**changes), data_variance=VARIANCE)
        # Codes among the latents, so that several are chosen.
        z = array(ops.cast(model.encoder(scale_images(pixels(16, seed=9))), "float32"))
        z = z.reshape(-1, z.shape[-1])
        size = model.quantizer.num_codes
        model.quantizer.codebook.assign(z[:: len(z) // size][:size])
        return model

    return build


def array(tensor):
    return np.asarray(tensor).copy()


def pixels(count, seed=0, shape=SHAPE):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), np.uint8)


def scaled(count, seed=0):
    return (pixels(count, seed) / 127.5 - 1).astype("float32")


def batches(images, batch_size):
    return tf.data.Dataset.from_tensor_slices(images).batch(batch_size).with_options(UNTUNED)


def assert_same(model, other):
    assert len(model.weights) == len(other.weights)
    for one, two in zip(model.weights, other.weights, strict=True):
        np.testing.assert_array_equal(array(one), array(two), err_msg=one.path)


def test_shapes():
    downsampling = 8
    model = VQVAE(
        image_shape=(16, 32, 3),
        quantizer=VectorQuantizer(10, 3),
        downsampling=downsampling,
        width=4,
        residual_layers=0,
        residual_width=2,
    )
    grid = (16 // downsampling, 32 // downsampling)
    assert model.layout == CodeLayout(10, (grid,)) and model.built
    assert model.encoder.output_shape == (None, *grid, 3)
    assert model.decoder.output_shape == (None, 16, 32, 3)
    assert model.quantizer.codebook.shape == (10, 3)


@pytest.mark.parametrize("update", ["ema", pytest.param("gradient", marks=pytest.mark.backend)])
def test_loss_in_numpy(make, update):
    model = make(codebook_update=update, commitment=0.4)
    images = scaled(5)
    result = model(images)
    z, codebook = array(model.encoder(images)), array(model.quantizer.codebook)
    codes = np.square(z[..., None, :] - codebook).sum(-1).argmin(-1)
    np.testing.assert_array_equal(array(result["codes"]), codes)
    assert len(np.unique(codes)) > 2
    decoded = array(model.decoder(codebook[codes]))
    np.testing.assert_allclose(array(result["reconstruction"]), decoded, atol=1e-5)

    expected = {
        "reconstruction": np.square(images - decoded).mean() / VARIANCE,
        "commitment": 0.4 * np.square(z - codebook[codes]).mean(),
    }
    if update == "gradient":
        expected["codebook"] = np.square(z - codebook[codes]).mean()
    expected["loss"] = sum(expected.values())
    loss = model.compute_loss(x=images, y_pred=result)
    np.testing.assert_allclose(array(loss), expected["loss"], rtol=1e-4)
    model.compile("sgd")
    measured = model.evaluate(images, return_dict=True, verbose=0)
    expected["quantization_error"] = expected["commitment"] / 0.4
    for name, value in expected.items():
        np.testing.assert_allclose(measured[name], value, rtol=1e-4, err_msg=name)
    assert set(measured) == {*expected, "perplexity", "codes_used"}


@pytest.mark.slow
@pytest.mark.usefixtures("compiled")
def test_fit_lowers_the_loss(make):
    model = make(codebook_update="ema")
    model.compile(keras.optimizers.Adam(3e-3))
    images = scaled(8) * 0.2 + np.linspace(-0.5, 0.5, 8, dtype="float32")[:, None, None, None]
    data = tf.data.Dataset.from_tensors(images).repeat().with_options(UNTUNED)
    history = model.fit(data, epochs=3, steps_per_epoch=20, shuffle=False, verbose=0).history
    # Below one: better than the mean of all pixels would do.
    assert history["reconstruction"][-1] < 0.6 * history["reconstruction"][0]
    assert history["loss"][-1] < history["loss"][0]


@pytest.mark.backend
def test_epoch_measures_weigh_a_short_last_batch(make):
    model = make(codebook_update="gradient", restart_below=0.0)
    model.compile(keras.optimizers.SGD(0.0))
    images = scaled(10)
    # The odd ones out are in the short batch, so that a plain mean over batches would differ.
    images[8:] = 1.0
    whole = model.evaluate(batches(images, 10), return_dict=True, verbose=0)
    split = model.evaluate(batches(images, 4), return_dict=True, verbose=0)
    trained = model.fit(batches(images, 4), shuffle=False, verbose=0).history
    assert set(whole) == set(split) == set(trained)
    for name, value in whole.items():
        np.testing.assert_allclose(split[name], value, rtol=1e-4, err_msg=name)
        np.testing.assert_allclose(trained[name][0], value, rtol=1e-4, err_msg=name)


@pytest.mark.slow
def test_perplexity_is_counted_over_the_epoch_and_anew_in_each(make):
    model = make(codebook_update="gradient", restart_below=0.0)
    model.compile(keras.optimizers.SGD(0.0))
    first, second = pixels(12), pixels(4, seed=1)
    for images in (first, second):
        codes = array(model.encode(images))
        expected = np.bincount(codes.ravel(), minlength=model.quantizer.num_codes)
        data = batches((images / 127.5 - 1).astype("float32"), 4)
        measured = model.evaluate(data, return_dict=True, verbose=0)
        np.testing.assert_allclose(measured["perplexity"], perplexity(expected), rtol=1e-4)
        np.testing.assert_allclose(measured["codes_used"], (expected > 0).mean(), rtol=1e-5)
        history = model.fit(data, epochs=2, shuffle=False, verbose=0).history
        np.testing.assert_allclose(history["perplexity"], [perplexity(expected)] * 2, rtol=1e-4)


@pytest.mark.slow
def test_validation_moves_no_weight(make):
    model = make()
    model.compile("adam")
    model.fit(batches(scaled(8), 4), shuffle=False, verbose=0)
    before = [array(weight) for weight in model.weights]
    model.evaluate(batches(scaled(8, seed=1), 4), verbose=0)
    for old, new in zip(before, model.weights, strict=True):
        np.testing.assert_array_equal(old, array(new))


@pytest.mark.parametrize(
    "dtype", [pytest.param("float32", marks=pytest.mark.backend), "mixed_bfloat16"]
)
def test_encode_and_decode_agree_with_call(make, dtype):
    model = make(dtype=dtype)
    images = pixels(6)
    result = model(array(scale_images(images)))
    codes = model.encode(images)
    np.testing.assert_array_equal(array(codes), array(result["codes"]))
    assert array(codes).dtype == np.int32 and codes.shape == (6, 2, 2)
    decoded = array(model.decode(codes))
    assert decoded.dtype == np.uint8 and decoded.shape == images.shape
    expected = np.clip((array(result["reconstruction"]) + 1) * 127.5, 0, 255)
    # Straight-through rounds otherwise than a lookup, in half precision by a digit of 8 bits.
    assert np.abs(decoded - expected).max() < (0.51 if dtype == "float32" else 2)


def test_decode_is_the_inverse_of_scale_images_and_clips(make, monkeypatch):
    model = make()
    every = np.arange(256, dtype="uint8").reshape(1, 16, 16, 1)
    images = array(scale_images(every))
    assert images.dtype == np.float32 and (images.min(), images.max()) == (-1, 1)
    beyond = np.array([-1.5, 1.5, 1.0039, -1.0039, 0.0], "float32").reshape(1, 1, 5, 1)
    for decoded, expected in [(images, every.ravel()), (beyond, [0, 255, 255, 0, 128])]:
        # A decoder whose output is known.
        object.__setattr__(model, "decoder", lambda _, training, known=decoded: known)
        result = array(model.decode(np.zeros((1, 2, 2), "int32")))
        np.testing.assert_array_equal(result.ravel(), expected)


def test_a_mixed_policy(make):
    model = make(dtype="mixed_float16")
    for network in (model.encoder, model.decoder):
        found = [x for x in network._flatten_layers() if "conv" in x.name]
        assert found and {layer.compute_dtype for layer in found} == {"float16"}
    assert model.quantizer.compute_dtype == "float32"
    assert {weight.dtype for weight in model.trainable_variables} == {"float32"}
    assert model.quantizer.codebook.dtype == "float32"
    result = model(scaled(4), training=True)
    tensors = [result["reconstruction"], *result["losses"].values()]
    tensors += result["statistics"].values()
    assert len(tensors) == 3
    for tensor in tensors:
        assert keras.backend.standardize_dtype(tensor.dtype) == "float32"


@pytest.mark.backend
@pytest.mark.slow
def test_mixed_policy_trains(make):
    model = make(dtype="mixed_bfloat16")
    model.compile(keras.optimizers.Adam(1e-3))
    history = model.fit(
        batches(scaled(16), 8).repeat(), epochs=3, steps_per_epoch=4, shuffle=False, verbose=0
    )
    loss = history.history["loss"]
    assert np.isfinite(loss).all() and loss[-1] < loss[0]


def test_initialize_codebook_takes_latents(make):
    model = make()
    images = scaled(16, seed=2)
    model.initialize_codebook(images, "data", seed=0)
    z = array(model.encoder(images)).reshape(-1, 4)
    codebook = array(model.quantizer.codebook)
    assert (np.abs(z[:, None] - codebook).max(-1).min(0) < 1e-6).all()
    before = [array(weight) for weight in model.weights]
    model.initialize_codebook(images, "random", seed=0)
    for old, new in zip(before, model.weights, strict=True):
        np.testing.assert_array_equal(old, array(new))


@pytest.mark.slow
@pytest.mark.parametrize(("update", "dtype"), [("ema", "float32"), ("gradient", "mixed_bfloat16")])
def test_save_and_load(make, tmp_path, update, dtype):
    from etils import epath

    model = make(
        codebook_update=update,
        dtype=dtype,
        ema_decay=0.8,
        commitment=0.5,
        restart_below=0.0 if update == "ema" else 0.1,
    )
    model.compile(keras.optimizers.SGD(0.01))
    model.fit(batches(scaled(8), 4), shuffle=False, verbose=0)
    save_model(model, epath.Path(tmp_path) / "model.keras")
    twin = load_model(epath.Path(tmp_path) / "model.keras")
    assert isinstance(twin, VQVAE)
    # As JSON, which knows no tuples.
    assert json.dumps(twin.get_config()) == json.dumps(model.get_config())
    assert twin.dtype_policy == model.dtype_policy
    assert_same(model, twin)
    images = pixels(5)
    codes = array(model.encode(images))
    np.testing.assert_array_equal(codes, array(twin.encode(images)))
    np.testing.assert_array_equal(array(model.decode(codes)), array(twin.decode(codes)))
    # The averages and the usage are in the file: both models go on alike.
    for copy in (model, twin):
        for variable in copy.variables:
            if "seed_generator" in variable.path:
                variable.assign(np.array([1, 2], "uint32").astype(variable.dtype))
        copy(scaled(4, seed=3), training=True)
    assert_same(model, twin)
