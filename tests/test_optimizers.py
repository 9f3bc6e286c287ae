import keras
import numpy as np
import pytest
from quantizer_checks import array

from vqbeam.configs import PriorConfig, VQVAEConfig, load_preset, override
from vqbeam.prior.training import build_optimizer as build_prior_optimizer
from vqbeam.prior.transformer import CodePrior
from vqbeam.vqvae.building import build_model
from vqbeam.vqvae.fitting.optimizers import ConvolutionMuon, Muon, build_optimizer
from vqbeam.vqvae.layout import CodeLayout


def path_of_weights(optimizer, steps):
    """Takes steps of random gradients; returns the weights after each of them."""
    variable = keras.Variable(np.full((3, 2), 100.0, "float32"))
    numbers, path = np.random.default_rng(0), []
    for _ in range(steps):
        gradient = keras.ops.convert_to_tensor(numbers.normal(size=(3, 2)).astype("float32"))
        optimizer.apply([gradient], [variable])
        path.append(array(variable).astype(float))
    return variable, np.stack(path)


AVERAGED = {"weight_ema": 0.4, "learning_rate": 0.1}


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param(lambda: build_optimizer(VQVAEConfig(**AVERAGED)), marks=pytest.mark.backend),
        lambda: build_optimizer(VQVAEConfig(optimizer="muon", **AVERAGED)),
        lambda: build_prior_optimizer(PriorConfig(**AVERAGED)),
        lambda: build_prior_optimizer(PriorConfig(optimizer="muon", **AVERAGED)),
    ],
    ids=["adam", "convolution-muon", "adamw", "muon"],
)
def test_the_average_of_the_weights_in_numpy(optimizer):
    optimizer = optimizer()
    # The decay of the average reaches 0.4 at the seventh step.
    variable, path = path_of_weights(optimizer, 12)
    average = np.zeros((3, 2))
    for step, weights in enumerate(path):
        kept = min(0.4, step / (step + 9))
        average = kept * average + (1 - kept) * weights
    optimizer.finalize_variable_values([variable])
    np.testing.assert_allclose(array(variable), average, rtol=1e-5)


@pytest.fixture(scope="module")
def model():
    config = override(load_preset("cifar10"), {"vqvae.width": 32, "vqvae.residual_width": 8})
    return build_model(config, data_variance=0.3)


def test_muon_takes_the_kernels_of_convolutions(model):
    muon = build_optimizer(VQVAEConfig(optimizer="muon"))
    muon.build(model.trainable_variables)
    taken = [not muon._should_use_adamw(variable) for variable in model.trainable_variables]
    for variable, is_taken in zip(model.trainable_variables, taken, strict=True):
        shape = variable.shape
        large = len(shape) == 4 and min(np.prod(shape[:-1]), shape[-1]) >= 16
        assert is_taken == large, (variable.path, shape)
    # Those next to the pixels too: 4×4 pixels of three colours are 48 rows.
    first = next(v for v in model.trainable_variables if tuple(v.shape[:3]) == (4, 4, 3))
    assert not muon._should_use_adamw(first)
    assert 0 < sum(taken) < len(taken)


@pytest.mark.parametrize(
    "shape",
    [
        (4, 4, 3, 16),
        (1, 1, 32, 64),
        pytest.param((3, 3, 32, 16), marks=pytest.mark.backend),
        (16, 48),
    ],
)
def test_a_step_of_muon_is_as_long_in_every_direction(shape):
    kind = ConvolutionMuon if len(shape) == 4 else Muon
    muon = kind(learning_rate=0.1, weight_decay=0.0, adam_weight_decay=0.0)
    variable = keras.Variable(np.zeros(shape, "float32"))
    numbers = np.random.default_rng(0)
    gradient = numbers.normal(size=shape).astype("float32") * np.geomspace(1, 30, shape[-1])
    muon.apply([keras.ops.convert_to_tensor(gradient.astype("float32"))], [variable])
    rows = int(np.prod(shape[:-1]))
    left, _, right = np.linalg.svd(gradient.reshape(rows, shape[-1]), full_matrices=False)
    step = left.T @ array(variable).reshape(rows, shape[-1]) @ right.T
    lengths = -np.diag(step)
    # Five iterations of Newton and Schulz bring singular values near 1, whatever they were.
    assert (lengths > 0).all() and lengths.max() / lengths.min() < 2.5
    assert np.abs(step + np.diag(lengths)).max() < 0.02 * lengths.max()
    # The rate of Adam: a root mean square of 0.2 of the learning rate in each weight.
    assert lengths.mean() == pytest.approx(0.1 * 0.2 * np.sqrt(max(rows, shape[-1])), rel=0.25)


def test_what_muon_leaves_is_moved_at_half_the_rate():
    muon = build_optimizer(VQVAEConfig(optimizer="muon", learning_rate=0.1, schedule="constant"))
    adam = build_optimizer(VQVAEConfig(optimizer="adam", learning_rate=0.1, schedule="constant"))
    moved = []
    for optimizer in (muon, adam):
        bias = keras.Variable(np.zeros(5, "float32"))
        optimizer.apply([keras.ops.convert_to_tensor(np.ones(5, "float32"))], [bias])
        moved.append(array(bias))
    np.testing.assert_allclose(moved[0], 0.5 * moved[1], rtol=1e-4)


def prior_and_muon():
    """A small prior, and the Muon of stage 2 with its state for it."""
    layout = CodeLayout(5, ((2, 2),))
    prior = CodePrior(layout, num_labels=3, layers=1, width=8, heads=2)
    settings = PriorConfig(
        optimizer="muon", learning_rate=0.1, weight_decay=0.5, schedule="constant", warmup_steps=0
    )
    muon = build_prior_optimizer(settings)
    muon.build(prior.trainable_variables)
    return prior, muon


def test_muon_takes_the_matrices_of_the_blocks_of_a_prior():
    prior, muon = prior_and_muon()
    (block,) = prior.blocks
    layers = block.qkv, block.attention_output, block.gate_and_up, block.down
    taken = [v.path for v in prior.trainable_variables if not muon._should_use_adamw(v)]
    assert sorted(taken) == sorted(layer.kernel.path for layer in layers)


def test_muon_leaves_the_rest_of_a_prior_to_adamw():
    prior, muon = prior_and_muon()
    (block,), head = prior.blocks, prior.head.kernel
    head.assign(np.ones(head.shape))
    decaying = [head, block.qkv.kernel]
    kept = [prior.code_embedding.embeddings, block.mlp_norm.scale]
    before = [array(variable) for variable in decaying + kept]
    gradients = [keras.ops.zeros(v.shape) for v in prior.trainable_variables]
    muon.apply(gradients, prior.trainable_variables)
    for variable, old in zip(decaying + kept, before, strict=True):
        left = 1 - 0.1 * 0.5 if any(variable is v for v in decaying) else 1.0
        np.testing.assert_allclose(array(variable), left * old, rtol=1e-6)
    prior, muon = prior_and_muon()
    gradients = [keras.ops.ones(v.shape) for v in prior.trainable_variables]
    muon.apply(gradients, prior.trainable_variables)
    # Adam's first step is as long as the rate: here half of 0.1.
    np.testing.assert_allclose(array(prior.head.kernel), -0.05, rtol=1e-4)
