import csv
import dataclasses
import io
import json
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import zipfile

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
from broken_off import Killed, broken_off, kill
from etils import epath
from event_files import events
from keras import layers

from vqbeam.configs import VqbeamError, override
from vqbeam.vqvae.fitting import checkpoints as module_of_checkpoints
from vqbeam.vqvae.fitting import fit as module
from vqbeam.vqvae.fitting import progress
from vqbeam.vqvae.fitting.checkpoints import Checkpoints, random_states, stored_history
from vqbeam.vqvae.fitting.data import TrainingData
from vqbeam.vqvae.fitting.fit import Schedule, fit, load_model, save_model, seed_layers
from vqbeam.vqvae.storage import files
from vqbeam.vqvae.storage.records import UNTUNED, training_batches

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
    halves = dataset.map(lambda row: (row[..., :4], row[..., 4:]))
    return halves.with_options(UNTUNED)


def one_at_a_time(dataset):
    """Training data of which each call takes one batch."""
    return TrainingData(batches=lambda first_step, steps: dataset.skip(first_step).batch(steps))


FINGERPRINTS = "0123456789abcdef", "fedcba9876543210"


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
        fingerprints=[fingerprint],
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
    """Weights and optimizer, without metrics and random generators."""
    return [np.asarray(v).copy() for v in [*model.weights, *model.optimizer.variables]]


