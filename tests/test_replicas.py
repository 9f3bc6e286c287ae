import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest

from vqbeam.vqvae.fitting.devices import (
    from_first_replica,
    mean_over_replicas,
    share_of_replica,
    sum_over_replicas,
)


def test_one_device_has_nothing_to_agree_on():
    x = np.arange(3.0)
    assert all(a is x for a in sum_over_replicas(x, x))
    for function in (from_first_replica, mean_over_replicas, share_of_replica):
        assert function(x) is x


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="replicas are TensorFlow's")
def test_replicas_in_numpy(monkeypatch):
    import tensorflow as tf

    class Context:
        """Three replicas with the same tensors."""

        num_replicas_in_sync = 3
        replica_id_in_sync_group = 1

        def all_reduce(self, op, tensors):
            total = {"SUM": 3.0, "MEAN": 1.0}[op.name]
            return tf.nest.map_structure(lambda tensor: total * tensor, tensors)

    monkeypatch.setattr(tf.distribute, "get_replica_context", Context)
    x = tf.constant([1.0, 2.0])
    np.testing.assert_array_equal(sum_over_replicas(x, 2 * x)[1], [6, 12])
    np.testing.assert_array_equal(mean_over_replicas(x), [1, 2])
    np.testing.assert_allclose(share_of_replica(x), [1 / 3, 2 / 3])
    np.testing.assert_array_equal(from_first_replica(x), [0, 0])
    Context.replica_id_in_sync_group = 0
    np.testing.assert_array_equal(from_first_replica(x), [3, 6])


@pytest.mark.system
@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_two_devices_train_as_one(tmp_path, backend):
    program = pathlib.Path(__file__).parent / "two_devices.py"
    environment = os.environ | {"KERAS_BACKEND": backend, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-6000:]}"
