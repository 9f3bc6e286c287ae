import collections

import keras
import numpy as np
import pytest
import tensorflow as tf
from quantizer_checks import array, gradient
from tensorflow.python.eager import context

from vqbeam.vqvae.building import build_model
from vqbeam.vqvae.finetuning.decoder import DecoderTraining, build_trainer, finetune_decoder
from vqbeam.vqvae.finetuning.features import (
    build_classification,
    build_features,
    feature_distance,
    turned,
)
from vqbeam.vqvae.training import training_images

SHAPE = (8, 8, 1)
LOSSES = ["reconstruction", "perceptual", "discriminator", "adversarial"]


def images(count, seed=0, shape=SHAPE):
    return np.random.default_rng(seed).uniform(-1, 1, (count, *shape)).astype("float32")


@pytest.fixture(scope="module")
def features():
    keras.utils.set_random_seed(0)
    return build_features(SHAPE, 3, "float32")


@pytest.fixture
def trainer(tiny_config, features):
    model = build_model(tiny_config(), data_variance=0.25)
    return DecoderTraining(model, features, perceptual=0.5, adversarial=0.1)


def test_feature_maps(features):
    shapes = [tuple(output.shape) for output in features(images(2))]
    assert shapes == [(2, 8, 8, 16), (2, 4, 4, 32), (2, 2, 2, 64), (2, 3)]
    uneven = build_features((7, 5, 3), 2, "mixed_bfloat16")(images(2, shape=(7, 5, 3)))
    assert [output.shape[1] for output in uneven] == [7, 4, 2, 2]
    assert {keras.backend.standardize_dtype(output.dtype) for output in uneven} == {"float32"}


@pytest.mark.backend
def test_distance_in_numpy(features):
    one, other = images(3), images(3, seed=1)
    (*maps, logits), (*others, other_logits) = features(one), features(other)
    expected = 0.1 * np.square(array(logits) - array(other_logits)).mean()
    for weight, a, b in zip((0.5, 0.5, 3), maps, others, strict=True):
        a, b = (array(x) / np.linalg.norm(array(x), axis=-1, keepdims=True) for x in (a, b))
        expected += weight * np.square(a - b).sum(-1).mean()
    found = array(feature_distance(features, one, other))
    np.testing.assert_allclose(found, expected, rtol=1e-3)
    assert array(feature_distance(features, one, one)) == 0


def test_distance_reaches_the_reconstruction_alone(features):
    one, other = images(2), images(2, seed=1)
    assert gradient(lambda x: feature_distance(features, one, x), other).any()
    assert not gradient(lambda x: feature_distance(features, x, other), one).any()


@pytest.mark.parametrize("shape", [pytest.param((6, 6, 2), marks=pytest.mark.backend), (4, 6, 1)])
def test_turned_images(shape):
    batch = images(8, shape=shape)
    found = array(turned(batch, np.arange(8, dtype="int32") % 4))
    for index, image in enumerate(batch):
        ways = (image, image[:, ::-1], image[::-1, ::-1], image[::-1])
        expected = np.rot90(image, index % 4) if shape[0] == shape[1] else ways[index % 4]
        np.testing.assert_allclose(found[index], expected, atol=1e-6)


def moved_by(trainer, name):
    """The parts that a step of one loss moves."""
    parts = {
        "encoder": trainer.vqvae.encoder,
        "quantizer": trainer.vqvae.quantizer,
        "decoder": trainer.vqvae.decoder,
        "features": trainer.features,
        "discriminator": trainer.discriminator,
    }
    before = {part: [array(w) for w in layer.weights] for part, layer in parts.items()}
    trainer.compute_loss = lambda x, y, y_pred, *_, **__: y_pred[name]
    trainer.compile(keras.optimizers.SGD(0.1))
    trainer.train_on_batch(images(4))
    return {
        part
        for part, layer in parts.items()
        if any((array(w) != old).any() for w, old in zip(layer.weights, before[part], strict=True))
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [*LOSSES[:-1], pytest.param("adversarial", marks=pytest.mark.backend)]
)
def test_each_loss_moves_one_part(trainer, name):
    assert moved_by(trainer, name) == {"discriminator" if name == "discriminator" else "decoder"}


def unordered_accesses(graph):
    """The reads of variables in a graph, each with a write that it may come before or after."""
    nodes, users = {node.name: node for node in graph.node}, collections.defaultdict(list)
    for node in graph.node:
        for source in node.input:
            users[source.lstrip("^").partition(":")[0]].append(node.name)

    def after(name):
        found, left = set(), [name]
        while left:
            new = set(users[left.pop()]) - found
            found |= new
            left.extend(new)
        return found

    for read in (node for node in graph.node if node.op == "ReadVariableOp"):
        for name in users[read.input[0]]:
            if nodes[name].op.startswith("Assign"):
                if name not in after(read.name) and read.name not in after(name):
                    yield read.name, name


