"""Compares a PixelCNN prior, as in Keras's VQ-VAE example, with the transformer of a run.

    python benchmarks/pixelcnn.py RUN --num 2000

RUN is a finished run with classes and one grid of codes. The PixelCNN is trained on the codes of
the run for as long as the prior of the run was, according to the manifest. Both are evaluated with
as many held-out images as are sampled. The PixelCNN is unconditional; the transformer is evaluated
both unconditionally and with the settings of the run. Do not run other programs at the same time,
because the comparison relies on equal training time.
"""

import argparse
import os
import pathlib
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["KERAS_BACKEND"] = "tensorflow"
sys.path.append(str(pathlib.Path(__file__).parents[1]))

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops
from side_by_side import table

from vqbeam.configs import SampleConfig
from vqbeam.pipelines.evaluation.reference import ReferenceSet
from vqbeam.pipelines.sampling.api import Run
from vqbeam.prior.sampler import Sampler
from vqbeam.prior.training import load_prior
from vqbeam.vqvae.fitting.devices import compiled_decoder
from vqbeam.vqvae.storage.records import open_dataset, read_split, training_batches
from vqbeam.vqvae.storage.run_folder import RunFolder
from vqbeam.vqvae.training import load_vqvae

FILTERS, RESIDUAL_BLOCKS, LAST_LAYERS = 128, 2, 2  # as in the example
BATCH_SIZE, LEARNING_RATE = 128, 3e-4  # as in the example
DRAWN_AT_ONCE = 64
HEADER = ["prior", "parameters", "nats per code", "Fréchet", "precision", "recall", "images/s"]


class MaskedConvolution(layers.Conv2D):
    """A convolution over the codes above and to the left and, with `here`, at its own position.

    From "Conditional Image Generation with PixelCNN Decoders", van den Oord et al. 2016
    (https://arxiv.org/abs/1606.05328), figure 1.
    """

    def __init__(self, filters, size, *, here):
        super().__init__(filters, size, padding="same", activation="relu")
        middle = size // 2
        self.mask = np.zeros((size, size, 1, 1), "float32")
        self.mask[:middle] = 1
        self.mask[middle, : middle + here] = 1

    def call(self, inputs):
        """Maps [B, h, w, C] to [B, h, w, filters]."""
        convolved = ops.conv(inputs, self.kernel * self.mask, padding="same")
        return self.activation(convolved + self.bias)


