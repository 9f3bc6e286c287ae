import socket

import keras
import numpy as np
import pytest

import vqbeam.pipelines.evaluation.features as features
from vqbeam.configs import VqbeamError
from vqbeam.pipelines.evaluation.features import build_classifier, feature_extractor, feature_model


@pytest.fixture
def inception(monkeypatch):
    """Puts a network without weights in Inception's place; returns the shapes that it is given."""
    shapes = []

    def build(*, include_top, pooling, weights):
        assert (include_top, pooling, weights) == (False, "avg", "imagenet")
        images = keras.Input((None, None, 3))
        # The mean of each channel, and its largest and smallest value.
        numbers = [
            keras.layers.GlobalAveragePooling2D()(images),
            keras.layers.GlobalMaxPooling2D()(images),
            -keras.layers.GlobalMaxPooling2D()(-images),
        ]
        model = keras.Model(images, keras.layers.Concatenate()(numbers))
        call = model.call

        def record(inputs, **options):
            shapes.append(tuple(inputs.shape))
            return call(inputs, **options)

        model.call = record
        return model

    monkeypatch.setattr(keras.applications, "InceptionV3", build)
    return shapes


def test_classifier_features(monkeypatch):
    classifier = build_classifier((8, 8, 1), 2)
    # Statistics of a batch would give other features than those that were learned.
    classifier.layers[3].moving_variance.assign(np.full(32, 9.0))
    monkeypatch.setattr(features, "load_classifier", {"a run": classifier}.get)
    images = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 1), np.uint8)
    found = feature_extractor("a run", "classifier")(images)
    expected = keras.ops.convert_to_numpy(feature_model(classifier)(images, training=False))
    assert isinstance(found, np.ndarray) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("channels", [1, 3])
def test_inception_sees_large_colour_images_in_its_range(
    prepared_run, tiny_config, inception, channels
):
    run, _ = prepared_run(tiny_config(data__channels=channels), labels=())
    numbers = np.random.default_rng(0)
    images = numbers.integers(0, 256, (40, 8, 8, channels), np.uint8)
    found = feature_extractor(run, "inception")(images)
    assert found.shape == (40, 9) and found.dtype == np.float32
    assert {shape[1:] for shape in inception} == {(299, 299, 3)}
    scaled = np.broadcast_to(images / 127.5 - 1, (40, 8, 8, 3))
    np.testing.assert_allclose(found[:, :3], scaled.mean(axis=(1, 2)), atol=0.02)
    np.testing.assert_allclose(found[:, 3:6], scaled.max(axis=(1, 2)), atol=0.1)
    np.testing.assert_allclose(found[:, 6:], scaled.min(axis=(1, 2)), atol=0.1)


def test_inception_takes_few_images_at_once(prepared_run, tiny_config, inception):
    run, _ = prepared_run(tiny_config(), labels=())
    feature_extractor(run, "inception")(np.zeros((70, 8, 8, 1), np.uint8))
    assert {shape[0] for shape in inception} - {None} == {32, 6}


def test_inception_without_a_network(prepared_run, tiny_config, monkeypatch):
    timeouts = []

    def fail(**_):
        timeouts.append(socket.getdefaulttimeout())
        raise Exception("URL fetch failure on FILE: None -- timed out\nand more")

    monkeypatch.setattr(keras.applications, "InceptionV3", fail)
    run, _ = prepared_run(tiny_config())
    before = socket.getdefaulttimeout()
    with pytest.raises(VqbeamError) as caught:
        feature_extractor(run, "inception")
    assert str(caught.value) == (
        "Inception's weights do not load (URL fetch failure on FILE: None -- timed out); use "
        "--features classifier, or put that file into ~/.keras/models"
    )
    assert timeouts == [10] and socket.getdefaulttimeout() == before