def assert_same_state(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


def names(*steps):
    return [f"step-{step:08d}.weights.h5" for step in steps]


def checkpoints(folder, fingerprint="f"):
    found = (pathlib.Path(folder) / "checkpoints" / fingerprint).glob("*.weights.h5")
    return sorted(path.name for path in found)


@pytest.mark.backend
def test_training_ends_when_it_stalls_with_the_best_weights(tmp_path):
    rows = tf.data.Dataset.from_tensor_slices(NUMBERS[:, :4]).batch(5).with_options(UNTUNED)

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
    assert checkpoints(tmp_path / "unbroken") == names(3, 6, 9)
    one = build(**AVERAGING)
    train(one, tmp_path / "one", 1, **changes)
    assert_same_state(kept(unbroken), kept(one))
    # Broken off before the end, and asked for once more after it.
    train(build(**AVERAGING), tmp_path / "resumed", 2, **changes)
    for seed in (1, 2):
        resumed = build(seed=seed, **AVERAGING)
        assert train(resumed, tmp_path / "resumed", 6, **changes) == history
        assert_same_state(kept(resumed), kept(unbroken))


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


@pytest.mark.parametrize("step, together", [(1, 1), pytest.param(8, 2, marks=pytest.mark.backend)])
def test_resumed_within_an_epoch_is_unbroken_bit_for_bit(tmp_path, monkeypatch, step, together):
    monkeypatch.setattr(module, "steps_per_call", lambda steps: math.gcd(steps, together))
    unbroken = build(**AVERAGING)
    history = train(unbroken, tmp_path / "unbroken", 4, steps_per_epoch=6)
    with broken_off(step):
        train(build(**AVERAGING), tmp_path / "resumed", 4, steps_per_epoch=6)
    assert checkpoints(tmp_path / "resumed")[-1:] == names(step)
    resumed = build(seed=5, **AVERAGING)
    keras.utils.set_random_seed(1)
    assert train(resumed, tmp_path / "resumed", 4, steps_per_epoch=6) == history
    assert_same_state(state(resumed), state(unbroken))
    assert len(history) == 2


LAST_IS_SHORTER = dict(steps=11, steps_per_epoch=4)


@pytest.mark.parametrize("together", [1, pytest.param(4, marks=pytest.mark.backend)])
def test_the_last_epoch_may_be_shorter(tmp_path, monkeypatch, together):
    monkeypatch.setattr(module, "steps_per_call", lambda steps: math.gcd(steps, together))
    model, whole = build(**AVERAGING), build(**AVERAGING)
    history = train(model, tmp_path / "model", 0, **LAST_IS_SHORTER)
    assert checkpoints(tmp_path / "model") == names(8, 11) and len(history) == 3
    # It has the weights of one epoch of all the steps; each epoch has a mean of its own.
    (mean,) = train(whole, tmp_path / "whole", 0, steps=11, steps_per_epoch=11)
    for one, other in zip(kept(model), kept(whole), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
    losses = [epoch["loss"] for epoch in history]
    assert np.average(losses, weights=[4, 4, 3]) == pytest.approx(mean["loss"], rel=1e-5)
    shown = events(tmp_path / "model" / "logs" / "train")["epoch_loss"]
    assert [shown[index] for index in range(3)] == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize("step, together", [(9, 1), pytest.param(10, 2, marks=pytest.mark.backend)])
def test_resumed_with_a_shorter_last_epoch(tmp_path, monkeypatch, step, together):
    monkeypatch.setattr(module, "steps_per_call", lambda steps: math.gcd(steps, together))
    unbroken = build(**AVERAGING)
    history = train(unbroken, tmp_path / "unbroken", 0, **LAST_IS_SHORTER)
    with broken_off(step):
        train(build(**AVERAGING), tmp_path / "resumed", 0, **LAST_IS_SHORTER)
    assert checkpoints(tmp_path / "resumed")[-1:] == names(step)
    resumed = build(seed=5, **AVERAGING)
    keras.utils.set_random_seed(1)
    assert train(resumed, tmp_path / "resumed", 0, **LAST_IS_SHORTER) == history
    assert_same_state(state(resumed), state(unbroken))


def test_early_stopping_returns_to_a_shorter_last_epoch(tmp_path):
    changes = LAST_IS_SHORTER | dict(patience=9)
    model = build()
    history = train(model, tmp_path, 0, **changes)
    losses = [epoch["val_loss"] for epoch in history]
    assert losses[2] == min(losses) and checkpoints(tmp_path) == names(8, 11)
    assert int(np.asarray(model.optimizer.iterations)) == 11


def test_the_length_of_an_epoch_may_change_and_changes_no_weight(tmp_path):
    unbroken = build(**AVERAGING)
    train(unbroken, tmp_path / "unbroken", 4, steps_per_epoch=12)
    with broken_off(5):
        train(build(**AVERAGING), tmp_path / "resumed", 4, steps_per_epoch=6)
    resumed = build(seed=5, **AVERAGING)
    keras.utils.set_random_seed(1)
    # Of the steps to 8 and to 12.
    assert len(train(resumed, tmp_path / "resumed", 4, steps_per_epoch=4)) == 2
    assert_same_state(kept(resumed), kept(unbroken))
    # A longer training after an epoch that was shorter.
    history = train(build(), tmp_path / "longer", 0, steps=4, steps_per_epoch=3)
    longer = train(build(), tmp_path / "longer", 0, steps=9, steps_per_epoch=4)
    assert len(longer) == 4 and longer[:2] == history


class Sends(keras.callbacks.Callback):
    """Sends signals to this process in a training, while a step of an epoch runs."""

    def __init__(self, step, *signals):
        super().__init__()
        self.step, self.signals = step, signals

    def on_train_batch_begin(self, batch, logs=None):
        for number in self.signals if batch == self.step else ():
            os.kill(os.getpid(), number)


KILLED = """
import signal, sys
sys.path.insert(0, "tests")
from test_fitting import Checkpoints, Sends, build, train
Checkpoints.seconds, Checkpoints.largest_share = 0, float("inf")
train(build(), sys.argv[1], 3, steps_per_epoch=9, callbacks=[Sends(5, signal.SIGKILL)])
"""


@pytest.mark.system
def test_a_process_that_was_killed_is_resumed_bit_for_bit(tmp_path, capsys):
    unbroken = build()
    train(unbroken, tmp_path / "unbroken", 3, steps_per_epoch=9)
    root = pathlib.Path(__file__).parent.parent
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "resumed")],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    # In the middle of its only epoch, with step 4 on disk. Other signals: test_faults.py.
    assert checkpoints(tmp_path / "resumed")[-1:] == names(4)
    resumed = build(seed=5)
    keras.utils.set_random_seed(1)
    capsys.readouterr()
    train(resumed, tmp_path / "resumed", 3, steps_per_epoch=9)
    assert "step 4 to 9" in capsys.readouterr().err
    assert_same_state(state(resumed), state(unbroken))


