import keras
import numpy as np
import pytest
import tensorflow as tf

from vqbeam.configs import VqbeamError
from vqbeam.vqvae.fitting import program as module
from vqbeam.vqvae.fitting.data import TrainingData, training_data
from vqbeam.vqvae.fitting.program import steps_per_call, training_program

NUMBERS = np.random.default_rng(0).normal(size=(20, 5)).astype("float32")
STEPS = 12


def build():
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(3, "relu"), keras.layers.Dense(1)]
    )
    model.compile(keras.optimizers.Adam(0.01), loss="mse")
    model.evaluate(NUMBERS[:, :4], NUMBERS[:, 4:], verbose=0)  # builds what Keras's loss needs
    return model


def held_data():
    return training_data(
        tf.data.Dataset.from_tensor_slices({"numbers": NUMBERS}),
        size=len(NUMBERS),
        batch_size=8,
        seed=0,
        numbers=lambda seed, count: {"scale": tf.random.stateless_uniform([count, 1], seed)},
        prepare=lambda batch: (batch["numbers"][:, :4] * batch["scale"], batch["numbers"][:, 4:]),
    )


class Logs(keras.callbacks.Callback):
    """Remembers what callbacks are told."""

    def __init__(self):
        super().__init__()
        self.steps, self.losses = [], []

    def on_train_batch_end(self, batch, logs=None):
        self.steps.append(batch)
        self.losses.append(float(logs["loss"]))


def trained(data, together):
    model, logs = build(), Logs()
    with training_program(model, data, together) as program:
        history = model.fit(
            program.batches(0),
            epochs=2,
            steps_per_epoch=STEPS,
            callbacks=[logs],
            shuffle=False,
            verbose=0,
        )
    return model, logs, history.history["loss"]


@pytest.fixture(scope="module")
def one_by_one():
    return trained(held_data(), 1)


@pytest.mark.slow
@pytest.mark.parametrize("together", [pytest.param(6, marks=pytest.mark.backend), 12])
def test_steps_together_train_as_one_by_one(one_by_one, together):
    expected, _, losses = one_by_one
    model, logs, found = trained(held_data(), together)
    np.testing.assert_allclose(found, losses, rtol=1e-5)
    for one, other in zip(expected.weights, model.weights, strict=True):
        np.testing.assert_allclose(np.asarray(other), np.asarray(one), rtol=1e-4, atol=1e-6)
    assert logs.steps == list(range(together - 1, STEPS, together)) * 2
    assert int(np.asarray(model.optimizer.iterations)) == 2 * STEPS


