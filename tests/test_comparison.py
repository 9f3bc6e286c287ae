import keras
import numpy as np
import pytest
from measured_run import stub_classifier, stub_features

import vqbeam.pipelines.evaluation.reference as comparison
from vqbeam.pipelines.evaluation.distances import (
    Manifold,
    Moments,
    frechet_distance,
    overlap,
)
from vqbeam.pipelines.evaluation.reference import ReferenceSet

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def stubs(monkeypatch):
    monkeypatch.setattr(comparison, "feature_extractor", stub_features)
    monkeypatch.setattr(comparison, "load_classifier", stub_classifier)


def test_every_figure_in_numpy(prepared_run, tiny_config):
    run, pixels = prepared_run(tiny_config())
    reference = ReferenceSet(run, 100, "classifier", seed=0)
    # There are 20 training images, and 10 held out.
    assert reference.num == 10 and reference.left_out == {}
    others = np.random.default_rng(5).integers(60, 256, (10, 8, 8, 1), np.uint8)
    labels = np.array([0, 1] * 5)
    found = reference.measure([(others[:6], labels[:6]), (others[6:], labels[6:])])
    features = [stub_features(run, "")(images) for images in (pixels["validation"], others)]
    gaussians = []
    for rows in features:
        moments = Moments()
        moments.add(rows)
        gaussians.append(moments.gaussian())
    logits = keras.ops.convert_to_numpy(stub_classifier(run)(others, training=False))
    assert found == {
        "frechet": pytest.approx(frechet_distance(*gaussians), rel=1e-4),
        **overlap(*map(Manifold, features))._asdict(),
        "agreement": (logits.argmax(axis=1) == labels).mean(),
    }


def test_real_images_are_drawn_without_replacement(prepared_run, tiny_config):
    run, pixels = prepared_run(tiny_config())
    known = {image.tobytes(): index for index, image in enumerate(pixels["train"])}
    chosen = []
    for seed in (0, 0, 1):
        reference = ReferenceSet(run, 7, "classifier", seed)
        ((images, labels),) = reference.real("train")
        chosen.append([known[image.tobytes()] for image in images])
        assert labels.tolist() == [index % 2 for index in chosen[-1]]
        assert len(set(chosen[-1])) == 7
    assert chosen[0] == chosen[1] != chosen[2]


@pytest.mark.parametrize(
    ("changes", "features", "missing", "why"),
    [
        ({"labels": ()}, "classifier", 6, "no classes for the classifier to learn; --features inc"),
        ({"labels": ()}, "inception", 1, "no classes for the classifier to learn"),
        ({"validation": 3}, "classifier", 5, "3 images have no 3 neighbours each; hold out more"),
    ],
)
def test_what_cannot_be_measured_says_why(
    prepared_run, tiny_config, changes, features, missing, why
):
    run, _ = prepared_run(tiny_config(), **changes)
    reference = ReferenceSet(run, 100, features, seed=0)
    figures = reference.measure(reference.real("train"))
    assert {name for name, value in figures.items() if value is None} == set(reference.left_out)
    assert len(reference.left_out) == missing
    assert any(reason.startswith(why) for reason in reference.left_out.values())
