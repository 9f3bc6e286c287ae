import json

import keras
import numpy as np
import pytest
from etils import epath
from quantizer_checks import array, assert_same_state, nearest_codes, state

from vqbeam.vqvae.building import build_model
from vqbeam.vqvae.fitting.fit import load_model, save_model
from vqbeam.vqvae.hierarchy import HierarchicalVQVAE
from vqbeam.vqvae.layout import CodeLayout
from vqbeam.vqvae.model import scale_images
from vqbeam.vqvae.quantizers.residual import ResidualQuantizer
from vqbeam.vqvae.quantizers.vector import VectorQuantizer

pytestmark = pytest.mark.slow

VARIANCE = 0.3


def pixels(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 8, 16, 1), np.uint8)


def scaled(count, seed=0):
    return (pixels(count, seed) / 127.5 - 1).astype("float32")


@pytest.fixture
def make(tiny_config):
    def build(**changes):
        changes = {f"vqvae__{name}": value for name, value in changes.items()}
        config = tiny_config(data__width=16, vqvae__grids=2, **changes)
        model = build_model(config, data_variance=VARIANCE)
        model.initialize_codebook(scaled(12, seed=9), "kmeans", seed=0)
        return model

    return build


@pytest.mark.backend
def test_in_numpy(make):
    model, images = make(commitment=0.6, codebook_update="gradient"), scaled(5)
    assert model.layout == CodeLayout(12, ((1, 2), (2, 4)))
    result = model(images)
    features = array(model.encoder(images))
    assert features.shape == (5, 2, 4, 8)
    z = array(model.top_encoder(features))
    top_book, bottom_book = (array(q.vectors()) for q in (model.top_quantizer, model.quantizer))
    assert np.abs(top_book - bottom_book).max() > 0.01  # two codebooks
    top = nearest_codes(z, top_book)
    top_error = np.square(z - top_book[top]).mean()
    coarse = array(model.top_decoder(top_book[top]))
    assert coarse.shape == (5, 2, 4, 4)
    z = array(model.bottom_projection(np.concatenate([features, coarse], axis=-1)))
    bottom = nearest_codes(z, bottom_book)
    bottom_error = np.square(z - bottom_book[bottom]).mean()
    error = top_error + bottom_error
    assert min(len(np.unique(codes)) for codes in (top, bottom)) > 2

    codes = np.concatenate([top.reshape(5, 2), bottom.reshape(5, 8)], axis=1)
    np.testing.assert_array_equal(array(result["codes"]), codes)
    seen = np.concatenate([coarse, bottom_book[bottom]], axis=-1)
    decoded = array(model.decoder(seen.astype("float32")))
    np.testing.assert_allclose(array(result["reconstruction"]), decoded, atol=1e-4)
    np.testing.assert_allclose(array(model.latents(codes)), seen, atol=1e-5)
    np.testing.assert_allclose(array(result["losses"]["commitment"]), 0.6 * error, rtol=1e-4)
    np.testing.assert_allclose(array(result["losses"]["codebook"]), error, rtol=1e-4)
    of_a_cell = (2 * top_error + 8 * bottom_error) / 10
    found = array(result["statistics"]["quantization_error"])
    np.testing.assert_allclose(found, of_a_cell, rtol=1e-4)
    loss = array(model.compute_loss(x=images, y_pred=result))
    expected = np.square(images - decoded).mean() / VARIANCE + 1.6 * error
    np.testing.assert_allclose(loss, expected, rtol=1e-4)


def test_encode_and_decode_agree_with_call(make):
    model, images = make(), pixels(5)
    result = model(array(scale_images(images)))
    codes = array(model.encode(images))
    np.testing.assert_array_equal(codes, array(result["codes"]))
    decoded = array(model.decode(codes))
    assert decoded.dtype == np.uint8 and decoded.shape == images.shape
    expected = np.clip((array(result["reconstruction"]) + 1) * 127.5, 0, 255)
    assert np.abs(decoded - expected).max() < 0.51
    # Both grids matter to the picture.
    for place in (0, -1):
        other = codes.copy()
        other[:, place] = (other[:, place] + 5) % 12
        assert (array(model.decode(other)) != decoded).any()


