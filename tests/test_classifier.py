import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from pipeline_fixtures import finish_again

import vqbeam.pipelines.evaluation.features as classifier
from vqbeam.configs import VqbeamError
from vqbeam.pipelines.evaluation.features import (
    build_classifier,
    classifier_accuracy,
    feature_model,
    load_classifier,
)
from vqbeam.vqvae.storage.records import read_split

pytestmark = pytest.mark.slow


def array(tensor):
    return keras.ops.convert_to_numpy(tensor)


def trained_shortly(prepared_run, tiny_config):
    """A run and the classifier of its images, which has learned little; and their pixels."""
    run, pixels = prepared_run(tiny_config(), labels=("a", "b", "c"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier, "_MOST_STEPS", 6)
        return run, pixels, load_classifier(run)


@pytest.fixture(scope="module")
def trained(prepared_run, tiny_config):
    """One for all tests that only look at it."""
    return trained_shortly(prepared_run, tiny_config)


@pytest.fixture
def trainings(monkeypatch):
    """Replaces training; returns the list of its calls."""
    calls = []

    def train(run, prepared, seed):
        calls.append((prepared["counts"], seed))
        return build_classifier(run.load_config().image_shape, len(prepared["label_names"]))

    monkeypatch.setattr(classifier, "_train", train)
    return calls


def test_features_are_what_the_logits_are_made_from(trained):
    _, pixels, model = trained
    logits = array(model(pixels["validation"], training=False))
    features = array(feature_model(model)(pixels["validation"], training=False))
    assert features.shape == (10, 256) and features.dtype == np.float32
    kernel, bias = (array(weight) for weight in model.layers[-1].weights)
    assert logits.shape == (10, 3)
    np.testing.assert_allclose(logits, features @ kernel + bias, atol=1e-4)


def test_accuracy_in_numpy(trained):
    run, pixels, model = trained
    found = array(model(pixels["validation"], training=False)).argmax(axis=1)
    assert classifier_accuracy(run) == pytest.approx((found == np.arange(10) % 3).mean())


@pytest.mark.usefixtures("compiled")
def test_learns_what_can_be_learned(prepared_run, tiny_config, monkeypatch, capsys):
    def told_by_brightness(builder, split):
        def brighten(example):
            return example | {
                "image": example["image"] // 4 + tf.cast(example["label"] * 96, "uint8")
            }

        return read_split(builder, split).map(brighten)

    monkeypatch.setattr(classifier, "read_split", told_by_brightness)
    run, _ = prepared_run(tiny_config(), train=40)
    load_classifier(run)
    assert classifier_accuracy(run) == 1
    # It takes minutes with real data, so that one should know.
    told = capsys.readouterr().err
    assert told.startswith("first, a classifier of the run's images is trained")
    assert f"100 steps; it is kept in {run.evaluation}" in told
    assert told.splitlines()[-1].startswith("epoch 1 of 1  step 100 of 100  loss ")


def test_the_same_images_give_the_same_weights(trained, prepared_run, tiny_config):
    *_, other = trained_shortly(prepared_run, tiny_config)
    for one, two in zip(trained[2].weights, other.weights, strict=True):
        np.testing.assert_array_equal(array(one), array(two), err_msg=one.path)


def test_the_stored_classifier_is_taken(trained, trainings):
    run, pixels, model = trained
    again = load_classifier(run)
    images = pixels["validation"]
    np.testing.assert_array_equal(
        array(model(images, training=False)), array(again(images, training=False))
    )
    assert not trainings


def test_a_damaged_one_is_trained_anew(prepared_run, tiny_config, trainings, capsys):
    run, _ = prepared_run(tiny_config())
    load_classifier(run)
    path = run.evaluation / "classifier.keras"
    path.write_bytes(path.read_bytes()[:99])
    load_classifier(run)
    assert f"{path} cannot be read: a classifier is trained anew" in capsys.readouterr().err
    load_classifier(run)
    assert len(trainings) == 2


def test_other_images_train_it_anew(prepared_run, tiny_config, trainings):
    run, _ = prepared_run(tiny_config(seed=7), train=21)
    counts = {"train": 21, "validation": 10}
    load_classifier(run)
    load_classifier(run)
    assert trainings == [(counts, 7)]
    # The same images, prepared a second time.
    finish_again(run, "prepare")
    load_classifier(run)
    assert len(trainings) == 1
    finish_again(run, "prepare", failed=3)
    load_classifier(run)
    load_classifier(run)
    assert len(trainings) == 2


def test_a_kill_before_the_facts_are_written(prepared_run, tiny_config, trainings, monkeypatch):
    run, _ = prepared_run(tiny_config())
    load_classifier(run)
    facts = run.evaluation / "classifier.json"
    facts.write_text(json.dumps(json.loads(facts.read_text()) | {"images": "of another dataset"}))

    class Killed(BaseException):
        pass

    def kill(model, path):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(classifier, "save_model", kill)
        with pytest.raises(Killed):
            load_classifier(run)
    assert not facts.exists()
    load_classifier(run)
    assert len(trainings) == 3


@pytest.mark.parametrize("lost", ["classifier.keras", "classifier.json"])
def test_a_lost_file_trains_it_anew(prepared_run, tiny_config, trainings, lost):
    run, _ = prepared_run(tiny_config())
    load_classifier(run)
    (run.evaluation / lost).unlink()
    load_classifier(run)
    assert len(trainings) == 2


@pytest.mark.parametrize("labels", [(), ("only",)])
def test_without_classes_there_is_nothing_to_learn(prepared_run, tiny_config, labels):
    run, _ = prepared_run(tiny_config(), labels=labels)
    with pytest.raises(VqbeamError, match="has no classes, .*; use --features inception"):
        load_classifier(run)
    assert not run.evaluation.exists()


def test_fewer_images_are_trained_on_in_fewer_steps(prepared_run, tiny_config, monkeypatch):
    steps = []
    monkeypatch.setattr(
        keras.Model, "fit", lambda *_, steps_per_epoch, **__: steps.append(steps_per_epoch)
    )
    load_classifier(prepared_run(tiny_config(), train=3)[0])
    load_classifier(prepared_run(tiny_config(), train=129)[0])
    monkeypatch.setattr(classifier, "_MOST_STEPS", 250)
    load_classifier(prepared_run(tiny_config(), train=257)[0])
    assert steps == [100, 200, 250]


def test_a_damaged_record_is_named(prepared_run, tiny_config):
    run, _ = prepared_run(tiny_config())
    shard = next(run.folder("prepare").glob("images-train.tfrecord-*"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 255
    shard.write_bytes(bytes(data))
    with pytest.raises(VqbeamError, match="a record in .*images-.* is damaged"):
        load_classifier(run)


def test_images_without_a_class_teach_nothing(prepared_run, tiny_config, monkeypatch):
    steps, seen = [], []

    def fit(model, batches, steps_per_epoch, **_):
        steps.append(steps_per_epoch)
        seen.extend(label for _, labels in batches.take(9) for label in labels.numpy())

    def some_unlabelled(builder, split):
        def without(example):
            return example | {
                "label": tf.where(
                    example["label"] == 1, tf.constant(-1, tf.int64), example["label"]
                )
            }

        return read_split(builder, split).map(without)

    monkeypatch.setattr(keras.Model, "fit", fit)
    monkeypatch.setattr(classifier, "read_split", some_unlabelled)
    run, _ = prepared_run(tiny_config(), train=258, labels=("a", "b", "c"))
    finish_again(run, "prepare", statistics={"images_per_label": {"-1": 86, "0": 86, "2": 86}})
    load_classifier(run)
    assert steps == [200]  # of 172 images, in two batches
    assert set(seen) == {0, 2}
