import dataclasses
import json
import math
import os
import pathlib
import re
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from etils import epath
from keras import layers

from vqbeam.configs import VqbeamError
from vqbeam.vqvae.fitting import fit as module
from vqbeam.vqvae.fitting import progress
from vqbeam.vqvae.fitting.checkpoints import Checkpoints
from vqbeam.vqvae.fitting.data import TrainingData
from vqbeam.vqvae.fitting.fit import Reseed, Schedule, fit, load_model, save_model
from vqbeam.vqvae.storage.records import training_batches

pytestmark = pytest.mark.slow

STEPS_PER_EPOCH = 3
AVERAGING = dict(use_ema=True, ema_momentum=0.8)


def build(units=6, learning_rate=0.01, seed=0, **averaging):
    keras.utils.set_random_seed(seed + 1)
    model = keras.Sequential(
        [keras.Input((4,)), layers.Dense(units, "relu"), layers.Dropout(0.5), layers.Dense(1)]
    )
    model.compile(keras.optimizers.Adam(learning_rate, **averaging), loss="mse")
    return model


NUMBERS = np.random.default_rng(0).normal(size=(20, 5)).astype("float32")


def pairs(dataset):
    return dataset.map(lambda row: (row[..., :4], row[..., 4:]))


def one_at_a_time(dataset):
    """Training data of which each call takes one batch."""
    return TrainingData(batches=lambda first_step, steps: dataset.skip(first_step).batch(steps))


def train(model, folder, epochs, *, fingerprint="f", data=None, whole=False, **changes):
    """Returns the history, or all that `fit` returns."""

    def shuffled(first_step, steps):
        dataset = tf.data.Dataset.from_tensor_slices(NUMBERS)
        batches = training_batches(dataset, size=20, batch_size=8, first_step=first_step, seed=0)
        return pairs(batches.batch(steps, drop_remainder=True))

    arguments = dict(
        data=data or TrainingData(batches=shuffled),
        validation=pairs(tf.data.Dataset.from_tensor_slices(NUMBERS).batch(7)),
        folder=epath.Path(folder),
        fingerprint=fingerprint,
    )
    schedule = Schedule(
        title="test",
        steps=epochs * STEPS_PER_EPOCH,
        steps_per_epoch=STEPS_PER_EPOCH,
        batch_size=8,
        seed=0,
    )
    fields = [field.name for field in dataclasses.fields(Schedule)]
    own = {name: changes.pop(name) for name in fields if name in changes}
    fitted = fit(model, dataclasses.replace(schedule, **own), **(arguments | changes))
    return fitted if whole else fitted.history


def state(model):
    variables = [*model.variables, *model.optimizer.variables]
    return [np.asarray(variable).copy() for variable in variables]


def kept(model):
    """What a checkpoint holds: all but the random generators, which begin anew in each epoch."""
    return [np.asarray(v).copy() for v in [*model.weights, *model.optimizer.variables]]


