"""Trains on two devices and on one, and compares; run by test_replicas.py in its own process.

    python tests/two_devices.py FOLDER

The devices of a process are set before its backend starts, hence the process of its own.
"""

import contextlib
import dataclasses
import os
import pathlib
import sys

os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=2 "
    # compiles faster
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)
sys.path[:0] = [str(pathlib.Path(__file__).parent), str(pathlib.Path(__file__).parent.parent)]

import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})  # compiles faster
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)

import keras  # noqa: E402
from broken_off import broken_off  # noqa: E402
from conftest import _config, _prepared_run  # noqa: E402
from quantizer_checks import array  # noqa: E402
from test_prior_training import stateful_run  # noqa: E402

from vqbeam.configs import PriorConfig, VqbeamError, override  # noqa: E402
from vqbeam.pipelines.budget import measure  # noqa: E402
from vqbeam.prior.training import build_optimizer as build_prior_optimizer  # noqa: E402
from vqbeam.prior.training import build_prior, load_prior, train_prior  # noqa: E402
from vqbeam.vqvae.building import build_model  # noqa: E402
from vqbeam.vqvae.fitting import fit  # noqa: E402
from vqbeam.vqvae.fitting.data import TrainingData  # noqa: E402
from vqbeam.vqvae.fitting.devices import data_parallel, device_count, share_of_replica  # noqa: E402
from vqbeam.vqvae.fitting.optimizers import build_optimizer  # noqa: E402
from vqbeam.vqvae.fitting.program import training_program  # noqa: E402
from vqbeam.vqvae.storage.labels import Labels  # noqa: E402
from vqbeam.vqvae.storage.run_folder import STAGES  # noqa: E402
from vqbeam.vqvae.training import load_vqvae, train_vqvae  # noqa: E402