def handlers():
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


@pytest.mark.backend
def test_an_interrupt_saves_the_step_and_is_resumed_bit_for_bit(interruptible, tmp_path):
    before = handlers()
    unbroken = build()
    history = train(unbroken, tmp_path / "unbroken", 3, steps_per_epoch=9)
    with pytest.raises(KeyboardInterrupt):
        interrupted = [Sends(5, signal.SIGINT)]
        train(build(), tmp_path / "resumed", 3, steps_per_epoch=9, callbacks=interrupted)
    assert checkpoints(tmp_path / "resumed") == names(5) and handlers() == before
    resumed = build(seed=5)
    keras.utils.set_random_seed(1)
    assert train(resumed, tmp_path / "resumed", 3, steps_per_epoch=9) == history
    assert_same_state(state(resumed), state(unbroken))


@pytest.mark.parametrize("step, signals", [(0, [signal.SIGINT]), (2, [signal.SIGINT] * 2)])
def test_an_interrupt_ends_at_once(interruptible, tmp_path, step, signals):
    # Where there is nothing to save yet, and where it is the second one.
    before = handlers()
    with pytest.raises(KeyboardInterrupt):
        train(build(), tmp_path, 1, callbacks=[Sends(step, *signals)])
    assert checkpoints(tmp_path) == [] and handlers() == before


def test_an_interrupt_during_validation_ends_training_after_the_epoch(interruptible, tmp_path):
    def interrupt(logs):
        os.kill(os.getpid(), signal.SIGINT)

    callback = keras.callbacks.LambdaCallback(on_test_begin=interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(build(), tmp_path, 2, callbacks=[callback])
    assert checkpoints(tmp_path) == names(STEPS_PER_EPOCH)
    assert len(train(build(), tmp_path, 1)) == 1


def test_an_ignored_signal_stays_ignored(tmp_path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        train(build(), tmp_path, 1, callbacks=[Sends(2, signal.SIGINT)])
    finally:
        signal.signal(signal.SIGINT, before)
    assert checkpoints(tmp_path) == names(STEPS_PER_EPOCH)


def test_in_another_thread_the_clock_saves_alone(tmp_path):
    before, seen = handlers(), []
    callback = keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda batch, logs: seen.append(handlers())
    )

    def work():
        with broken_off(2):
            train(build(), tmp_path, 1, callbacks=[callback])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before] * 3 and checkpoints(tmp_path) == names(1, 2)


def test_the_clock_decides_when_to_save(tmp_path, monkeypatch):
    # A step takes 10 seconds and a file 1.5, of which 75 seconds are a fiftieth.
    now = [0.0]
    monkeypatch.setattr(module_of_checkpoints.time, "monotonic", lambda: now[0])
    saved = []

    def write(path, content):
        saved.append(path.name)
        now[0] += 1.5

    monkeypatch.setattr(module_of_checkpoints, "write_bytes", write)

    def step(batch, logs):
        now[0] += 10

    callback = keras.callbacks.LambdaCallback(on_train_batch_begin=step)
    train(build(), tmp_path, 10, steps_per_epoch=30, callbacks=[callback])
    # The first is due after a minute, and the others 75 seconds after the one before.
    assert saved == names(5, 13, 21, 29, 30)


def test_checkpoints_of_earlier_versions_are_read(tmp_path):
    """They were saved after an epoch alone, without random states and beside a history."""
    model = build(**AVERAGING)
    history = train(model, tmp_path, 2, fingerprints=("earlier",))
    folder = tmp_path / "checkpoints" / "earlier"
    for epoch, name in ((1, names(3)[0]), (2, names(6)[0])):
        with h5py.File(folder / name, "a") as content:
            del content["vqbeam"]
        (folder / name).rename(folder / f"epoch-{epoch:05d}.weights.h5")
        (folder / f"epoch-{epoch:05d}.json").write_text(json.dumps(history[:epoch]))
    resumed = build(seed=5, **AVERAGING)
    assert stored_history(epath.Path(tmp_path), STEPS_PER_EPOCH) == history
    both = Checkpoints(epath.Path(tmp_path), ["f", "earlier"], STEPS_PER_EPOCH, 6)
    assert both.restore(resumed) == 6 and both.history == history
    assert int(np.asarray(resumed.optimizer.iterations)) == 6
    again = train(build(seed=5, **AVERAGING), tmp_path, 4, fingerprints=("f", "earlier"))
    assert again[:2] == history and len(again) == 4
    assert checkpoints(tmp_path) == names(9, 12) and not any(folder.iterdir())


