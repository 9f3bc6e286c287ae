"""The vqbeam side of `stage2.py`.

    python benchmarks/stage2_vqbeam.py sampling T BATCH
    python benchmarks/stage2_vqbeam.py training T

Prints a JSON object for each measurement.
"""

import math
import os
import pathlib
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["KERAS_BACKEND"] = "tensorflow"
sys.path.append(str(pathlib.Path(__file__).parents[1]))

import keras
import measuring
import numpy as np
import stage2_work as work
import tensorflow as tf
from fit_times import fit_seconds

from vqbeam.prior.sampler import Sampler
from vqbeam.prior.transformer import CodePrior
from vqbeam.vqvae.layout import CodeLayout

POLICIES = {"float32": "float32", "bfloat16": "mixed_bfloat16"}


def build(length, dtype):
    """Returns an untrained prior over square grids."""
    side = math.isqrt(length)
    return CodePrior(
        CodeLayout(work.GRIDS[length], ((side, side),)),
        work.LABELS,
        layers=work.LAYERS,
        width=work.WIDTH,
        heads=work.HEADS,
        dtype=POLICIES[dtype],
    )


def sampling(length, batch_size):
    """Reports the time to sample a batch of grids, in float32 like `vqbeam sample`."""
    sampler = Sampler(build(length, "float32"), batch_size)
    labels = np.arange(batch_size) % work.LABELS
    sampler(labels, seed=0)
    seconds = measuring.seconds(lambda: sampler(labels, seed=0))
    measuring.report("sampling", "float32", seconds=seconds)
    limit()


def training(length):
    """Reports the seconds per step of `fit`."""
    for dtype in work.DTYPES:
        model = build(length, dtype)
        model.compile(keras.optimizers.AdamW(work.LEARNING_RATE, work.WEIGHT_DECAY))
        codes = work.codes(length).reshape(-1, *model.layout.shape)
        taken = fit_seconds(
            model,
            {"codes": codes, "labels": np.arange(len(codes), dtype="int32") % work.LABELS},
            lambda batch: batch,
            batch_size=work.TRAINING_TOKENS // length,
            steps=work.BLOCK_STEPS,
            epochs=1 + work.BLOCKS,
        )
        measuring.report("training", dtype, seconds=taken)
    limit()


def limit():
    """Reports the time of a large matrix product, which defines the limit."""
    multiply, (rows, inner, columns) = tf.function(tf.matmul), work.MATMUL
    for dtype in work.DTYPES:
        a, b = (tf.cast(tf.random.normal(s), dtype) for s in ((rows, inner), (inner, columns)))
        seconds = measuring.seconds(lambda a=a, b=b: multiply(a, b))
        measuring.report(f"matmul, {dtype}", dtype, seconds=seconds)


if __name__ == "__main__":
    if sys.argv[1] == "training":
        training(int(sys.argv[2]))
    else:
        sampling(int(sys.argv[2]), int(sys.argv[3]))
