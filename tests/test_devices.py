import keras
import pytest

from vqbeam.configs import VqbeamError
from vqbeam.vqvae.fitting import devices as module
from vqbeam.vqvae.fitting.devices import data_parallel, describe_devices, device_count


@pytest.mark.backend
def test_one_device_needs_nothing():
    with data_parallel(7):
        assert keras.distribution.distribution() is None
        if keras.backend.backend() == "tensorflow":
            import tensorflow as tf

            assert not tf.distribute.has_strategy()


def test_device_count(monkeypatch):
    assert device_count() == len(keras.distribution.list_devices())
    monkeypatch.setattr(keras.distribution, "list_devices", lambda: ["gpu:0", "gpu:1", "gpu:2"])
    assert device_count() == 3


def test_float16_on_several_devices_is_refused(monkeypatch):
    monkeypatch.setattr(keras.distribution, "list_devices", lambda: ["gpu:0", "gpu:1"])
    monkeypatch.setattr(keras.backend, "backend", lambda: "tensorflow")
    message = "mixed_float16 does not train on 2 devices with TensorFlow; use mixed_bfloat16, or"
    with pytest.raises(VqbeamError, match=message), data_parallel(64, "mixed_float16"):
        raise AssertionError("the block was entered")


def test_a_batch_that_devices_cannot_share_is_refused(monkeypatch):
    monkeypatch.setattr(keras.distribution, "list_devices", lambda: ["gpu:0", "gpu:1", "gpu:2"])
    message = "a batch of 64 cannot be divided evenly among 3 devices; make batch_size"
    with pytest.raises(VqbeamError, match=message), data_parallel(64):
        raise AssertionError("the block was entered")


@pytest.mark.parametrize(
    ("devices", "hidden", "there"),
    [
        pytest.param(["cpu:0"], None, True, marks=pytest.mark.backend),
        (["cpu:0"], "0", True),
        (["cpu:0"], "", True),
        (["cpu:0"], "-1", True),
        (["cpu:0"], None, False),
        (["gpu:0", "gpu:1"], None, True),
    ],
)
def test_a_gpu_that_is_not_used_is_named(monkeypatch, tmp_path, devices, hidden, there):
    monkeypatch.setattr(keras.distribution, "list_devices", lambda: devices)
    monkeypatch.setattr(module, "_NVIDIA_GPUS", tmp_path if there else tmp_path / "none")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    first, *advice = describe_devices().splitlines()
    backend = keras.backend.backend()
    assert first == f"{', '.join(devices)} with {backend}"
    if devices == ["cpu:0"] and there and hidden in (None, "0"):
        assert advice[0].startswith("the GPU is not used: ")
        extra = {"tensorflow": "tensorflow[and-cuda]", "jax": "jax[cuda12]"}[backend]
        assert advice[0].endswith(f'pip install "{extra}"')
    else:
        assert not advice


@pytest.mark.parametrize(
    "name, flops",
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA RTX A1000", None),
        ("cpu", None),
    ],
)
def test_peak_of_known_devices(monkeypatch, name, flops):
    monkeypatch.setattr(module, "_device_name", lambda: name)
    assert module.peak_flops() == flops
    monkeypatch.setattr(keras.distribution, "list_devices", lambda: ["gpu:0", "gpu:1"])
    assert module.peak_flops() == (flops and 2 * flops)


@pytest.mark.backend
def test_a_cpu_has_no_memory_of_its_own_and_no_known_peak():
    found = module.device_memory(), module.peak_memory(), module.peak_flops()
    assert found == (None, None, None)