def assert_same_state(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


def checkpoints(folder, fingerprint="f"):
    found = (pathlib.Path(folder) / "checkpoints" / fingerprint).glob("*.weights.h5")
    return sorted(path.name for path in found)


@pytest.mark.backend
def test_training_ends_when_it_stalls_with_the_best_weights(tmp_path):
    rows = tf.data.Dataset.from_tensor_slices(NUMBERS[:, :4]).batch(5)

    def five(x):
        return x, x[:, :1] * 0 + 5

    changes = dict(
        patience=2,
        data=one_at_a_time(rows.map(five).repeat()),
        # What is learned is wrong here, and more so with each step.
        validation=rows.map(lambda x: (x, x[:, :1] * 0 - 5)),
    )
    unbroken = build(**AVERAGING)
    history = train(unbroken, tmp_path / "unbroken", 6, **changes)
    losses = [epoch["val_loss"] for epoch in history]
    assert len(losses) == 3 and losses == sorted(losses)
    # Older than those that are always kept, but the best.
    assert checkpoints(tmp_path / "unbroken") == [f"epoch-0000{i}.weights.h5" for i in (1, 2, 3)]
    one = build(**AVERAGING)
    train(one, tmp_path / "one", 1, **changes)
    assert_same_state(kept(unbroken), kept(one))
    # Broken off before the end, and asked for once more after it.
    train(build(**AVERAGING), tmp_path / "resumed", 2, **changes)
    for seed in (1, 2):
        resumed = build(seed=seed, **AVERAGING)
        assert train(resumed, tmp_path / "resumed", 6, **changes) == history
        assert_same_state(kept(resumed), kept(unbroken))


@pytest.mark.backend
def test_resumed_is_unbroken_bit_for_bit(tmp_path):
    unbroken = build(**AVERAGING)
    history = train(unbroken, tmp_path / "unbroken", 4)
    train(build(**AVERAGING), tmp_path / "resumed", 2)
    # Other weights and random numbers at the start: all must come from the checkpoint.
    resumed = build(seed=5, **AVERAGING)
    keras.utils.set_random_seed(1)
    again = train(resumed, tmp_path / "resumed", 4)
    assert_same_state(state(unbroken), state(resumed))
    assert again == history and len(history) == 4
    assert all(set(epoch) == {"loss", "val_loss"} for epoch in history)
    assert int(np.asarray(resumed.optimizer.iterations)) == 4 * STEPS_PER_EPOCH


RESUME = """
import pathlib, sys
import numpy as np
sys.path.insert(0, "tests")
from test_fitting import build, state, train
model = build()
train(model, sys.argv[1], 3)
np.savez(pathlib.Path(sys.argv[1]) / "state.npz", *state(model))
"""


def test_a_new_process_goes_on_bit_for_bit(tmp_path):
    unbroken = build()
    train(unbroken, tmp_path / "unbroken", 3)
    folder = tmp_path / "resumed"
    train(build(), folder, 1)
    root = pathlib.Path(__file__).parent.parent
    environment = os.environ | {"PYTHONPATH": str(root)}
    subprocess.run(
        [sys.executable, "-c", RESUME, str(folder)], cwd=root, check=True, env=environment
    )
    with np.load(folder / "state.npz") as resumed:
        assert_same_state(state(unbroken), list(resumed.values()))


@pytest.mark.backend
def test_random_layers_begin_each_epoch_with_numbers_of_its_own():
    model = build()
    (generator,) = (v for v in model.non_trainable_variables if "seed_generator" in v.path)
    states = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0)):
        callback = Reseed(seed)
        callback.set_model(model)
        callback.on_epoch_begin(epoch)
        states.append(tuple(np.asarray(generator).tolist()))
    assert len(set(states)) == 3 and states[0] == states[-1]


@pytest.mark.backend
def test_dropout_differs_between_seeds(tmp_path):
    states = []
    for seed in (0, 1):
        model = build()
        train(model, tmp_path / str(seed), 2, seed=seed)
        states.append(state(model)[0])
    assert np.abs(states[0] - states[1]).max() > 0


def test_speed_is_told_and_returned(compiled, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "peak_flops", lambda: 1e9)
    monkeypatch.setattr(module, "peak_memory", lambda: 3 * 2**30)
    speed = train(build(), tmp_path, 2, whole=True).speed
    assert set(speed) == {"images_per_second", "flops_per_step", "share_of_peak", "device_bytes"}
    steps_per_second = speed["images_per_second"] / 8
    assert speed["share_of_peak"] == pytest.approx(steps_per_second * speed["flops_per_step"] / 1e9)
    told = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(
        r"test: [\d,]+ images/s, \S+ GFLOP a step, \d+% of the peak in bfloat16, 3.0 GiB of "
        "device memory",
        told,
    )
    # There is nothing left to do, and so nothing to tell.
    assert train(build(), tmp_path, 2, whole=True).speed == {}


