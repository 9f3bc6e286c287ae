import keras
import numpy as np
import pytest
from keras import ops

from vqbeam.configs import VqbeamError
from vqbeam.vqvae.fitting.devices import compile_function, in_batches


@pytest.fixture
def scale():
    return keras.Variable(np.array(2.0, "float32"))


@pytest.mark.parametrize("jit", [False, pytest.param(True, marks=pytest.mark.backend)])
def test_sees_new_values_and_traces_once(compiled, scale, jit):
    traces = []

    def times_scale(x):
        traces.append(x.shape)
        return x * scale

    compiled = compile_function(times_scale, [scale], jit=jit)
    x = np.arange(3, dtype="float32")
    np.testing.assert_array_equal(ops.convert_to_numpy(compiled(x)), 2 * x)
    scale.assign(5.0)
    np.testing.assert_array_equal(ops.convert_to_numpy(compiled(x + 1)), 5 * (x + 1))
    assert traces == [(3,)]


@pytest.mark.backend
def test_takes_and_returns_several_tensors(scale):
    compiled = compile_function(lambda x, y: (x + y, {"scaled": y * scale}), [scale], jit=True)
    total, rest = compiled(np.float32([1, 2]), np.float32([3, 4]))
    np.testing.assert_array_equal(ops.convert_to_numpy(total), [4, 6])
    np.testing.assert_array_equal(ops.convert_to_numpy(rest["scaled"]), [6, 8])


@pytest.mark.backend
def test_layers_run_in_a_compiled_loop():
    layer = keras.layers.Dense(4)
    layer.build((None, 4))
    compiled = compile_function(
        lambda x: ops.fori_loop(0, 3, lambda _, y: layer(y), x), layer.weights, jit=True
    )
    x = np.eye(4, dtype="float32")
    expected = np.linalg.matrix_power(ops.convert_to_numpy(layer.kernel.value), 3)
    np.testing.assert_allclose(ops.convert_to_numpy(compiled(x)), expected, atol=1e-6)


def test_names_an_unknown_backend(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "torch")
    with pytest.raises(VqbeamError, match="KERAS_BACKEND is 'torch'; set it to"):
        compile_function(lambda x: x, [], jit=True)


def test_batches_are_all_of_one_size():
    seen = []
    rows = np.arange(14).reshape(7, 2)
    made = in_batches(lambda batch: seen.append(batch.shape) or batch + 1, rows, 3)
    np.testing.assert_array_equal(made, rows + 1)
    assert seen == [(3, 2)] * 3
