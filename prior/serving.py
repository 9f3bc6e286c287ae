"""The models of a run as TensorFlow functions for a SavedModel."""

import contextlib
import dataclasses
from typing import Any

import tensorflow as tf
from keras.src.backend.tensorflow import core as keras_core

from vqbeam.configs import SamplerSettings
from vqbeam.prior.filters import FILTERS, guidance_scales, sampler_tensors
from vqbeam.prior.sampler import sample_codes
from vqbeam.prior.transformer import CodePrior
from vqbeam.vqvae.model import VQVAE


def serving_signatures(vqvae: VQVAE, prior: CodePrior, settings: SamplerSettings) -> dict[str, Any]:
    """Returns TensorFlow concrete functions by name, for batches of any size.

    - `encode` takes `images`, uint8 [B, H, W, C], and returns `codes`, int32 [B, *layout.shape].
    - `decode` takes such `codes` and returns `images`.
    - `sample` takes `labels`, int32 [B], or attributes [B, A], −1 for none, and `seed`, an int64
      scalar. It samples with `settings` and returns `images` and `codes`.
    - `sample_with_settings` also takes scalars: `first_index`, int64, the index of the first image
      among those of the seed; `temperature`, `top_k` (int32, 0 for all), `top_p` and `min_p`; and,
      if the prior has labels, `guidance`, which follows the schedule in `settings`.

    Image i of a seed is the same as with `Sampler`.

    Args:
        vqvae: The VQ-VAE, on the TensorFlow backend.
        prior: The prior of its codes, on the TensorFlow backend.
        settings: Settings that `sample` uses.
    """
    codes = tf.TensorSpec((None, *vqvae.layout.shape), tf.int32)
    images = tf.TensorSpec((None, *vqvae.architecture["image_shape"]), tf.uint8)
    of_image = (prior.num_labels,) if prior.conditioning == "attributes" else ()
    labels = tf.TensorSpec((None, *of_image), tf.int32)
    chosen = {"labels": labels, "seed": tf.TensorSpec([], tf.int64)}
    free = chosen | {"first_index": tf.TensorSpec([], tf.int64)}
    free |= {name: tf.TensorSpec([], tf.float32) for name in ("temperature", *FILTERS)}
    free |= {"top_k": tf.TensorSpec([], tf.int32)}
    if prior.num_labels:
        free |= {"guidance": tf.TensorSpec([], tf.float32)}
    drawing = _Drawing(vqvae, prior, settings)
    functions = {
        "encode": (lambda images: {"codes": vqvae.encode(images)}, {"images": images}),
        "decode": (lambda codes: {"images": vqvae.decode(codes)}, {"codes": codes}),
        "sample": (drawing.sample, chosen),
        "sample_with_settings": (drawing.sample_with_settings, free),
    }
    with _no_need_of_xla():
        return {
            name: tf.function(function, autograph=False).get_concrete_function(**specs)
            for name, (function, specs) in functions.items()
        }


@dataclasses.dataclass(frozen=True)
class _Drawing:
    vqvae: VQVAE
    prior: CodePrior
    settings: SamplerSettings

    def sample(self, labels, seed):
        layout = self.prior.layout
        settings, kind = sampler_tensors(self.settings, layout.length)
        numbers = graph_uniforms(seed, _range(0, labels), layout.length)
        return self._drawn(labels, numbers, settings, **kind)

    def sample_with_settings(self, labels, seed, first_index, guidance=None, **settings):
        layout = self.prior.layout
        # Per position, the fraction of the way from 1 (no guidance) to the scale.
        shares = (
            guidance_scales(dataclasses.replace(self.settings, guidance=2.0), layout.length) - 1
        )
        settings = {name: tf.cast(value, tf.float32) for name, value in settings.items()}
        if guidance is not None:
            settings |= {"guidance": 1 + (guidance - 1) * shares}
        numbers = graph_uniforms(seed, _range(first_index, labels), layout.length)
        guided = guidance is not None
        return self._drawn(labels, numbers, settings, guided=guided, filtered=True)

    def _drawn(self, labels, numbers, settings, **kind):
        images = {"labels": labels, "uniforms": numbers}
        codes = sample_codes(self.prior, images, settings, **kind)
        codes = tf.reshape(codes, (-1, *self.prior.layout.shape))
        return {"images": self.vqvae.decode(codes), "codes": codes}