@pytest.mark.backend
def test_fit_moves_every_part_and_counts_both_codebooks(make):
    model = make(restart_below=0.0)
    before = {path.path: array(path) for path in model.weights}
    model.compile(keras.optimizers.Adam(3e-3))
    images = scaled(8) * 0.2
    history = model.fit(images, batch_size=8, epochs=6, shuffle=False, verbose=0).history
    assert history["loss"][-1] < history["loss"][0]
    still = [w.path for w in model.weights if (array(w) == before[w.path]).all()]
    # A bias that no unit uses may stay; a kernel or a codebook may not.
    assert not [path for path in still if "bias" not in path]
    for quantizer, positions in ((model.top_quantizer, 2), (model.quantizer, 8)):
        expected = 8 * positions * sum(0.99**i for i in range(6))
        grown = array(quantizer.usage).sum() - before[quantizer.usage.path].sum() * 0.99**6
        np.testing.assert_allclose(grown, expected, rtol=1e-4)
    codes = array(model.encode(((images + 1) * 127.5).round().astype("uint8")))
    measured = model.evaluate(images, return_dict=True, verbose=0)
    shares = [len(np.unique(codes[:, :2])) / 12, len(np.unique(codes[:, 2:])) / 12]
    assert measured["codes_used_0"] == pytest.approx(shares[0], abs=0.1)
    assert measured["codes_used_1"] == pytest.approx(shares[1], abs=0.1)
    assert measured["codes_used"] == pytest.approx(
        (measured["codes_used_0"] + measured["codes_used_1"]) / 2
    )


def test_initialize_places_both_codebooks_among_their_latents(make):
    model = make()
    images = scaled(12, seed=9)
    features = model.encoder(images)
    z = array(model.top_encoder(features)).reshape(-1, 4)
    error = np.square(
        z
        - array(model.top_quantizer.vectors())[
            nearest_codes(z, array(model.top_quantizer.vectors()))
        ]
    ).mean()
    assert error < 0.5 * z.var()
    statistics = model(images)["statistics"]
    assert array(statistics["quantization_error"]) < 0.5 * (z.var() + array(features).var())
    assert array(model.top_quantizer.usage).sum() == len(z)
    assert array(model.quantizer.usage).sum() == 4 * len(z)


def test_save_and_load(make, tmp_path):
    model = make(restart_below=0.0)
    model.compile(keras.optimizers.SGD(0.01))
    model.fit(scaled(8), batch_size=4, shuffle=False, verbose=0)
    save_model(model, epath.Path(tmp_path) / "model.keras")
    twin = load_model(epath.Path(tmp_path) / "model.keras")
    assert type(twin) is HierarchicalVQVAE and twin.layout == model.layout
    # As JSON, which knows no tuples.
    assert json.dumps(twin.get_config()) == json.dumps(model.get_config())
    assert_same_state(state(model), state(twin))
    for copy in (model, twin):
        copy(scaled(4, seed=3), training=True)
    assert_same_state(state(model), state(twin))


def test_refuses_what_has_no_half(tiny_config):
    network = dict(image_shape=(8, 12, 1), downsampling=4, width=4)
    blocks = dict(residual_layers=0, residual_width=2)
    with pytest.raises(ValueError, match="the bottom grid is 2×3; its sides must be even"):
        HierarchicalVQVAE(quantizer=VectorQuantizer(5, 3), **network, **blocks)
    with pytest.raises(ValueError, match="two grids of several codes"):
        HierarchicalVQVAE(quantizer=ResidualQuantizer(2, 5, 3), **network, **blocks)
