"""Data-parallel training over all devices that there are."""

import contextlib
import functools

import keras

from configs import VqbeamError


def device_count() -> int:
    """Returns how many devices train together: all accelerators, or else the CPU."""
    return len(keras.distribution.list_devices())


def evenly_shared(size: int) -> int:
    """Returns the largest number up to `size` that all devices can share, or else `size`."""
    return size - size % device_count() or size


@contextlib.contextmanager
def data_parallel(batch_size: int):
    """Lets a model that is built and trained in the block use all devices.

    Each device computes its share of every batch, and they agree on gradients and statistics
    before the step ends: the model is that of one device on the whole batch, up to rounding.
    CUDA_VISIBLE_DEVICES chooses among GPUs.

    Args:
        batch_size: Images in a batch, over all devices.

    Raises:
        VqbeamError: The devices cannot share a batch evenly.
    """
    devices = keras.distribution.list_devices()
    if batch_size % len(devices):
        raise VqbeamError(
            f"a batch of {batch_size} cannot be shared evenly by {len(devices)} devices; make it "
            "a multiple, or choose devices with CUDA_VISIBLE_DEVICES"
        )
    if len(devices) == 1:
        yield
    elif keras.backend.backend() == "tensorflow":
        with _mirrored_strategy(tuple(devices)).scope():
            yield
    else:
        with keras.distribution.DataParallel(devices=devices).scope():
            yield


@functools.cache
def _mirrored_strategy(devices: tuple[str, ...]):
    # Once in a process: a second strategy would number its reductions as the first did, which
    # TensorFlow takes for the same ones, and ends with an error.
    import tensorflow as tf

    return tf.distribute.MirroredStrategy([name.upper() for name in devices])
