"""Data-parallel training on all available devices."""

import contextlib
import functools
import os
import pathlib

import keras

from vqbeam.configs import VqbeamError


def device_count() -> int:
    """Returns the number of devices used for training: all accelerators, or else the CPU."""
    return len(keras.distribution.list_devices())


# What the driver of NVIDIA has for each GPU.
_NVIDIA_GPUS = pathlib.Path("/proc/driver/nvidia/gpus")
_CUDA_PACKAGES = {"tensorflow": "tensorflow[and-cuda]", "jax": "jax[cuda12]"}


def describe_devices() -> str:
    """Returns the backend and devices used for training, and how to use a GPU that is not."""
    backend, devices = keras.backend.backend(), keras.distribution.list_devices()
    text = f"{', '.join(devices)} with {backend}"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if devices[0].startswith("cpu") and _NVIDIA_GPUS.is_dir() and not hidden:
        text += (
            f"\nthe GPU is not used: {backend} was installed without CUDA, or does not find it; "
            f'pip install "{_CUDA_PACKAGES[backend]}"'
        )
    return text


def evenly_shared(size: int) -> int:
    """Returns the largest multiple of the device count up to `size`, or `size` if that is 0."""
    return size - size % device_count() or size


@contextlib.contextmanager
def data_parallel(batch_size: int, dtype: str = "float32"):
    """A context in which a model is built and trained on all devices.

    Each device processes its share of every batch, and gradients and statistics are combined at
    each step. The result is the same as on one device, except for rounding and random numbers
    (dropout, and the vectors that replace dead codes). CUDA_VISIBLE_DEVICES selects GPUs.

    Args:
        batch_size: Images in a batch, over all devices.
        dtype: Keras dtype policy of the training.

    Raises:
        VqbeamError: The batch cannot be split evenly over the devices, or the dtype policy does
            not support several devices.
    """
    devices = keras.distribution.list_devices()
    if batch_size % len(devices):
        raise VqbeamError(
            f"a batch of {batch_size} cannot be divided among {len(devices)} devices; make it "
            "a multiple, or choose devices with CUDA_VISIBLE_DEVICES"
        )
    on_tensorflow = keras.backend.backend() == "tensorflow"
    if len(devices) > 1 and dtype == "mixed_float16" and on_tensorflow:
        # Keras checks for overflow on the first device only.
        raise VqbeamError(
            f"mixed_float16 does not train on {len(devices)} devices with TensorFlow; use "
            "mixed_bfloat16, or choose one device with CUDA_VISIBLE_DEVICES"
        )
    if len(devices) == 1:
        yield
    elif on_tensorflow:
        with _mirrored_strategy(tuple(devices)).scope():
            yield
    else:
        with keras.distribution.DataParallel(devices=devices).scope():
            yield


@functools.cache
def _mirrored_strategy(devices: tuple[str, ...]):
    # Only one per process: a second strategy would reuse the reduction keys of the first, which is
    # an error in TensorFlow.
    import tensorflow as tf

    return tf.distribute.MirroredStrategy([name.upper() for name in devices])


def sum_over_replicas(*tensors):
    """Returns each tensor summed over the replicas."""
    context = _replica_context()
    if context is None:
        return tensors
    import tensorflow as tf

    return tuple(context.all_reduce(tf.distribute.ReduceOp.SUM, list(tensors)))


def mean_over_replicas(tensor):
    """Returns the mean of a tensor over the replicas; the gradient flows back to all of them."""
    context = _replica_context()
    if context is None:
        return tensor
    import tensorflow as tf

    return context.all_reduce(tf.distribute.ReduceOp.MEAN, tensor)


def from_first_replica(tensor):
    """Returns the tensor of replica 0 on every replica."""
    context = _replica_context()
    if context is None:
        return tensor
    import tensorflow as tf

    is_first = tf.cast(context.replica_id_in_sync_group == 0, tensor.dtype)
    return context.all_reduce(tf.distribute.ReduceOp.SUM, tensor * is_first)


def share_of_replica(tensor):
    """Returns the tensor divided by the number of replicas, so that the sum is their mean."""
    context = _replica_context()
    return tensor if context is None else tensor / context.num_replicas_in_sync


def _replica_context():
    """Returns TensorFlow's replica context, or None unless there are several replicas."""
    if keras.backend.backend() != "tensorflow":
        return None
    import tensorflow as tf

    context = tf.distribute.get_replica_context()
    return context if context and context.num_replicas_in_sync > 1 else None