def _range(first, labels):
    return first + tf.range(tf.shape(labels, tf.int64)[0])


@contextlib.contextmanager
def _no_need_of_xla():
    """A context in which Keras updates slices without an XLA op, since TensorFlow Serving has none.

    Keras has no option for this, so its function is replaced.
    """
    before = keras_core.slice_update
    keras_core.slice_update = _slice_update
    try:
        yield
    finally:
        keras_core.slice_update = before


def _slice_update(inputs, start_indices, updates):
    """Does `keras.ops.slice_update` for updates with axes of the input's length or of length 1."""
    inside = tf.constant(True)
    for axis, start in enumerate(start_indices):
        if updates.shape[axis] != inputs.shape[axis]:
            assert updates.shape[axis] == 1
            here = tf.range(tf.shape(inputs)[axis]) == start
            inside &= tf.reshape(here, [-1] + [1] * (len(inputs.shape) - axis - 1))
    return tf.where(inside, updates, inputs)


_ROUNDS = 10
_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_KEY_STEPS = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_WORDS = 4  # per block


def graph_uniforms(seed, indices, length: int):
    """Returns the same random numbers as `uniforms`, bit for bit, using only TensorFlow ops.

    Args:
        seed: int64 scalar.
        indices: int64 tensor [N], at least 0.
        length: Random numbers per image.

    Returns:
        A float32 tensor [N, length] in [0, 1).
    """
    blocks = -(-length // _WORDS)
    # The seed modulo 2^128: if it is negative, the upper word of the key is all ones.
    sign = tf.bitwise.right_shift(seed, tf.constant(63, tf.int64))
    key = tf.bitcast(seed, tf.uint64), tf.bitcast(sign, tf.uint64)
    shape = tf.stack([tf.shape(indices)[0], blocks])
    zeros = tf.zeros(shape, tf.uint64)
    # NumPy increments the counter before each block.
    low = zeros + tf.cast(tf.range(1, blocks + 1), tf.uint64)
    high = zeros + tf.cast(indices, tf.uint64)[:, None]
    words = tf.stack(_philox((low, zeros, zeros, high), key), axis=-1)  # [N, blocks, 4]
    bits = tf.reshape(words, tf.stack([shape[0], blocks * _WORDS]))[:, :length]
    return tf.cast(_shifted(bits, 40), tf.float32) * 2**-24


def _philox(counter, key):
    """Returns the Philox4x64-10 block of four words for each counter of four words."""
    a, b, c, d = counter
    for _ in range(_ROUNDS):
        (high, low), (other_high, other_low) = _product(a, 0), _product(c, 1)
        a, b = _xor(other_high, b, key[0]), other_low
        c, d = _xor(high, d, key[1]), low
        key = tuple(word + _word(step) for word, step in zip(key, _KEY_STEPS, strict=True))
    return a, b, c, d


def _product(x, which: int):
    """Returns the upper and lower words of the 128-bit product of x and a multiplier.

    Computed from 32-bit halves, since TensorFlow has no op that returns the upper word.
    """
    multiplier = _MULTIPLIERS[which]
    top, bottom = _word(multiplier >> 32), _word(multiplier % 2**32)
    upper, lower = _shifted(x, 32), _lower_half(x)
    first = lower * bottom
    second = upper * bottom + _shifted(first, 32)
    third = lower * top + _lower_half(second)
    return upper * top + _shifted(second, 32) + _shifted(third, 32), x * _word(multiplier)


def _word(value: int):
    return tf.constant(value, tf.uint64)


def _shifted(x, bits: int):
    return tf.bitwise.right_shift(x, _word(bits))


def _lower_half(x):
    return tf.bitwise.bitwise_and(x, _word(2**32 - 1))


def _xor(*words):
    first, second, third = words
    return tf.bitwise.bitwise_xor(tf.bitwise.bitwise_xor(first, second), third)