STEPS, BATCH = 4, 8
IMAGES = np.random.default_rng(0).uniform(-1, 1, (STEPS * BATCH, 8, 8, 1)).astype("float32")
# Unlike halves, so that a share of a batch is not as good as the whole.
IMAGES[BATCH // 2 :: BATCH] = 0.9
SAME = {
    "gradient": {"codebook_update": "gradient", "entropy": 0.3, "clip_norm": 0.1},
    "ema, two grids": {"grids": 2, "weight_ema": 0.5},
}


def config_of(**changes):
    defaults = {"restart_below": 0.0, "steps": STEPS, "steps_per_epoch": STEPS}
    return _config(**{f"vqvae__{name}": value for name, value in (defaults | changes).items()})


def train(config, scope):
    """Returns a trained model and the measures of its one epoch."""
    with scope:
        model = build_model(config, data_variance=0.3)
        model.compile(build_optimizer(config.vqvae))
        model.initialize_codebook(IMAGES, "data", seed=0)
        data = tf.data.Dataset.from_tensor_slices(IMAGES).batch(BATCH)
        history = model.fit(
            data.repeat(),
            steps_per_epoch=STEPS,
            validation_data=data.take(2),
            shuffle=False,
            verbose=0,
        )
    return model, history.history


def copies(variable):
    """What each device holds of a variable."""
    if keras.backend.backend() == "jax":
        return [np.asarray(shard.data) for shard in variable.value.addressable_shards]
    return [np.asarray(value) for value in variable.value.values]


def check_devices_agree(model):
    for variable in model.variables:
        if "seed_generator" not in variable.path:
            first, second = copies(variable)
            np.testing.assert_array_equal(first, second, err_msg=variable.path)


def check_two_devices_are_as_good_as_one(name):
    config = config_of(**SAME[name])
    one, history = train(config, contextlib.nullcontext())
    two, other = train(config, data_parallel(BATCH))
    check_devices_agree(two)
    assert set(history) == set(other)
    for key in history:
        np.testing.assert_allclose(other[key], history[key], rtol=1e-3, atol=2e-4, err_msg=key)
    moved = 0
    start = build_model(config, data_variance=0.3)
    for a, b, before in zip(one.weights, two.weights, start.weights, strict=True):
        a, b, before = array(a), copies(b)[0], array(before)
        moved += np.abs(a - before).max() > 1e-4
        # Adam divides by the size of the gradient, which rounding changes.
        np.testing.assert_allclose(b, a, rtol=2e-4, atol=5e-5, err_msg=name)
    assert moved > len(one.weights) // 2


def check_restarts_are_the_same_on_both_devices():
    config = config_of(codebook_update="gradient", restart_below=0.6)
    model, _ = train(config, data_parallel(BATCH))
    check_devices_agree(model)
    assert (np.abs(array(model.quantizer.moves)).max(1) > 0).sum() > 2, "nothing restarted"


def check_a_whole_stage(folder):
    # An odd number of validation images: what the devices share is even.
    config = _config(vqvae__weight_ema=0.5, vqvae__codebook_init="kmeans", vqvae__steps=4)
    run, _ = _prepared_run(folder / "run", config, validation=11)
    manifest = train_vqvae(str(run.root))
    assert len(manifest["history"]) == 2
    assert np.isfinite(list(manifest["measures"].values())).all()
    assert load_vqvae(run).quantizer.built
    odd = _config(vqvae__batch_size=7)
    run, _ = _prepared_run(folder / "odd", odd)
    # The trial of the plan has the same devices, so that it tells before the work begins.
    for attempt in (lambda: train_vqvae(str(run.root)), lambda: measure(odd, STAGES, 0, fewest=1)):
        try:
            attempt()
        except VqbeamError as error:
            assert "a batch of 7 cannot be divided evenly among 2 devices" in str(error)
        else:
            raise AssertionError("a batch of 7 was shared by 2 devices")
    small = {"layers": 1, "width": 16, "heads": 2, "batch_size": 8}
    even = override(_config(), {f"prior.{name}": value for name, value in small.items()})
    assert set(measure(even, STAGES, 0, fewest=1)) == {"train vqvae", "train prior"}


def trained_prior(parts, scope):
    """Returns a prior after one epoch, its history, and the weights it began with."""
    settings = PriorConfig(
        layers=1, width=16, heads=2, dropout=0.0, steps=STEPS, warmup_steps=1, weight_ema=0.5
    )
    config = dataclasses.replace(_config(vqvae__num_codes=9), prior=settings)
    codes = np.random.default_rng(0).integers(9, size=(STEPS * BATCH, 2, 2), dtype="int32")
    codes[BATCH // 2 :: BATCH] = 1  # unlike halves
    inputs = {"codes": codes, "labels": codes[:, 0, 0] % 3}
    with scope:
        model = build_prior(config, Labels(("a", "b", "c")))
        start = [array(weight) for weight in model.weights]
        model.parts = parts
        for block in model.blocks:
            block.remat = parts > 1
        model.compile(build_prior_optimizer(settings))
        data = tf.data.Dataset.from_tensor_slices(inputs).batch(BATCH)
        history = model.fit(data, validation_data=data.take(2), shuffle=False, verbose=0)
    return model, history.history, start


def check_the_prior_of_two_devices_is_as_good_as_that_of_one(parts):
    one, history, start = trained_prior(1, contextlib.nullcontext())
    two, other, _ = trained_prior(parts, data_parallel(BATCH // parts))
    check_devices_agree(two)
    for key in history:
        np.testing.assert_allclose(other[key], history[key], rtol=1e-4, err_msg=key)
    for a, b, before in zip(one.weights, two.weights, start, strict=True):
        a, b = array(a), copies(b)[0]
        assert np.abs(a - before).max() > 1e-4
        np.testing.assert_allclose(b, a, rtol=2e-4, atol=5e-5, err_msg=str(parts))


class Mean(keras.Model):
    """A model whose loss is the mean of its inputs."""

    def __init__(self):
        super().__init__()
        self.weight = self.add_weight(initializer="zeros")
        self.built = True

    def call(self, inputs):
        return inputs["number"] + 0 * self.weight

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return share_of_replica(keras.ops.mean(y_pred))


def check_every_batch_is_trained_on_once():
    numbers = tf.data.Dataset.range(10**6).map(
        lambda number: {
            "number": tf.fill([1, BATCH], tf.cast(number, tf.float32)),
            "odd": [[True] * BATCH],
        }
    )
    data = TrainingData(batches=lambda first, _: numbers.skip(first))
    with data_parallel(BATCH):
        model = Mean()
        model.compile("sgd")
        with training_program(model, data, 1) as program:
            fitted = model.fit(
                program.batches(3), steps_per_epoch=2, epochs=2, shuffle=False, verbose=0
            )
    assert fitted.history["loss"] == [3.5, 5.5]


def check_the_whole_stage_of_the_prior(folder):
    small = {"layers": 1, "width": 16, "heads": 2, "batch_size": 4, "steps_per_epoch": 2}
    small = {f"prior.{name}": value for name, value in (small | {"remat": "blocks"}).items()}
    config = override(_config(vqvae__num_codes=9), small)
    # TensorFlow's devices take one step at a time.
    found, history = [], None
    for together in (1, 2) if keras.backend.backend() == "jax" else (1,):
        fit.steps_per_call = lambda steps_per_epoch, together=together: together
        run = stateful_run(folder / f"prior-{together}", config)
        manifest = train_prior(str(run.root))
        assert np.isfinite(list(manifest["measures"].values())).all()
        history = history or manifest["history"]
        assert list((run.folder("train-prior") / "logs/images").iterdir())
        found.append([array(weight) for weight in load_prior(run).weights])
    fit.steps_per_call = lambda steps_per_epoch: 1
    run = stateful_run(folder / "prior-broken-off", config)
    with broken_off(3):  # in the middle of the second epoch
        train_prior(str(run.root))
    assert train_prior(str(run.root))["history"] == history
    for one, other in zip(found[0], load_prior(run).weights, strict=True):
        np.testing.assert_array_equal(array(other), one)
    for one, other in zip(found[0], found[-1], strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-6)


if __name__ == "__main__":
    assert device_count() == 2
    for case in SAME:
        print(case, flush=True)
        check_two_devices_are_as_good_as_one(case)
    print("restarts", flush=True)
    check_restarts_are_the_same_on_both_devices()
    print("stage", flush=True)
    check_a_whole_stage(pathlib.Path(sys.argv[1]))
    print("prior", flush=True)
    check_the_prior_of_two_devices_is_as_good_as_that_of_one(parts=2)
    print("batches", flush=True)
    check_every_batch_is_trained_on_once()
    print("stage of the prior", flush=True)
    check_the_whole_stage_of_the_prior(pathlib.Path(sys.argv[1]))
