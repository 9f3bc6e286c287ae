"""Data-parallel training over all devices that there are."""

import contextlib
import functools

import keras

from vqbeam.configs import VqbeamError


def device_count() -> int:
    """Returns how many devices train together: all accelerators, or else the CPU."""
    return len(keras.distribution.list_devices())


def evenly_shared(size: int) -> int:
    """Returns the largest number up to `size` that all devices can share, or else `size`."""
    return size - size % device_count() or size


@contextlib.contextmanager
def data_parallel(batch_size: int, dtype: str = "float32"):
    """Lets a model that is built and trained in the block use all devices.

    Each device computes its share of every batch, and they agree on gradients and statistics
    before the step ends: the model is that of one device on the whole batch, up to rounding and
    to what is drawn at random (dropout, and the vectors on which dead codes are restarted).
    CUDA_VISIBLE_DEVICES chooses among GPUs.

    Args:
        batch_size: Images in a batch, over all devices.
        dtype: The policy that is trained in.

    Raises:
        VqbeamError: The devices cannot share a batch evenly, or not in this precision.
    """
    devices = keras.distribution.list_devices()
    if batch_size % len(devices):
        raise VqbeamError(
            f"a batch of {batch_size} cannot be shared evenly by {len(devices)} devices; make it "
            "a multiple, or choose devices with CUDA_VISIBLE_DEVICES"
        )
    on_tensorflow = keras.backend.backend() == "tensorflow"
    if len(devices) > 1 and dtype == "mixed_float16" and on_tensorflow:
        # Keras looks for an overflow on the first of them alone, and takes the others' for numbers.
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
    # Once in a process: a second strategy would number its reductions as the first did, which
    # TensorFlow takes for the same ones, and ends with an error.
    import tensorflow as tf

    return tf.distribute.MirroredStrategy([name.upper() for name in devices])


def sum_over_replicas(*tensors):
    """Returns each tensor added up over the replicas."""
    context = _replica_context()
    if context is None:
        return tensors
    import tensorflow as tf

    return tuple(context.all_reduce(tf.distribute.ReduceOp.SUM, list(tensors)))


def mean_over_replicas(tensor):
    """Returns the mean of a tensor over the replicas; its gradient reaches all of them."""
    context = _replica_context()
    if context is None:
        return tensor
    import tensorflow as tf

    return context.all_reduce(tf.distribute.ReduceOp.MEAN, tensor)


def from_first_replica(tensor):
    """Returns the tensor of replica 0 on all of them."""
    context = _replica_context()
    if context is None:
        return tensor
    import tensorflow as tf

    is_first = tf.cast(context.replica_id_in_sync_group == 0, tensor.dtype)
    return context.all_reduce(tf.distribute.ReduceOp.SUM, tensor * is_first)


def share_of_replica(tensor):
    """Returns what a replica must give for the sum over replicas to be their mean."""
    context = _replica_context()
    return tensor if context is None else tensor / context.num_replicas_in_sync


def _replica_context():
    """Returns TensorFlow's replica context where there are several replicas."""
    if keras.backend.backend() != "tensorflow":
        return None
    import tensorflow as tf

    context = tf.distribute.get_replica_context()
    return context if context and context.num_replicas_in_sync > 1 else None
