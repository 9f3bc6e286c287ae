import keras
import numpy as np
import pytest

import vqbeam


def blobs(count=64):
    """Images [N, 8, 8, 1] of one soft spot each."""
    centres = np.random.default_rng(0).uniform(1, 7, (count, 2, 1, 1))
    places = np.indices((8, 8))[None]
    squares = np.square(places - centres).sum(axis=1)
    return np.exp(-squares / 4)[..., None].astype("float32")


def autoencoder(**settings):
    keras.utils.set_random_seed(1)
    inputs = keras.Input((8, 8, 1))
    z = keras.layers.Conv2D(8, 4, strides=2, padding="same", activation="gelu")(inputs)
    z = keras.layers.Conv2D(4, 3, padding="same")(z)
    z = vqbeam.VectorQuantizer(16, 4, name="codes", **settings)(z)
    z = keras.layers.Conv2D(8, 3, padding="same", activation="gelu")(z)
    outputs = keras.layers.Conv2DTranspose(1, 4, strides=2, padding="same")(z)
    model = keras.Model(inputs, outputs)
    model.compile(keras.optimizers.Adam(0.01), "mse")
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{"update": "gradient"}, pytest.param({"restart_below": 0.1}, marks=pytest.mark.backend)],
)
def test_an_autoencoder_of_ones_own(settings, tmp_path):
    images, model = blobs(), autoencoder(**settings)
    layer = model.get_layer("codes")
    assert layer.codebook.trainable == (settings.get("update") == "gradient")
    before = keras.ops.convert_to_numpy(layer.vectors())
    history = model.fit(images, images, batch_size=32, epochs=8, verbose=0).history
    assert history["loss"][-1] < 0.7 * history["loss"][0]
    assert np.abs(keras.ops.convert_to_numpy(layer.vectors()) - before).max() > 1e-3
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded.get_layer("codes")) is vqbeam.VectorQuantizer
    np.testing.assert_array_equal(
        loaded.predict(images, verbose=0), model.predict(images, verbose=0)
    )


@pytest.mark.backend
def test_tensor_in_tensor_out_and_the_losses_added():
    layer = vqbeam.VectorQuantizer(16, 4, update="gradient", commitment=0.5)
    z = np.random.default_rng(0).normal(size=(2, 3, 4)).astype("float32")
    quantized = keras.ops.convert_to_numpy(layer(z))
    codes = keras.ops.convert_to_numpy(layer.encode(z))
    codebook = keras.ops.convert_to_numpy(layer.codebook)
    assert codes.shape == (2, 3) and codes.dtype == np.int32
    np.testing.assert_allclose(quantized, codebook[codes], atol=1e-6)
    np.testing.assert_array_equal(
        keras.ops.convert_to_numpy(layer.decode_codes(codes)), codebook[codes]
    )
    (loss,) = layer.losses
    np.testing.assert_allclose(loss, 1.5 * np.square(z - codebook[codes]).mean(), rtol=1e-5)


def test_an_input_of_another_size():
    with pytest.raises(ValueError, match="takes 4 channels, its input has 5; make them equal"):
        vqbeam.VectorQuantizer(16, 4)(np.zeros((2, 5), "float32"))
