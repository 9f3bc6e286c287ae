"""The random numbers of `prior.uniforms` inside a TensorFlow graph, which NumPy cannot enter."""

import tensorflow as tf

_ROUNDS = 10
_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_KEY_STEPS = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_WORDS = 4  # of a block


def graph_uniforms(seed, indices, length: int):
    """Returns the numbers of `uniforms`, bit for bit, by operations of TensorFlow alone.

    Args:
        seed: int64 scalar.
        indices: int64 tensor [N] from 0 up.
        length: Numbers for an image.

    Returns:
        A float32 tensor [N, length] in [0, 1).
    """
    blocks = -(-length // _WORDS)
    # The seed modulo 2^128: a negative one fills the upper word of the key with ones.
    sign = tf.bitwise.right_shift(seed, tf.constant(63, tf.int64))
    key = tf.bitcast(seed, tf.uint64), tf.bitcast(sign, tf.uint64)
    shape = tf.stack([tf.shape(indices)[0], blocks])
    zeros = tf.zeros(shape, tf.uint64)
    # NumPy counts up before each block.
    low = zeros + tf.cast(tf.range(1, blocks + 1), tf.uint64)
    high = zeros + tf.cast(indices, tf.uint64)[:, None]
    words = tf.stack(_philox((low, zeros, zeros, high), key), axis=-1)  # [N, blocks, 4]
    bits = tf.reshape(words, tf.stack([shape[0], blocks * _WORDS]))[:, :length]
    return tf.cast(_shifted(bits, 40), tf.float32) * 2**-24


def _philox(counter, key):
    """Returns a block of Philox4x64-10, four words, for each counter of four words."""
    a, b, c, d = counter
    for _ in range(_ROUNDS):
        (high, low), (other_high, other_low) = _product(a, 0), _product(c, 1)
        a, b = _xor(other_high, b, key[0]), other_low
        c, d = _xor(high, d, key[1]), low
        key = tuple(word + _word(step) for word, step in zip(key, _KEY_STEPS, strict=True))
    return a, b, c, d


def _product(x, which: int):
    """Returns the upper and lower words of the 128 bits of x times a multiplier.

    By halves of 32 bits, for there is no operation that keeps the upper word.
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
