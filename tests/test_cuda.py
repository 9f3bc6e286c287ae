"""Lowers the GPU programs for CUDA, which needs no GPU."""

import functools

import keras
import numpy as np
import pytest

from vqbeam.configs import load_preset, override, smoke
from vqbeam.prior.filters import sampler_tensors
from vqbeam.prior.sampler import in_precision, sample_codes
from vqbeam.prior.training import build_optimizer as build_prior_optimizer
from vqbeam.prior.training import build_prior
from vqbeam.vqvae.augmentation import augment
from vqbeam.vqvae.building import build_model
from vqbeam.vqvae.fitting.data import TrainingData
from vqbeam.vqvae.fitting.optimizers import build_optimizer
from vqbeam.vqvae.fitting.program import jax_steps
from vqbeam.vqvae.model import scale_images
from vqbeam.vqvae.storage.labels import Labels

pytestmark = [
    pytest.mark.backend,
    pytest.mark.slow,
    pytest.mark.skipif(keras.backend.backend() != "jax", reason="JAX lowers for other devices"),
]

STEPS = 3
PRESETS = ["cifar10_gpu", "imagenet64"]
LABELS = Labels(tuple("abc"))


@pytest.fixture(params=PRESETS)
def config(request):
    """A preset with small networks, but its own precision and kinds of layers."""
    preset = load_preset(request.param)
    own = {"prior.kv_heads": preset.prior.kv_heads and 1}
    return override(smoke(preset), own)


def lowered(function, *arguments):
    """Returns the StableHLO of a function for CUDA."""
    import jax

    exported = jax.export.export(jax.jit(function), platforms=["cuda"])(*arguments)
    assert exported.platforms == ("cuda",)
    return exported.mlir_module()


def state_of(model):
    model.optimizer.build(model.trainable_variables)
    groups = (
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
        model.metrics_variables,
    )
    return tuple([variable.value for variable in group] for group in groups)


def with_weights(model, function):
    """Returns a pure function of the values of a model's variables and of tensors."""

    def pure(values, *tensors):
        with keras.StatelessScope(state_mapping=zip(model.variables, values, strict=True)):
            return function(*tensors)

    return pure, [variable.value for variable in model.variables]


def test_training_of_stage_1(config):
    model = build_model(config, data_variance=1.0)
    model.compile(build_optimizer(config.vqvae))
    images = np.zeros((20, *config.image_shape), np.uint8)
    count = STEPS * config.vqvae.batch_size
    batches = {
        "rows": np.zeros(count, np.int32),
        "shifts": np.zeros((count, 2), np.int32),
        "mirrored": np.zeros(count, bool),
    }
    data = TrainingData(
        batches=None,
        held={"image": images},
        prepare=lambda batch: scale_images(
            augment(batch["image"], batch["shifts"], batch["mirrored"])
        ),
    )
    text = lowered(jax_steps(model, data, STEPS, STEPS), state_of(model), data.held, batches)
    assert "stablehlo.while" in text and "stablehlo.convolution" in text


def test_training_of_stage_2(config):
    model = build_prior(config, LABELS)
    model.compile(build_prior_optimizer(config.prior))
    held = {
        "codes": np.zeros((20, *model.layout.shape), np.int32),
        "labels": np.zeros(20, np.int32),
    }
    data = TrainingData(batches=None, held=held)
    batches = {"rows": np.zeros(STEPS * config.prior.batch_size, np.int32)}
    text = lowered(jax_steps(model, data, STEPS, STEPS), state_of(model), held, batches)
    assert "stablehlo.while" in text


def test_encoding_and_sampling_with_decoding(config):
    precision = {"cifar10_gpu": "exact", "imagenet64": "fast"}[config.name]
    vqvae = build_model(config, data_variance=1.0)
    images = np.zeros((4, *config.image_shape), np.uint8)
    encode, weights = with_weights(vqvae, vqvae.encode)
    assert "stablehlo.convolution" in lowered(encode, weights, images)

    prior = in_precision(build_prior(config, LABELS).with_dtype("float32"), precision)
    tensors, kind = sampler_tensors(config.sample.sampler, prior.layout.length)
    batch = {
        "labels": np.zeros(4, np.int32),
        "uniforms": np.zeros((4, prior.layout.length), np.float32),
    }
    sample, values = with_weights(prior, functools.partial(sample_codes, prior, **kind))
    decode, weights = with_weights(vqvae, vqvae.decode)

    def draw(values, weights, batch, tensors):
        codes = sample(values, batch, tensors)
        return decode(weights, codes.reshape(-1, *prior.layout.shape))

    text = lowered(draw, values, weights, batch, tensors)
    assert "stablehlo.while" in text