@pytest.mark.slow
def test_weights_are_read_before_their_update(trainer, compiled):
    """With several threads, a step would otherwise use some new weights and some old ones."""
    trainer.compile(keras.optimizers.Adam())
    trainer.optimizer.build(trainer.trainable_variables)
    step = tf.function(lambda batch: trainer.train_step((batch,)), autograph=False)
    here = context.context()
    here.enable_graph_collection()
    step(tf.constant(images(4)))
    graphs = [found.post_optimization_graph for found in here.export_run_metadata().function_graphs]
    here.disable_graph_collection()
    largest = max(graphs, key=lambda graph: len(graph.node))
    assert {"ReadVariableOp", "AssignSubVariableOp"} <= {node.op for node in largest.node}
    assert list(unordered_accesses(largest)) == []


@pytest.mark.backend
def test_losses_have_their_weights(trainer):
    batch = images(4)
    losses = {name: array(value) for name, value in trainer(batch).items()}
    assert list(losses) == LOSSES
    copies = trainer.vqvae(batch)["reconstruction"]
    error = np.square(batch - array(copies)).mean()
    np.testing.assert_allclose(losses["reconstruction"], error / 0.25, rtol=1e-5)
    distance = array(feature_distance(trainer.features, batch, copies))
    np.testing.assert_allclose(losses["perceptual"], 0.5 * distance, rtol=1e-4)
    raw = trainer.discriminator.losses_of(batch, copies)
    np.testing.assert_allclose(losses["discriminator"], array(raw["discriminator"]), rtol=1e-5)
    np.testing.assert_allclose(losses["adversarial"], 0.1 * array(raw["adversarial"]), rtol=1e-4)
    total = trainer.compute_loss(x=batch, y_pred=trainer(batch))
    np.testing.assert_allclose(array(total), sum(losses.values()), rtol=1e-5)


def test_without_a_loss_there_is_no_network(tiny_config, features):
    model = build_model(tiny_config(), data_variance=0.25)
    assert list(DecoderTraining(model, None, perceptual=0, adversarial=1)(images(2))) == [
        "reconstruction",
        "discriminator",
        "adversarial",
    ]
    plain = DecoderTraining(model, features, perceptual=1, adversarial=0)
    assert list(plain(images(2))) == ["reconstruction", "perceptual"]


@pytest.mark.backend
@pytest.mark.slow
def test_codes_stay_and_pictures_change(prepared_run, tiny_config):
    settings = {"finetune_steps": 2, "perceptual": 1.0, "adversarial": 0.1, "steps_per_epoch": 2}
    config = tiny_config(**{f"vqvae__{name}": value for name, value in settings.items()})
    # Without classes; test_training.py finetunes a run that has some.
    run, pixels = prepared_run(config, labels=())
    model = build_model(config, data_variance=0.25)
    trainable = [weight.path for weight in model.trainable_variables]
    codes = array(model.encode(pixels["validation"]))
    before = array(model.decode(codes))
    fitted = finetune_decoder(run, model, training_images(run))
    assert {"perceptual", "discriminator"} <= set(fitted.history[-1])
    np.testing.assert_array_equal(array(model.encode(pixels["validation"])), codes)
    assert (array(model.decode(codes)) != before).any()
    assert [weight.path for weight in model.trainable_variables] == trainable


@pytest.mark.backend
def test_float16_scales_the_loss(tiny_config):
    dtype = "mixed_float16"
    features = build_features(SHAPE, 3, dtype)
    config = tiny_config(vqvae__dtype=dtype, vqvae__finetune_steps=20, vqvae__perceptual=0.5)
    model = build_model(config, data_variance=0.25)
    trainers = (
        build_trainer(model, features, config.vqvae),
        build_classification(features, 9, dtype),
    )
    for trainer in trainers:
        assert isinstance(trainer.optimizer, keras.optimizers.LossScaleOptimizer)
    before = [array(weight).copy() for weight in model.decoder.weights]
    for _ in range(9):  # the first steps find the scale
        logs = trainers[0].train_on_batch(images(4), return_dict=True)
    assert np.isfinite(list(logs.values())).all()
    moved = [np.abs(array(w) - b).max() for w, b in zip(model.decoder.weights, before, strict=True)]
    assert min(moved) > 0
    exact = build_classification(build_features(SHAPE, 3, "float32"), 9, "float32")
    assert not isinstance(exact.optimizer, keras.optimizers.LossScaleOptimizer)
