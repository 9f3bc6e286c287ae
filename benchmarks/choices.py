"""Times the design choices that code comments refer to, each against its alternative.

    python benchmarks/choices.py [--smoke]

The two alternatives take turns in one process; the ratio compares their medians. Do not run other
programs at the same time.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from vqbeam.configs import SamplerSettings
from vqbeam.pipelines.sources.images import encode_png
from vqbeam.prior.filters import sample_code, sampler_tensors
from vqbeam.prior.transformer import CodePrior
from vqbeam.vqvae.layout import CodeLayout

ROUNDS = 1 if "--smoke" in sys.argv else 15


def compare(title: str, chosen: Callable, other: Callable, repeats: int = 1) -> None:
    """Prints the median times of two functions, which take turns after one warm-up call each."""
    seconds: dict[Callable, list[float]] = {chosen: [], other: []}
    for function in seconds:
        function()
    for _ in range(ROUNDS):
        for function, times in seconds.items():
            start = time.perf_counter()
            for _ in range(repeats):
                function()
            times.append((time.perf_counter() - start) / repeats)
    ours, theirs = (statistics.median(times) * 1e3 for times in seconds.values())
    print(f"{title:<64} {ours:8.3f} ms  {theirs:8.3f} ms  ×{theirs / ours:.2f}", flush=True)


def attention() -> None:
    """Explicit matrix products against Keras's attention, forward and backward."""
    query = tf.random.normal((64, 8, 64, 32))  # [B, H, T, D]
    mask = np.tri(64, dtype=bool)

    def explicit(query):
        scores = ops.matmul(query * 32**-0.5, ops.swapaxes(query, -1, -2))
        weights = ops.softmax(ops.where(mask, scores, -1e9))
        return ops.matmul(weights, query)

    def keras_attention(query):
        heads_last = ops.transpose(query, (0, 2, 1, 3))
        return ops.dot_product_attention(heads_last, heads_last, heads_last, is_causal=True)

    def with_gradient(function):
        @tf.function
        def step():
            with tf.GradientTape() as tape:
                tape.watch(query)
                loss = tf.reduce_sum(tf.square(function(query)))
            return tape.gradient(loss, query)

        return step

    compare(
        "attention, T = 64, float32: matmul, not dot_product_attention",
        with_gradient(explicit),
        with_gradient(keras_attention),
    )


def filters() -> None:
    """Bisection against sorting, for top-k and top-p."""
    logits, uniform = tf.random.normal((64, 512)), tf.random.uniform((64, 1))
    values, _ = sampler_tensors(SamplerSettings(top_k=50, top_p=0.9), length=1)
    settings = {name: tf.constant(value) for name, value in values.items()}

    @tf.function(jit_compile=True)
    def halving():
        return sample_code(logits, uniform, settings, filtered=True)

    @tf.function(jit_compile=True)
    def sorting():
        order = ops.flip(ops.argsort(logits, axis=-1), axis=-1)
        ordered = ops.softmax(ops.take_along_axis(logits, order, axis=-1))
        kept = ops.where(ops.arange(512) < 50, ordered, 0.0)
        kept = ops.where(ops.cumsum(kept, axis=-1) - kept < 0.9, kept, 0.0)
        place = ops.argmax(ops.cumsum(kept, axis=-1) > uniform * ops.sum(kept, -1, keepdims=True))
        return ops.take_along_axis(order, ops.reshape(place, (-1, 1)) % 512, axis=-1)

    compare("top-k and top-p, K = 512, B = 64: halving, not sorting", halving, sorting, 20)


def precision() -> None:
    """Training the prior of `fashion_mnist` in float32 against mixed bfloat16."""
    codes = np.random.default_rng(0).integers(0, 256, (64, 7, 7), np.int32)
    batch = {"codes": codes, "labels": np.zeros(64, "int32")}

    def step(dtype):
        layout = CodeLayout(256, ((7, 7),))
        model = CodePrior(layout, 10, layers=4, width=192, heads=6, dtype=dtype)
        model.compile(keras.optimizers.AdamW(1e-3))
        return lambda: model.train_on_batch(batch)

    compare(
        "prior, a training step, 4 × 192: float32, not bfloat16",
        step("float32"),
        step("mixed_bfloat16"),
    )


def png() -> None:
    """The lowest PNG compression level against the default."""
    import io

    from PIL import Image

    image = (
        np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8).repeat(4, 0).repeat(4, 1)
    )

    def usual():
        Image.fromarray(image).save(io.BytesIO(), "PNG")

    compare("PNG, 64×64: level 1, not 6", lambda: encode_png(image), usual, 50)


def decoding() -> None:
    """Images passed to a thread each against decoded one after the other."""
    from vqbeam.pipelines.sources.images import decode_image
    from vqbeam.pipelines.sources.source import in_order

    def converted(data):
        return encode_png(decode_image(data, height=side, width=side, channels=3, fit="crop"))

    for large, side in ((32, 32), (64, 64), (128, 128), (256, 256), (1024, 256)):
        files = [encode_png(photo_like(large))] * 64
        compare(
            f"64 PNG of {large}² and {len(files[0]):,} bytes to {side}²: threads, not one",
            lambda files=files: list(in_order(converted, files, os.cpu_count())),
            lambda files=files: [converted(file) for file in files],
        )


def photo_like(side: int) -> np.ndarray:
    """Returns 1/f noise, uint8 [side, side, 3], which compresses about as photographs do."""
    frequencies = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side)))
    noise = np.fft.fft2(np.random.default_rng(0).normal(size=(3, side, side)))
    image = np.fft.ifft2(noise / np.maximum(frequencies, 1 / side)).real
    scaled = (image - image.min()) / (image.max() - image.min()) * 255
    return scaled.astype(np.uint8).transpose(1, 2, 0).copy()


if __name__ == "__main__":
    print(f"{'':<64} {'chosen':>11}  {'other':>11}")
    for choice in (attention, filters, precision, png, decoding):
        choice()
