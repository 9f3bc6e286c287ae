"""Times the overhead of the host in a training step, with models whose own steps are very short.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --backend tensorflow

Compares vqbeam's training, with 1 and with 100 steps per call of its program, with programs that
run only the steps: a compiled step that Python calls in a loop, and a loop inside one compiled
program. All train the same model on the same data, which is kept on the device. Do not run other
programs at the same time. The script prints a table.
"""

import argparse
import os
import pathlib
import statistics
import sys
import time

sys.path.append(str(pathlib.Path(__file__).parents[1]))

TOGETHER = 100
BATCH_SIZE, EXAMPLES = 8, 1000
HEADER = ["ms a step", "fit, 1 step a call", f"fit, {TOGETHER} steps a call", "a step in a loop"]
HEADER += [f"a loop of {TOGETHER} compiled", "fit to the latter"]


def tiny_prior():
    """Returns an untrained prior, its data, and a function from a batch to the input."""
    import numpy as np

    from vqbeam.prior.transformer import CodePrior
    from vqbeam.vqvae.layout import CodeLayout

    keras.utils.set_random_seed(0)
    model = CodePrior(CodeLayout(16, ((4, 4),)), num_labels=2, layers=1, width=16, heads=2)
    codes = np.random.default_rng(0).integers(0, 16, (EXAMPLES, 4, 4), dtype="uint16")
    return (
        model,
        {"codes": codes, "labels": (codes[:, 0, 0] % 2).astype("int32")},
        lambda batch: batch,
    )


def tiny_vqvae():
    """Returns an untrained VQ-VAE, its data, and a function from a batch to the input."""
    import numpy as np

    from vqbeam.configs import Config, DataConfig, VQVAEConfig
    from vqbeam.vqvae.building import build_model
    from vqbeam.vqvae.model import scale_images

    small = dict(num_codes=16, code_dim=4, width=4, residual_layers=0, residual_width=4)
    data = DataConfig(source="glyphs", height=8, width=8, channels=1)
    model = build_model(Config(name="tiny", data=data, vqvae=VQVAEConfig(**small)), data_variance=1)
    images = np.random.default_rng(0).integers(0, 256, (EXAMPLES, 8, 8, 1), dtype="uint8")
    return model, {"images": images}, lambda batch: scale_images(batch["images"])


MODELS = {"prior": tiny_prior, "VQ-VAE": tiny_vqvae}


def product_seconds(make, together: int, steps: int, epochs: int) -> float:
    """Returns the time of a step of vqbeam's training."""
    from fit_times import fit_seconds

    model, held, prepare = make()
    model.compile(keras.optimizers.Adam(1e-3), jit_compile=True)  # as Keras does on a GPU
    options = dict(batch_size=BATCH_SIZE, steps=steps, epochs=epochs, together=together)
    return fit_seconds(model, held, prepare, **options)


def bare_seconds(make, together: int, steps: int, epochs: int) -> float:
    """Returns the seconds per step of a program that runs only the steps."""
    model, held, prepare = make()
    model.compile(keras.optimizers.Adam(1e-3), jit_compile=True)  # as Keras does on a GPU
    model.optimizer.build(model.trainable_variables)
    run = (_bare_jax if keras.backend.backend() == "jax" else _bare_tensorflow)(
        model, held, prepare, together
    )
    seconds = []
    for _ in range(epochs):
        start = time.perf_counter()
        run(steps // together)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:]) / steps


def _bare_jax(model, held, prepare, together):
    import jax

    held = jax.device_put(held)
    rows = jax.numpy.arange(BATCH_SIZE)

    def one(state, index):
        batch = prepare({name: array[rows + index] for name, array in held_of_call.items()})
        logs, new = model.train_step(state, batch)
        return jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(new)), logs["loss"]

    held_of_call = {}

    @jax.jit
    def program(state, held):
        held_of_call.update(held)
        if together == 1:
            return one(state, 0)
        return jax.lax.scan(one, state, jax.numpy.arange(together))

    model.reset_metrics()
    state = tuple(
        [variable.value for variable in variables]
        for variables in (
            model.trainable_variables,
            model.non_trainable_variables,
            model.optimizer.variables,
            model.metrics_variables,
        )
    )

    def run(calls):
        nonlocal state
        for _ in range(calls):
            state, _ = program(state, held)
        jax.block_until_ready(state)

    return run


def _bare_tensorflow(model, held, prepare, together):
    import tensorflow as tf

    held = {name: tf.constant(array) for name, array in held.items()}
    rows = tf.range(BATCH_SIZE)

    def step(index):
        batch = prepare({name: tf.gather(array, rows + index) for name, array in held.items()})
        return model.train_step(batch)["loss"]

    @tf.function(jit_compile=True, autograph=False)
    def program():
        if together == 1:
            return step(0)
        return tf.while_loop(
            lambda index, loss: index < together,
            lambda index, loss: (index + 1, step(index)),
            (0, 0.0),
        )[1]

    def run(calls):
        for _ in range(calls):
            loss = program()
        float(loss)

    return run


def rows(steps: int, epochs: int) -> list[list[str]]:
    """Returns a row of the table for each model."""
    found = []
    for name, make in MODELS.items():
        times = [
            measure(make, together, steps, epochs)
            for measure in (product_seconds, bare_seconds)
            for together in (1, TOGETHER)
        ]
        title = f"{name}, {keras.backend.backend()}"
        found.append([title, *(f"{1000 * t:.3f}" for t in times), f"×{times[1] / times[3]:.2f}"])
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--backend", choices=("jax", "tensorflow"), default="jax")
    parser.add_argument("--smoke", action="store_true", help="few steps, to see that it runs")
    words = parser.parse_args()
    os.environ["KERAS_BACKEND"] = words.backend
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import keras
    from side_by_side import table

    print(table(HEADER, rows(*((TOGETHER, 2) if words.smoke else (2000, 6)))))