@pytest.mark.backend
def test_random_layers_begin_with_numbers_of_their_own():
    twice = keras.Sequential([keras.Input((4,)), layers.Dropout(0.5), layers.Dropout(0.5)])
    found = []
    for seed in (0, 1, 0):
        seed_layers(twice, seed)
        found.append([tuple(np.asarray(variable)) for variable in random_states(twice)])
    assert found[0] == found[2] and len({*found[0], *found[1]}) == 4


def test_dropout_differs_between_seeds(tmp_path):
    states = []
    for seed in (0, 1):
        model = build()
        train(model, tmp_path / str(seed), 1, seed=seed)
        states.append(state(model)[0])
    assert np.abs(states[0] - states[1]).max() > 0


def test_speed_is_told_returned_and_written(compiled, tmp_path, monkeypatch, capsys, tiny_config):
    monkeypatch.setattr(module, "peak_flops", lambda: 1e9)
    monkeypatch.setattr(module, "peak_memory", lambda: 3 * 2**30)
    config = override(tiny_config(), {"log": "csv"})
    speed = train(build(), tmp_path, 2, whole=True, config=config).speed
    assert set(speed) == {"images_per_second", "flops_per_step", "share_of_peak", "device_bytes"}
    steps_per_second = speed["images_per_second"] / 8
    assert speed["share_of_peak"] == pytest.approx(steps_per_second * speed["flops_per_step"] / 1e9)
    told = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(
        r"test: [\d,]+ images/s, \S+ GFLOP a step, \d+% of the peak in bfloat16, 3.0 GiB of "
        "device memory",
        told,
    )
    assert len(rows(tmp_path)) == 2
    for row in rows(tmp_path):
        assert row["device_bytes"] == str(3 * 2**30)
        work = float(row["images_per_second"]) / 8 * float(row["flops_per_step"])
        assert float(row["share_of_peak"]) == pytest.approx(work / 1e9)
    # There is nothing left to do, and so nothing to tell.
    assert train(build(), tmp_path, 2, whole=True, config=config).speed == {}