def test_speed_leaves_out_compilation_and_validation(monkeypatch):
    clock = iter([30.0, 32.0, 33.0, 40.0, 45.0, 47.0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    bar = progress.FitProgress("test", total=400, initial=0, at_once=50)
    logs = {"loss": 0.0}
    bar.on_epoch_begin(0)
    assert bar.rate is None
    for batch in range(3):
        bar.on_train_batch_end(batch, logs)
    bar.on_epoch_end(0, logs)
    bar.on_epoch_begin(1)
    for batch in range(2):
        bar.on_train_batch_end(batch, logs)
    bar.on_train_end()
    # From the end of the first call to that of the third, and from the start of the second epoch.
    assert bar.rate == 200 / (3 + 7)


def test_a_finished_run_trains_no_further(tmp_path):
    model = build()
    history = train(model, tmp_path, 2)
    after = build(seed=5)

    def no_batches(first_step, steps):
        raise AssertionError("batches were asked for")

    assert train(after, tmp_path, 2, data=TrainingData(batches=no_batches)) == history
    for one, other in zip(model.weights, after.weights, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_begins_where_the_checkpoint_ends(tmp_path):
    train(build(), tmp_path, 2)
    asked = []
    dataset = pairs(tf.data.Dataset.from_tensor_slices(NUMBERS).batch(8, True).repeat().batch(1))

    def batches(first_step, steps):
        asked.append(first_step)
        return dataset

    train(build(), tmp_path, 3, data=TrainingData(batches=batches))
    assert asked == [2 * STEPS_PER_EPOCH]


def test_fewer_steps_than_an_epoch(tmp_path, capsys):
    model = build()
    train(model, tmp_path, 1, steps=2)
    assert int(np.asarray(model.optimizer.iterations)) == 2
    # The bar counts these 2 batches of 8 as all there is.
    assert "16/16" in capsys.readouterr().err


def test_a_half_written_checkpoint_is_not_taken_for_one(tmp_path):
    model = build()
    history = train(model, tmp_path, 2)
    folder = tmp_path / "checkpoints" / "f"
    # As a kill leaves it: the history of epoch 3 and a part of its weights.
    whole = (folder / "epoch-00002.weights.h5").read_bytes()
    (folder / ".epoch-00003.weights.h5.0123456789abcdef").write_bytes(whole[:1000])
    (folder / "epoch-00003.json").write_text(json.dumps([*history, {"loss": 1e9, "val_loss": 0}]))
    resumed = build(seed=5)
    keras.utils.set_random_seed(1)
    again = train(resumed, tmp_path, 3)
    unbroken = build()
    expected = train(unbroken, tmp_path / "unbroken", 3)
    assert again == expected
    assert_same_state(state(resumed), state(unbroken))
    assert not any(path.name.startswith(".") for path in folder.iterdir())


def test_keeps_the_last_two_checkpoints(tmp_path):
    train(build(), tmp_path, 4)
    assert checkpoints(tmp_path) == ["epoch-00003.weights.h5", "epoch-00004.weights.h5"]
    folder = tmp_path / "checkpoints" / "f"
    for epochs in (3, 4):
        history = json.loads((folder / f"epoch-{epochs:05d}.json").read_text())
        assert len(history) == epochs
    assert len(list(folder.iterdir())) == 4


def test_checkpoints_of_other_inputs_are_removed(tmp_path, capsys):
    train(build(), tmp_path, 2, fingerprint="old")
    model, fresh = build(), build()
    train(model, tmp_path, 1, fingerprint="new")
    told = f"{tmp_path}/checkpoints/old is of other settings or inputs: removed\n"
    assert told in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["new"]
    assert checkpoints(tmp_path, "new") == ["epoch-00001.weights.h5"]
    train(fresh, tmp_path / "fresh", 1, fingerprint="new")
    assert_same_state(state(model), state(fresh))


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    train(build(), tmp_path, 1)
    with pytest.raises(
        VqbeamError, match="epoch-00001.* does not match this run's model; delete .*chec"
    ):
        train(build(units=7), tmp_path, 2)


def test_a_truncated_checkpoint_is_refused(tmp_path):
    train(build(), tmp_path, 1)
    path = tmp_path / "checkpoints" / "f" / "epoch-00001.weights.h5"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(
        VqbeamError, match="epoch-00001.* does not match this run's model; delete .*chec"
    ):
        train(build(), tmp_path, 2)


@pytest.mark.parametrize("content", [b"", b"\x89HDF and no more", None])
def test_goes_back_an_epoch_where_the_last_checkpoint_is_damaged(tmp_path, capsys, content):
    unbroken = build()
    expected = train(unbroken, tmp_path / "unbroken", 3)
    train(build(), tmp_path, 2)
    folder = tmp_path / "checkpoints" / "f"
    if content is None:
        (folder / "epoch-00002.json").unlink()
    else:
        (folder / "epoch-00002.weights.h5").write_bytes(content)
    resumed = build(seed=5)
    keras.utils.set_random_seed(1)
    assert train(resumed, tmp_path, 3) == expected
    assert_same_state(state(resumed), state(unbroken))
    assert "epoch-00002.weights.h5 cannot be read: going back an epoch" in capsys.readouterr().err


@pytest.mark.backend
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_training(tmp_path, bad):
    train(build(), tmp_path, 1)
    spoilt = NUMBERS.copy()
    spoilt[10] = bad
    batches = pairs(tf.data.Dataset.from_tensor_slices(spoilt).batch(8, True).repeat())
    data = TrainingData(batches=lambda first_step, steps: batches.batch(steps))
    with pytest.raises(VqbeamError, match="loss became (nan|inf) at step 2 .*lower learning rate"):
        train(build(), tmp_path, 3, data=data)
    # The last good state is there, and no other.
    assert checkpoints(tmp_path) == ["epoch-00001.weights.h5"]


def test_weights_broken_by_the_last_step_of_an_epoch_are_not_kept(tmp_path):
    # One step an epoch: its loss is taken before the update that breaks the weights.
    model = build(learning_rate=math.inf)
    with pytest.raises(VqbeamError, match="validation loss became nan in epoch 1; .*learning rate"):
        train(model, tmp_path, 1, steps=1, steps_per_epoch=1)
    assert checkpoints(tmp_path) == []


@pytest.mark.backend
def test_validation_measures_the_average_and_leaves_the_weights(tmp_path):
    data = pairs(tf.data.Dataset.from_tensor_slices(NUMBERS).batch(7))
    model, without = build(**AVERAGING), build(**AVERAGING)
    history = train(model, tmp_path / "with", 2, validation=data)
    train(without, tmp_path / "without", 2, validation=None)
    # What is trained is the same, bit for bit, as if nothing had been measured.
    kept = []
    for folder in ("with", "without"):
        restored = build(seed=5, **AVERAGING)
        assert Checkpoints(epath.Path(tmp_path / folder), "f").restore(restored) == 2
        kept.append(restored)
    assert_same_state(state(kept[0]), state(kept[1]))
    # The checkpoint holds both the weights and their average, of which the result is the latter.
    optimizer = kept[0].optimizer
    averages = [np.asarray(average) for average in optimizer._model_variables_moving_average]
    weights = [np.asarray(weight) for weight in kept[0].trainable_variables]
    assert all(np.abs(a - b).max() > 1e-4 for a, b in zip(averages, weights, strict=True))
    assert_same_state(averages, [np.asarray(weight) for weight in model.trainable_variables])
    measured = model.evaluate(data, verbose=0)
    assert history[-1]["val_loss"] == pytest.approx(measured, rel=1e-5)
    assert kept[0].evaluate(data, verbose=0) != pytest.approx(measured, rel=1e-5)


def test_a_run_broken_off_after_its_last_epoch_ends_with_the_average(tmp_path):
    model = build(**AVERAGING)
    train(model, tmp_path, 2)
    again = build(seed=5, **AVERAGING)
    train(again, tmp_path, 2)
    for one, other in zip(model.weights, again.weights, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.backend
def test_half_precision_keeps_an_average_too(tmp_path):
    model = build(**AVERAGING)
    inner = keras.optimizers.Adam(0.01, **AVERAGING)
    model.compile(keras.optimizers.LossScaleOptimizer(inner), loss="mse")
    history = train(model, tmp_path, 2)
    data = pairs(tf.data.Dataset.from_tensor_slices(NUMBERS).batch(7))
    assert history[-1]["val_loss"] == pytest.approx(model.evaluate(data, verbose=0), rel=1e-5)


def test_writes_tensorboard_logs(tmp_path):
    train(build(), tmp_path, 1)
    for part in ("train", "validation"):
        assert list((tmp_path / "logs" / part).glob("events*"))


def test_further_callbacks_are_called(tmp_path):
    epochs = []
    callback = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: epochs.append(epoch))
    train(build(), tmp_path, 2, callbacks=[callback])
    assert epochs == [0, 1]


def test_save_and_load(tmp_path):
    model = build()
    path = epath.Path(tmp_path) / "model.keras"
    save_model(model, path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.keras"]
    np.testing.assert_allclose(
        load_model(path).predict(NUMBERS[:, :4], verbose=0),
        model.predict(NUMBERS[:, :4], verbose=0),
        rtol=1e-6,
    )


@pytest.mark.parametrize("part", [0, 0.2, 0.9, "middle"])
def test_a_damaged_model_is_named(tmp_path, part):
    path = epath.Path(tmp_path) / "model.keras"
    save_model(build(), path)
    data = bytearray(path.read_bytes())
    if part == "middle":
        data[len(data) // 3] ^= 255
    else:
        data = data[: int(part * len(data))]
    path.write_bytes(bytes(data))
    with pytest.raises(VqbeamError, match="model.keras cannot be read .*; delete .* train again"):
        load_model(path)


def test_code_in_a_model_file_is_not_run(tmp_path):
    model = keras.Sequential([keras.Input((2,)), layers.Lambda(lambda x: x + 1)])
    path = epath.Path(tmp_path) / "model.keras"
    save_model(model, path)
    with pytest.raises(VqbeamError, match="cannot be read"):
        load_model(path)
