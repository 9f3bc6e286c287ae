import keras
import numpy as np
import pytest
from keras import layers

from vqbeam.configs import WITHOUT_CODEBOOK, VqbeamError
from vqbeam.vqvae.building import build_model
from vqbeam.vqvae.fitting.optimizers import build_optimizer
from vqbeam.vqvae.gradients import (
    audit,
    estimator_of,
    loss_gradients,
    losses_of,
    set_estimator,
    training_errors,
)
from vqbeam.vqvae.model import VQVAE
from vqbeam.vqvae.quantizers.vector import VectorQuantizer

pytestmark = pytest.mark.slow

K, D, BETA, VARIANCE = 21, 3, 0.4, 0.3
SPARSE = "sparse" if keras.backend.backend() == "tensorflow" else "dense"
VARIANTS = {
    "vector": {"codebook_update": "gradient"},
    "ema": {"codebook_update": "ema"},
    "cosine": {"codebook_update": "gradient", "lookup": "cosine"},
    "rotation": {"codebook_update": "gradient", "estimator": "rotation"},
    "diveq": {"codebook_update": "gradient", "estimator": "diveq"},
    "residual": {"quantizer": "residual", "depth": 2, "codebook_update": "gradient"},
    "simvq": {"quantizer": "simvq"},
    "hierarchical": {"grids": 2, "codebook_update": "gradient"},
    "entropy": {"codebook_update": "gradient", "entropy": 0.1},
}


class LinearVQVAE(VQVAE):
    """Both networks are linear maps of 4×4 patches, so that every gradient has a closed form."""

    def _build_networks(self):
        images = keras.Input(self.architecture["image_shape"])
        latents = keras.Input((2, 2, D))
        encode = layers.Conv2D(D, 4, strides=4, use_bias=False)
        decode = layers.Conv2DTranspose(1, 4, strides=4, use_bias=False)
        self.encoder = keras.Model(images, encode(images))
        self.decoder = keras.Model(latents, decode(latents))
        self._build_quantizer(self.quantizer, self.layout.grids[0])


def images_of(seed, count=6):
    return np.random.default_rng(seed).uniform(-1, 1, (count, 8, 8, 1)).astype("float32")


IMAGES = images_of(0)


def linear_model(**settings):
    settings = {"update": "gradient", "commitment": BETA} | settings
    model = LinearVQVAE(
        image_shape=(8, 8, 1),
        quantizer=VectorQuantizer(K, D, **settings),
        downsampling=4,
        width=4,
        residual_layers=0,
        residual_width=4,
        data_variance=VARIANCE,
    )
    numbers = np.random.default_rng(0)  # the same on each backend
    for network in (model.encoder, model.decoder):
        kernel = network.trainable_variables[0]
        kernel.assign(numbers.normal(size=kernel.shape) * 0.2)
    # Codes among the latents of other images, so that several are chosen, and not all.
    z = array(model.encoder(images_of(2, 40))).reshape(-1, D)
    model.quantizer.codebook.assign(z[:K])
    return model


@pytest.fixture
def make(tiny_config):
    def build(**changes):
        config = tiny_config(**{f"vqvae__{name}": value for name, value in changes.items()})
        return build_model(config, data_variance=VARIANCE)

    return build


def array(tensor):
    return np.array(keras.ops.convert_to_numpy(tensor))


def patches(images):
    """Images [B, 8, 8, 1] as float64 [B·2·2, 16], a row for each latent."""
    blocks = np.float64(images).reshape(-1, 2, 4, 2, 4).transpose(0, 1, 3, 2, 4)
    return blocks.reshape(-1, 16)


def nearest(z, codebook):
    return np.square(z[:, None] - codebook).sum(-1).argmin(-1)


def closed_forms(model, images):
    """The gradients of the linear model, in float64, by loss and part; and the codes."""
    x = patches(images)
    encode = np.float64(array(model.encoder.trainable_variables[0])).reshape(16, D)
    decode = np.float64(array(model.decoder.trainable_variables[0])).reshape(16, D)
    codebook = np.float64(array(model.quantizer.codebook))
    z = x @ encode
    codes = nearest(z, codebook)
    e = codebook[codes]
    at_pixels = 2 / x.size / VARIANCE * (e @ decode.T - x)
    at_rows = np.zeros((K, D))
    np.add.at(at_rows, codes, 2 / z.size * (e - z))
    return codes, {
        "reconstruction": {"encoder": x.T @ (at_pixels @ decode), "decoder": at_pixels.T @ e},
        "codebook": {"codebook": at_rows},
        "commitment": {"encoder": x.T @ (BETA * 2 / z.size * (z - e))},
    }


def rows_of(codes):
    return set(codes.ravel().tolist())


@pytest.mark.backend
def test_norms_and_gradients_in_closed_form():
    model = linear_model()
    codes, expected = closed_forms(model, IMAGES)
    assert 3 < len(rows_of(codes)) < K
    gradients, norms = loss_gradients(model, IMAGES), audit(model, IMAGES).norms
    assert list(norms) == list(expected)
    for loss, at in norms.items():
        assert set(at) == {"encoder", "codebook", "decoder"}
        for part, norm in at.items():
            if part not in expected[loss]:
                assert norm == 0.0  # exactly
                continue
            closed = expected[loss][part]
            np.testing.assert_allclose(norm, np.linalg.norm(closed), rtol=1e-4)
            found = array(gradients[loss][part][0]).reshape(closed.shape)
            np.testing.assert_allclose(found, closed, rtol=1e-3, atol=1e-6)