def build(grid: tuple[int, int], num_codes: int) -> keras.Model:
    """Returns the network of the example, from codes [B, h, w] to logits [B, h, w, K]."""
    codes = keras.Input(grid, dtype="int32")
    x = MaskedConvolution(FILTERS, 7, here=False)(ops.one_hot(codes, num_codes))
    for _ in range(RESIDUAL_BLOCKS):
        h = layers.Conv2D(FILTERS, 1, activation="relu")(x)
        h = MaskedConvolution(FILTERS // 2, 3, here=True)(h)
        x = x + layers.Conv2D(FILTERS, 1, activation="relu")(h)
    for _ in range(LAST_LAYERS):
        x = MaskedConvolution(FILTERS, 1, here=True)(x)
    return keras.Model(codes, layers.Conv2D(num_codes, 1)(x))


class StopAfter(keras.callbacks.Callback):
    """Stops training after a number of seconds."""

    def __init__(self, seconds: float):
        super().__init__()
        self.end = time.monotonic() + seconds

    def on_train_batch_end(self, batch, logs=None):
        """Checks the time."""
        self.model.stop_training = time.monotonic() > self.end


def train(run: RunFolder, model: keras.Model, seconds: float) -> float:
    """Trains a PixelCNN on the codes of a run; returns the nats per code on held-out codes."""
    model.compile(
        keras.optimizers.Adam(LEARNING_RATE),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    builder = open_dataset(run.folder("encode"))

    def pair(example):
        codes = tf.cast(example["codes"], tf.int32)
        return codes, codes

    batches = training_batches(
        read_split(builder, "train").map(pair),
        size=builder.info.splits["train"].num_examples,
        batch_size=BATCH_SIZE,
        first_step=0,
        seed=0,
    )
    model.fit(batches.prefetch(4), shuffle=False, verbose=0, callbacks=[StopAfter(seconds)])
    return model.evaluate(read_split(builder, "validation").map(pair).batch(BATCH_SIZE), verbose=0)


def pixelcnn_draws(model: keras.Model):
    """Returns a function that samples a number of grids, with one full forward pass per code."""
    rows, columns = model.input_shape[1:]

    @tf.function
    def next_code(codes, row, column):
        logits = model(codes)[:, row, column]
        return tf.random.categorical(logits, 1, dtype=tf.int32)[:, 0]

    def draw(count):
        codes = np.zeros((count, rows, columns), "int32")
        for row, column in np.ndindex(rows, columns):
            place = tf.constant(row), tf.constant(column)
            codes[:, row, column] = next_code(tf.constant(codes), *place)
        return codes

    return draw


def transformer_draws(run: RunFolder, settings: SampleConfig, labels: np.ndarray):
    """Returns a function that samples a number of grids from the prior, cycling through labels."""
    prior = load_prior(run)
    sampler, drawn = Sampler(prior, DRAWN_AT_ONCE), [0]

    def draw(count):
        indices = np.arange(drawn[0], drawn[0] + count)
        drawn[0] += count
        return sampler(labels[indices % len(labels)], 0, settings, indices=indices)

    return draw


def measure(reference: ReferenceSet, vqvae, draw, labels: np.ndarray) -> list[str]:
    """Returns the metrics of one table row, for images whose codes `draw` samples."""
    decode = compiled_decoder(vqvae)
    draw(DRAWN_AT_ONCE)  # compiles
    seconds = []

    def images():
        for first in range(0, len(labels), DRAWN_AT_ONCE):
            chosen = labels[first : first + DRAWN_AT_ONCE]
            start = time.perf_counter()
            codes = draw(DRAWN_AT_ONCE)[: len(chosen)]
            seconds.append(time.perf_counter() - start)
            yield keras.ops.convert_to_numpy(decode(codes)), chosen

    found = reference.measure(images())
    figures = [f"{found[name]:.3f}" for name in ("frechet", "precision", "recall")]
    return [*figures, f"{DRAWN_AT_ONCE / np.median(seconds):,.1f}"]


def main() -> None:
    """Trains the PixelCNN, evaluates both models and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("run", help="folder of a finished run")
    parser.add_argument("--num", type=int, default=2000, help="images drawn (default 2000)")
    parser.add_argument("--seconds", type=float, help="training time (default: the prior's)")
    arguments = parser.parse_args()
    run = RunFolder(arguments.run)
    manifest = run.require("train-prior")
    vqvae, reference = load_vqvae(run), ReferenceSet(run, arguments.num, "classifier", seed=0)
    labels = np.concatenate([labels for _, labels in reference.real("train")])
    keras.utils.set_random_seed(1)
    model = build(vqvae.layout.shape, vqvae.layout.num_codes)
    seconds = arguments.seconds or manifest["seconds"]
    nats = train(run, model, seconds)
    size, nats = f"{model.count_params():,}", f"{nats:.3f}"
    row = measure(reference, vqvae, pixelcnn_draws(model), labels)
    rows = [[f"PixelCNN, trained for {seconds:,.0f} s", size, nats, *row]]
    size, nats = f"{manifest['parameters']:,}", f"{manifest['measures']['nats_per_code']:.3f}"
    settings = Run(run.root).default_settings()
    cases = (
        ("transformer, without a class", SampleConfig(), np.full_like(labels, -1), "–"),
        ("transformer, at the run's settings", settings, labels, nats),
    )
    for title, chosen, asked, known_nats in cases:
        row = measure(reference, vqvae, transformer_draws(run, chosen, asked), asked)
        rows.append([title, size, known_nats, *row])
    print(f"{reference.num:,} images each, classifier features, seed 0\n\n{table(HEADER, rows)}")


if __name__ == "__main__":
    main()
