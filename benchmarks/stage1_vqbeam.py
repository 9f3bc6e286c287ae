"""The vqbeam side of `stage1.py`.

    python benchmarks/stage1_vqbeam.py training
    python benchmarks/stage1_vqbeam.py quantizer N K D

Prints a JSON object for each measurement.
"""

import os
import pathlib
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["KERAS_BACKEND"] = "tensorflow"
sys.path.append(str(pathlib.Path(__file__).parents[1]))

import keras
import measuring
import stage1_work as work
import tensorflow as tf
from fit_times import fit_seconds

from vqbeam.configs import load_preset, override
from vqbeam.vqvae.building import build_model
from vqbeam.vqvae.model import scale_images
from vqbeam.vqvae.quantizers.vector import VectorQuantizer

POLICIES = {"float32": "float32", "bfloat16": "mixed_bfloat16"}


def build(dtype):
    """Returns the VQ-VAE of van den Oord et al. 2017, section 4.1, on CIFAR-10."""
    settings = {
        "quantizer": "vector",
        "num_codes": work.NUM_CODES,
        "code_dim": work.CODE_DIM,
        "downsampling": 4,
        "width": work.WIDTH,
        "residual_layers": work.RESIDUAL_LAYERS,
        "residual_width": work.RESIDUAL_WIDTH,
        "estimator": "straight_through",
        "commitment": work.COMMITMENT,
        "ema_decay": work.DECAY,
        "restart_below": 0.0,  # off, like balance, as on the other side
        "balance": 0.0,
        "dtype": POLICIES[dtype],
    }
    config = override(load_preset("cifar10"), {f"vqvae.{k}": v for k, v in settings.items()})
    return build_model(config, data_variance=1.0)


def time_training(dtype):
    """Reports the seconds per step of `fit`."""
    model = build(dtype)
    model.compile(keras.optimizers.Adam(work.LEARNING_RATE))
    taken = fit_seconds(
        model,
        {"image": work.training_images()},
        lambda batch: scale_images(batch["image"]),
        batch_size=work.BATCH_SIZE,
        steps=work.BLOCK_STEPS,
        epochs=1 + work.BLOCKS,
    )
    measuring.report(f"training, {dtype}", dtype, seconds=taken)


def multiply_adds(model):
    """Counts the multiply-adds of the convolutions in the forward pass of one image."""
    image = tf.TensorSpec((1, *model.encoder.input_shape[1:]))
    graph = tf.function(model).get_concrete_function(image).graph
    # Which input is the smaller feature map; None if it is the output.
    places = {"Conv2D": None, "Conv2DBackpropInput": 2}
    count = 0
    for op in graph.get_operations():
        if op.type in places:
            place = places[op.type]
            positions = op.outputs[0] if place is None else op.inputs[place]
            kernel = op.inputs[1].shape.num_elements()
            count += kernel * positions.shape[1] * positions.shape[2]
    return count


def training():
    """Reports the training time, the size of the network, and the speed of a matrix product."""
    for dtype in POLICIES:
        time_training(dtype)
    multiply = tf.function(tf.matmul)
    for dtype in POLICIES:
        a, b = (tf.cast(tf.random.normal(shape), dtype) for shape in work.matmul_shapes())
        measuring.report(
            f"matmul, {dtype}",
            shape=work.MATMUL,
            seconds=measuring.seconds(lambda a=a, b=b: multiply(a, b)),
        )
    model = build("float32")
    parameters = sum(weight.numpy().size for weight in model.trainable_variables)
    measuring.report("network", parameters=parameters, multiply_adds=multiply_adds(model))


def build_quantizer(num_codes, dim):
    """Returns a quantizer with moving averages and without restarts of dead codes."""
    layer = VectorQuantizer(num_codes, dim, decay=work.DECAY, commitment=work.COMMITMENT)
    layer.build((None, None, dim))
    return layer


def quantizer(size, num_codes, dim):
    """Reports the time and memory of the forward pass, in evaluation and in training mode."""
    vectors, codebook = work.quantizer_operands(size, num_codes, dim)
    vectors = tf.constant(vectors)
    layer = build_quantizer(num_codes, dim)
    tf.function(build_quantizer(8, dim))(vectors[:, :8])  # triggers one-time initialization
    before = measuring.resident_bytes()
    for training in (False, True):
        layer.codebook.assign(codebook)
        run = tf.function(lambda z, training=training: layer(z, training=training))

        def forward(run=run):
            return run(vectors)

        error = float(tf.reduce_mean(tf.square(forward().quantized - vectors)))
        measuring.report(
            "training" if training else "evaluation",
            "float32",
            seconds=measuring.seconds(forward),
            bytes=measuring.peak_bytes(forward, before),
            error=error,
        )


if __name__ == "__main__":
    if sys.argv[1] == "training":
        training()
    else:
        quantizer(*map(int, sys.argv[2:5]))