def test_without_an_estimator_one_path_is_closed_and_none_opened():
    model = linear_model()
    before = audit(model, IMAGES)
    set_estimator(model, "none")
    after = audit(model, IMAGES)
    assert (before.estimator, after.estimator) == ("straight_through", "none")
    assert before.norms["reconstruction"]["encoder"] > 0
    assert after.norms["reconstruction"]["encoder"] == 0.0
    before.norms["reconstruction"].pop("encoder")
    after.norms["reconstruction"].pop("encoder")
    for loss, norms in before.norms.items():
        # Not equal to the last digit: z + sg(e − z) is e but for rounding.
        assert after.norms[loss] == pytest.approx(norms, rel=1e-5, abs=0)


@pytest.mark.parametrize("name", VARIANTS)
def test_paths_of_each_family(make, name):
    model = make(**VARIANTS[name])
    found = audit(model, IMAGES)
    by_gradient = name != "ema"
    assert found.moved_by == ("gradient" if by_gradient else "moving average")
    opened = {
        "reconstruction": {"encoder", "decoder"},
        "codebook": {"codebook"},
        "commitment": {"encoder"},
        "entropy": {"encoder"},
    }
    if name == "hierarchical":
        # What the top codes decode to is part of what the bottom codes stand for.
        opened["commitment"] = {"encoder", "decoder"}
    for loss, norms in found.norms.items():
        assert ("codebook" in norms) == by_gradient
        assert {part for part, norm in norms.items() if norm} == opened[loss]
    set_estimator(model, "none")
    closed = audit(model, IMAGES).norms
    assert closed["reconstruction"]["encoder"] == 0.0
    if name != "hierarchical":  # its bottom quantizer is a way to the top decoder as well
        decoder = found.norms["reconstruction"]["decoder"]
        np.testing.assert_allclose(closed["reconstruction"]["decoder"], decoder, rtol=1e-4)


@pytest.mark.parametrize("quantizer", WITHOUT_CODEBOOK)
def test_families_without_a_codebook(make, quantizer):
    model = make(quantizer=quantizer, num_codes=16, entropy=0.1, fsq_levels="4,4")
    kernel = model.encoder.trainable_variables[-2]
    kernel.assign(kernel * 20)  # of a fresh encoder all numbers are rounded to 0
    found = audit(model, IMAGES)
    assert (found.estimator, found.moved_by) == (None, "nothing")
    assert found.norms["reconstruction"]["encoder"] > 0
    assert "codebook" not in found.norms["reconstruction"]
    assert estimator_of(model) is None
    with pytest.raises(VqbeamError, match="has no gradient estimator to leave out; choose one"):
        set_estimator(model, "none")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("ema", marks=pytest.mark.backend),
        "residual",
        pytest.param("hierarchical", marks=pytest.mark.backend),
    ],
)
def test_the_model_stays_as_it_was(make, name):
    model = make(**VARIANTS[name], restart_below=0.5)
    before = [array(variable) for variable in model.variables]
    audit(model, IMAGES)
    for value, variable in zip(before, model.variables, strict=True):
        np.testing.assert_array_equal(value, array(variable), err_msg=variable.path)


@pytest.mark.parametrize(
    ("estimator", "reached"), [("straight_through", False), ("diveq", True), ("rotation", True)]
)
def test_predictions_are_a_part_of_their_own(tiny_config, estimator, reached):
    config = tiny_config(
        vqvae__quantizer="predictive", vqvae__estimator=estimator, vqvae__codebook_update="gradient"
    )
    model = build_model(config, data_variance=VARIANCE)
    model.initialize_codebook(IMAGES, "data", 0)
    norms = audit(model, IMAGES).norms
    assert list(norms["reconstruction"]) == ["encoder", "predictions", "codebook", "decoder"]
    assert (norms["reconstruction"]["predictions"] > 1e-6) == reached
    assert norms["reconstruction"]["predictions"] == 0 or reached
    assert norms["commitment"]["predictions"] > 1e-4
    assert norms["codebook"]["predictions"] == norms["commitment"]["decoder"] == 0


def test_training_with_and_without(tiny_config):
    config = tiny_config(vqvae__codebook_init="data", vqvae__learning_rate=1e-2)
    # Images of one shade each: what there is to learn is learned in a few steps.
    shades = np.random.default_rng(0).uniform(-1, 1, (31, 8, 1, 1, 1))
    batches = np.broadcast_to(shades, (31, 8, 8, 8, 1)).astype("float32")
    calls = []
    errors = {
        name: training_errors(
            config,
            batches,
            30,
            estimator=name,
            data_variance=VARIANCE,
            on_step=lambda: calls.append(None),
        )
        for name in ("straight_through", "none")
    }
    assert len(calls) == 62
    model = build_model(config, data_variance=VARIANCE)
    model.initialize_codebook(batches[0], "data", config.seed)
    first = array(losses_of(model, model(batches[0]), batches[0])["reconstruction"])
    model.compile(build_optimizer(config.vqvae))
    for batch in batches[:5]:
        model.train_on_batch(batch)
    sixth = array(losses_of(model, model(batches[5]), batches[5])["reconstruction"])
    for found in errors.values():
        assert len(found) == 31
        # The estimator changes no value, only the gradient.
        np.testing.assert_allclose(found[0], first, rtol=1e-5)
    np.testing.assert_allclose(errors["straight_through"][5], sixth, rtol=1e-3)
    assert sum(errors["straight_through"][-5:]) < sum(errors["none"][-5:])