def test_speed_leaves_out_compilation_and_validation(monkeypatch):
    clock = iter([30.0, 32.0, 33.0, 40.0, 45.0, 47.0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    bar = progress.FitProgress("test", steps=8, batch_size=50)
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
    # With averages, which the result is: not what the last checkpoint has as weights.
    model = build(**AVERAGING)
    history = train(model, tmp_path, 2)
    after = build(seed=5, **AVERAGING)

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
    # The line of the epoch counts these two as all there are.
    assert "epoch 1 of 1  step 2 of 2" in capsys.readouterr().err


def test_a_half_written_checkpoint_is_not_taken_for_one(tmp_path):
    train(build(), tmp_path, 2)
    folder = tmp_path / "checkpoints" / "f"
    # As a kill leaves it: a part of the file, under its temporary name.
    whole = (folder / names(6)[0]).read_bytes()
    (folder / f".{names(9)[0]}.0123456789abcdef").write_bytes(whole[:1000])
    resumed = build(seed=5)
    keras.utils.set_random_seed(1)
    again = train(resumed, tmp_path, 3)
    unbroken = build()
    expected = train(unbroken, tmp_path / "unbroken", 3)
    assert again == expected
    assert_same_state(state(resumed), state(unbroken))
    assert not any(path.name.startswith(".") for path in folder.iterdir())


def test_the_history_can_be_read_meanwhile(tmp_path):
    assert stored_history(epath.Path(tmp_path), STEPS_PER_EPOCH) == []
    history = train(build(), tmp_path, 2)
    assert stored_history(epath.Path(tmp_path), STEPS_PER_EPOCH) == history
    file = tmp_path / "checkpoints" / "f" / names(6)[0]
    file.write_bytes(file.read_bytes()[:500])
    assert stored_history(epath.Path(tmp_path), STEPS_PER_EPOCH) == []


def test_checkpoints_of_other_inputs_are_removed(tmp_path, capsys):
    old, new = FINGERPRINTS
    train(build(), tmp_path, 2, fingerprint=old)
    shutil.copytree(tmp_path / "checkpoints" / old, tmp_path / "checkpoints" / "my backup")
    model, fresh = build(), build()
    train(model, tmp_path, 1, fingerprint=new)
    told = f"{tmp_path}/checkpoints/{old} belongs to other settings or inputs: removed\n"
    assert told in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {new, "my backup"}
    assert checkpoints(tmp_path, new) == names(3)
    train(fresh, tmp_path / "fresh", 1, fingerprint=new)
    assert_same_state(state(model), state(fresh))


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    train(build(), tmp_path, 1)
    with pytest.raises(
        VqbeamError, match="step-00000003.* does not match this run's model; delete .*chec"
    ):
        train(build(units=7), tmp_path, 2)


def test_a_truncated_checkpoint_is_refused(tmp_path):
    train(build(), tmp_path, 1)
    path = tmp_path / "checkpoints" / "f" / names(3)[0]
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(
        VqbeamError, match="step-00000003.* does not match this run's model; delete .*chec"
    ):
        train(build(), tmp_path, 2)


def test_a_history_that_is_none_counts_as_damage(tmp_path):
    train(build(), tmp_path, 1)
    for text in ("7", "[7]", "{", '[{"loss": "low"}]', "[[1.0]]", "[" * 100_000):
        with h5py.File(tmp_path / "checkpoints" / "f" / names(3)[0], "a") as parts:
            del parts["vqbeam/history"]
            parts["vqbeam/history"] = text
        assert stored_history(epath.Path(tmp_path), STEPS_PER_EPOCH) == [], text
        with pytest.raises(VqbeamError, match="step-00000003.* does not match this run's model"):
            train(build(), tmp_path, 2)


def test_stray_files_among_checkpoints_are_left_alone(tmp_path):
    unbroken = build()
    expected = train(unbroken, tmp_path / "unbroken", 2)
    train(build(), tmp_path, 1)
    own = tmp_path / "checkpoints" / "f"
    for name in ("notes.txt", "step-new.weights.h5", "step-.weights.h5", "best.weights.h5"):
        (own / name).write_text("")
    (own / "step-00000005.weights.h5").mkdir()
    (own / ".ipynb_checkpoints").mkdir()
    (own.parent / ".DS_Store").write_text("")
    resumed = build(seed=5)
    keras.utils.set_random_seed(1)
    assert train(resumed, tmp_path, 2) == expected
    assert_same_state(state(resumed), state(unbroken))
    assert len(list(own.iterdir())) == 6 + 2 and (own.parent / ".DS_Store").exists()


def test_a_checkpoint_may_be_larger_than_other_files(tmp_path, monkeypatch):
    history = train(build(), tmp_path, 1)
    monkeypatch.setattr(files, "MOST_BYTES", 10)
    resumed = build(seed=5)
    assert train(resumed, tmp_path, 1) == history
    assert stored_history(epath.Path(tmp_path), STEPS_PER_EPOCH) == history


@pytest.mark.parametrize("content", [b"", None])
def test_goes_back_where_the_last_checkpoint_is_damaged(tmp_path, capsys, content):
    unbroken = build()
    expected = train(unbroken, tmp_path / "unbroken", 3)
    train(build(), tmp_path, 2)
    file = tmp_path / "checkpoints" / "f" / names(6)[0]
    if content is None:
        with h5py.File(file, "a") as parts:
            del parts["vqbeam/history"]
    else:
        file.write_bytes(content)
    resumed = build(seed=5)
    keras.utils.set_random_seed(1)
    assert train(resumed, tmp_path, 3) == expected
    assert_same_state(state(resumed), state(unbroken))
    told = f"{names(6)[0]} cannot be read: going back to the one before"
    assert told in capsys.readouterr().err


@pytest.mark.backend
def test_a_loss_that_is_no_number_ends_training(tmp_path):
    train(build(), tmp_path, 1)
    spoilt = NUMBERS.copy()
    spoilt[10] = math.nan
    batches = pairs(tf.data.Dataset.from_tensor_slices(spoilt).batch(8, True).repeat())
    data = TrainingData(batches=lambda first_step, steps: batches.batch(steps))
    with pytest.raises(
        VqbeamError,
        match="^test: the loss became nan at step 2 .*; start a new .* a lower learning rate",
    ):
        train(build(), tmp_path, 3, data=data)
    # The last good state is there, and no other.
    assert checkpoints(tmp_path) == names(3)


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
        assert Checkpoints(epath.Path(tmp_path / folder), ["f"], 3, 6).restore(restored) == 6
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


@pytest.mark.backend
def test_half_precision_keeps_an_average_too(tmp_path):
    model = build(**AVERAGING)
    inner = keras.optimizers.Adam(0.01, **AVERAGING)
    model.compile(keras.optimizers.LossScaleOptimizer(inner), loss="mse")
    history = train(model, tmp_path, 2)
    data = pairs(tf.data.Dataset.from_tensor_slices(NUMBERS).batch(7))
    assert history[-1]["val_loss"] == pytest.approx(model.evaluate(data, verbose=0), rel=1e-5)


def test_metrics_are_written_once_an_epoch_whatever_was_killed(tmp_path, tiny_config, monkeypatch):
    config = override(tiny_config(), {"log": "csv"})
    train(build(), tmp_path / "unbroken", 3, config=config)
    folder = tmp_path / "resumed"
    with broken_off(2):  # within the first epoch
        train(build(), folder, 3, config=config)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        # After the row of the second epoch is written, and before its checkpoint.
        save = Checkpoints._save
        patch.setattr(
            Checkpoints,
            "_save",
            lambda self, step, metrics: (kill if step == 6 else save)(self, step, metrics),
        )
        train(build(), folder, 3, config=config)
    assert len(rows(folder)) == 2
    history = train(build(), folder, 3, config=config)
    names = ["epoch", "step", *history[0], "learning_rate"]
    expected = [
        {"epoch": number, "step": 3 * number, **epoch, "learning_rate": np.float32(0.01)}
        for number, epoch in enumerate(history, 1)
    ]
    for of in (tmp_path / "unbroken", folder):
        found = [{name: float(row[name]) for name in names} for row in rows(of)]
        assert found == expected
    # TensorBoard shows the same, and how fast it was.
    for part in ("train", "validation"):
        shown = events(folder / "logs" / part)
        for row in expected:
            for name in history[0]:
                if name.startswith("val_") == (part == "validation"):
                    value = shown[f"epoch_{name.removeprefix('val_')}"][row["epoch"] - 1]
                    assert value == np.float32(row[name])
    assert "epoch_images_per_second" in events(folder / "logs" / "train")


def rows(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_without_being_asked_only_tensorboard_is_written(tmp_path, tiny_config):
    train(build(), tmp_path, 1, config=tiny_config())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "logs"]


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


def test_a_stored_model_has_its_weights_and_nothing_of_the_optimizer(tmp_path):
    model, path = build(), epath.Path(tmp_path) / "model.keras"
    train(model, tmp_path, 1)
    optimizer = model.optimizer
    save_model(model, path)
    assert model.optimizer is optimizer and len(optimizer.variables) > 5
    stored = []
    with zipfile.ZipFile(path) as archive:
        with h5py.File(io.BytesIO(archive.read("model.weights.h5"))) as content:
            content.visit(stored.append)
    assert stored and not [name for name in stored if "optimizer" in name]
    assert_same_state(load_model(path).get_weights(), model.get_weights())


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
    with pytest.raises(VqbeamError, match="model.keras cannot be read .* damaged, delete"):
        load_model(path)


def test_code_in_a_model_file_is_not_run(tmp_path):
    model = keras.Sequential([keras.Input((2,)), layers.Lambda(lambda x: x + 1)])
    path = epath.Path(tmp_path) / "model.keras"
    save_model(model, path)
    with pytest.raises(VqbeamError, match="cannot be read"):
        load_model(path)
