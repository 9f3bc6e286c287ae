import socket
import tarfile

import keras
import numpy as np
import pytest
import tensorflow as tf

import vqbeam.pipelines.evaluation.features as features
from vqbeam.configs import VqbeamError
from vqbeam.pipelines.evaluation.features import build_classifier, feature_extractor, feature_model


def write_graph(folder):
    """Writes an archive with a graph whose operations are as old as those of Inception's.

    Its features are the mean, the largest and the smallest value of each scaled channel, normalized
    with a mean of 0.5, a variance of 4, a scale of 2 and an offset of 1.
    """
    with tf.Graph().as_default() as graph:
        images = tf.compat.v1.placeholder(tf.float32, (None, None, None, 3), name="ExpandDims")
        large = tf.compat.v1.image.resize_bilinear(images, (299, 299))
        scaled = (large - 128) * 0.0078125
        reductions = (tf.reduce_mean, tf.reduce_max, tf.reduce_min)
        parts = [reduce(scaled, axis=(1, 2), keepdims=True) for reduce in reductions]
        tf.concat(parts, axis=-1, name="parts")
        for name, value in {"center": 0.5, "variance": 4.0, "offset": 1.0, "scale": 2.0}.items():
            tf.constant([value] * 9, name=name)
    graph_def = graph.as_graph_def()
    graph_def.versions.producer = 8
    old = graph_def.node.add(name="pool_3", op="BatchNormWithGlobalNormalization")
    old.input.extend(["parts", "center", "variance", "offset", "scale"])
    old.attr["T"].type = tf.float32.as_datatype_enum
    old.attr["variance_epsilon"].f = 0.001
    old.attr["scale_after_normalization"].b = True
    (folder / "classify_image_graph_def.pb").write_bytes(graph_def.SerializeToString())
    with tarfile.open(folder / "inception.tgz", "w:gz") as archive:
        archive.add(folder / "classify_image_graph_def.pb", "classify_image_graph_def.pb")
    return folder / "inception.tgz"


@pytest.fixture
def downloads(monkeypatch, tmp_path):
    """The addresses that are asked for; an archive of `write_graph` is what they give."""
    asked = []

    def get_file(*, origin, cache_subdir):
        asked.append((origin, cache_subdir))
        return write_graph(tmp_path)

    monkeypatch.setattr(keras.utils, "get_file", get_file)
    return asked


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


def larger(images):
    """Images as TensorFlow scaled them in 2015: pixel i of 299 lies at 8 i / 299 of 8."""
    positions = np.arange(299) * 8 / 299
    low = np.floor(positions).astype(int)
    high, share = np.minimum(low + 1, 7), (positions - low)[:, None]
    rows = images[:, low] * (1 - share[:, None]) + images[:, high] * share[:, None]
    return rows[:, :, low] * (1 - share) + rows[:, :, high] * share


@pytest.mark.parametrize("channels", [1, 3])
def test_the_inception_of_published_distances(downloads, channels):
    # More than a batch, and the last one has fewer.
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, channels), np.uint8)
    found = feature_extractor("a run", "inception")(images)
    assert found.shape == (40, 9) and found.dtype == np.float32
    scaled = (larger(np.broadcast_to(images, (40, 8, 8, 3))) - 128) / 128
    parts = [scaled.mean((1, 2)), scaled.max((1, 2)), scaled.min((1, 2))]
    expected = (np.concatenate(parts, axis=-1) - 0.5) / np.sqrt(4.001) * 2 + 1
    np.testing.assert_allclose(found, expected, atol=1e-4)
    [(address, folder)] = downloads
    assert address.endswith("/inception-2015-12-05.tgz") and folder == "models"


def test_inception_without_a_network(monkeypatch):
    timeouts = []

    def fail(**_):
        timeouts.append(socket.getdefaulttimeout())
        raise Exception("URL fetch failure on FILE: None -- timed out\nand more")

    monkeypatch.setattr(keras.utils, "get_file", fail)
    before = socket.getdefaulttimeout()
    with pytest.raises(VqbeamError) as caught:
        feature_extractor("a run", "inception")
    assert str(caught.value) == (
        "Inception's weights do not load (URL fetch failure on FILE: None -- timed out); use "
        "--features classifier, or put that file into ~/.keras/models"
    )
    assert timeouts == [10] and socket.getdefaulttimeout() == before