@pytest.mark.backend
@pytest.mark.slow
def test_training_is_that_of_keras(one_by_one):
    expected, logs, _ = one_by_one
    model, inputs = build(), held_data().inputs()
    losses = [float(model.train_on_batch(*next(inputs))) for _ in range(2 * STEPS)]
    # `fit` reports means over the epoch so far.
    means = np.cumsum(np.reshape(losses, (2, STEPS)), axis=1) / np.arange(1, STEPS + 1)
    np.testing.assert_allclose(logs.losses, means.ravel(), rtol=1e-5)
    for one, other in zip(expected.weights, model.weights, strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_nothing_of_the_data_stays_with_the_model(one_by_one):
    model, _, _ = one_by_one
    assert model.train_function is None and model.steps_per_execution == 1
    # It trains on other data after that.
    model.fit(NUMBERS[:, :4], NUMBERS[:, 4:], verbose=0)


@pytest.mark.backend
@pytest.mark.slow
def test_the_program_is_compiled_once(compiled):
    traces = []

    def prepare(batch):
        traces.append(1)
        return batch["numbers"][:, :4], batch["numbers"][:, 4:]

    held = held_data()
    data = TrainingData(batches=held.batches, held=held.held, prepare=prepare)
    trained(data, 4)
    # TensorFlow traces the body of its loop a second time, and one step to count its operations.
    assert 1 <= len(traces) <= 3


class Watch(keras.callbacks.Callback):
    """Counts what is compiled, and refuses what is sent unasked, in all calls but the first."""

    def __init__(self):
        super().__init__()
        self.calls, self.watching, self.compiled = 0, False, []

    def on_train_batch_begin(self, batch, logs=None):
        import jax

        self.calls += 1
        self.watching = self.calls > 1
        if self.watching:
            jax.config.update("jax_transfer_guard_host_to_device", "disallow")

    def on_train_batch_end(self, batch, logs=None):
        import jax

        jax.config.update("jax_transfer_guard_host_to_device", "allow")
        self.watching = False

    def count(self, event, seconds, **_):
        if self.watching and "backend_compile" in event:
            self.compiled.append(event)


@pytest.mark.backend
@pytest.mark.slow
@pytest.mark.skipif(keras.backend.backend() != "jax", reason="JAX counts what it compiles")
def test_a_call_sends_row_numbers_and_compiles_nothing(monkeypatch):
    import jax

    sent, put, watch = [], jax.device_put, Watch()
    monkeypatch.setattr(jax, "device_put", lambda array: sent.append(array) or put(array))
    jax.monitoring.register_event_duration_secs_listener(watch.count)
    model = build()
    with training_program(model, held_data(), 20) as program:
        assert [array.shape for array in sent] == [NUMBERS.shape]
        sent.clear()
        fitting = dict(epochs=2, steps_per_epoch=100, shuffle=False, verbose=0)
        model.fit(program.batches(0), callbacks=[watch], **fitting)
    assert watch.calls == 10 and watch.compiled == []
    assert {(array.dtype.name, array.shape) for array in sent} == {
        ("int32", (20 * 8,)),
        ("float32", (20 * 8, 1)),
    }
    assert len(sent) == 2 * watch.calls


@pytest.mark.slow
@pytest.mark.backend
@pytest.mark.skipif(keras.backend.backend() != "jax", reason="of JAX's plugins for GPUs")
def test_operations_of_a_step_on_a_gpu(monkeypatch):
    from jax._src import xla_bridge

    flops = []
    for is_plugin in (False, True):
        monkeypatch.setattr(xla_bridge, "using_pjrt_c_api", lambda *_, found=is_plugin: found)
        model = build()
        with training_program(model, held_data(), 2) as program:
            model.fit(program.batches(0), steps_per_epoch=4, shuffle=False, verbose=0)
        flops.append(program.flops)
    assert flops[0] == flops[1] > 0


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="of TensorFlow's variables")
def test_whole_numbers_are_held_where_a_gpu_can_read_them(monkeypatch):
    model, made, variable = build(), [], tf.Variable
    data = TrainingData(batches=held_data().batches, held={"codes": np.arange(12, dtype="int32")})
    with monkeypatch.context() as patched:
        patched.setattr(tf, "Variable", lambda *a, **k: made.append(variable(*a, **k)) or made[-1])
        with training_program(model, data, 1):
            pass
    assert [held.dtype for held in made] == [tf.int64]
    taken = data.input({"rows": np.array([3, 1])}, {"codes": made[0]})["codes"]
    assert taken.dtype == tf.int32 and taken.numpy().tolist() == [3, 1]


@pytest.mark.slow
@pytest.mark.parametrize("together", [1, pytest.param(4, marks=pytest.mark.backend)])
def test_operations_of_a_step(compiled, together):
    model = build()
    with training_program(model, held_data(), together) as program:
        assert program.flops is None
        model.fit(program.batches(0), steps_per_epoch=4, shuffle=False, verbose=0)
    # Products of both layers, forward and backward, but for the gradient of the first one's input.
    products = 2 * 8 * (3 * (4 * 3 + 3 * 1) - 4 * 3)
    assert products < program.flops < 3 * products


@pytest.mark.backend
@pytest.mark.skipif(keras.backend.backend() != "jax", reason="TensorFlow does not tell")
def test_too_little_memory_is_told_before_training(monkeypatch):
    monkeypatch.setattr(module, "device_memory", lambda: 500)
    message = r"training needs 0.0 GiB for weights.* and 0.0 GiB for a step, and the device has 0"
    with pytest.raises(VqbeamError, match=message):
        trained(held_data(), 1)
    monkeypatch.setattr(module, "device_memory", lambda: 2**30)
    trained(held_data(), 1)


@pytest.mark.parametrize("device, steps", [("cpu:0", 1), ("gpu:0", 100)])
def test_steps_of_a_call(monkeypatch, device, steps):
    monkeypatch.setattr(module.keras.distribution, "list_devices", lambda: [device])
    assert steps_per_call(500) == steps


def test_steps_of_a_call_divide_an_epoch(monkeypatch):
    monkeypatch.setattr(module.keras.distribution, "list_devices", lambda: ["gpu:0"])
    assert [steps_per_call(n) for n in (1, 60, 391, 7 * 13, 202)] == [1, 60, 23, 91, 2]
