"""The devices: data-parallel training, and functions compiled for them."""

import contextlib
import functools
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from vqbeam.configs import VqbeamError


def device_count() -> int:
    """Returns the number of devices used for training: all accelerators, or else the CPU."""
    return len(keras.distribution.list_devices())


def on_cpu() -> bool:
    """Returns whether there is no accelerator."""
    return keras.distribution.list_devices()[0].startswith("cpu")


# NVIDIA's driver has a folder here for each GPU.
_NVIDIA_GPUS = pathlib.Path("/proc/driver/nvidia/gpus")
_CUDA_PACKAGES = {"tensorflow": "tensorflow[and-cuda]", "jax": "jax[cuda12]"}


def describe_devices() -> str:
    """Returns a text with backend and devices, and with advice if there is a GPU not in use."""
    backend, devices = keras.backend.backend(), keras.distribution.list_devices()
    text = f"{', '.join(devices)} with {backend}"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if on_cpu() and _NVIDIA_GPUS.is_dir() and not hidden:
        text += (
            f"\nthe GPU is not used: {backend} was installed without CUDA, or does not find it; "
            f'pip install "{_CUDA_PACKAGES[backend]}"'
        )
    return text


def device_memory() -> int | None:
    """Returns the memory of the first device in bytes, or None if it is the CPU."""
    if keras.backend.backend() == "jax":
        return _jax_memory().get("bytes_limit")
    # TensorFlow does not report it. Few GPUs used for training have less than 16 GiB.
    return None if on_cpu() else 2**34


def peak_memory() -> int | None:
    """Returns the peak memory use of the first device in bytes, or None on a CPU."""
    if keras.backend.backend() == "jax":
        return _jax_memory().get("peak_bytes_in_use")
    import tensorflow as tf

    return None if on_cpu() else tf.config.experimental.get_memory_info("GPU:0")["peak"]


def _jax_memory() -> dict[str, int]:
    import jax

    return jax.local_devices()[0].memory_stats() or {}


# Operations per second of dense matrix products in bfloat16, from NVIDIA's data sheets.
_PEAK_FLOPS = {
    "B200": 2250e12,
    "H200 NVL": 835e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "T4": 65e12,  # float16
    "RTX 5090": 210e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def peak_flops() -> float | None:
    """Returns the peak operations per second of all devices in bfloat16, or None if unknown."""
    # As whole words: an RTX A1000 is no A100, and the laptop's RTX 4090 is another one.
    words = f" {_device_name().replace('-', ' ')} "
    if " Laptop " in words:
        return None
    known = [flops for model, flops in _PEAK_FLOPS.items() if f" {model} " in words]
    return known[0] * device_count() if known else None


def _device_name() -> str:
    if keras.backend.backend() == "jax":
        import jax

        return jax.local_devices()[0].device_kind
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    return tf.config.experimental.get_device_details(gpus[0])["device_name"] if gpus else ""


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
            f"a batch of {batch_size} cannot be divided evenly among {len(devices)} devices; make "
            f"batch_size (for the prior, batch_size / grad_accumulation) a multiple of "
            f"{len(devices)}, or choose devices with CUDA_VISIBLE_DEVICES"
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
    """Returns the tensor divided by the number of replicas: the sum over them is then the mean."""
    context = _replica_context()
    return tensor if context is None else tensor / context.num_replicas_in_sync


def _replica_context():
    """Returns TensorFlow's replica context, or None unless there are several replicas."""
    if keras.backend.backend() != "tensorflow":
        return None
    import tensorflow as tf

    context = tf.distribute.get_replica_context()
    return context if context and context.num_replicas_in_sync > 1 else None


def compile_function(
    function: Callable[..., Any], variables: Sequence[keras.Variable], *, jit: bool
) -> Callable[..., Any]:
    """Returns a compiled version of a function that reads Keras variables but assigns none.

    The weights are inputs of the compiled program, so later assignments to `variables` take effect
    without recompilation.

    Args:
        function: Takes tensors and returns a tensor or a nested structure of tensors. It is traced
            once for each combination of shapes and dtypes.
        variables: All variables that `function` reads.
        jit: Whether TensorFlow compiles the graph with XLA, which is worthwhile for functions that
            are called often or contain a loop. JAX always uses XLA.

    Returns:
        A function of the same tensors. Pass NumPy arrays or tensors, not Python numbers, since
        TensorFlow retraces for each new Python number. Results can be passed to
        `keras.ops.convert_to_numpy`.

    Raises:
        VqbeamError: The Keras backend is neither TensorFlow nor JAX.
    """
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        full_precision()
        return tf.function(function, jit_compile=jit, reduce_retracing=False, autograph=False)
    if backend == "jax":
        return _jit_with_weights(function, list(variables))
    raise VqbeamError(f"KERAS_BACKEND is {backend!r}; set it to tensorflow or jax")


def full_precision():
    """Returns a context manager that disables TF32, so GPUs multiply float32 in full precision.

    TF32 would change the nearest code of some vectors and make the samples of a seed depend on
    the batch. TensorFlow has only a process-wide switch: there, TF32 stays off after the context
    ends, for training as well.
    """
    if keras.backend.backend() == "jax":
        import jax

        return jax.default_matmul_precision("highest")
    import tensorflow as tf

    tf.config.experimental.enable_tensor_float_32_execution(False)
    return contextlib.nullcontext()


def compiled_encoder(model: keras.Model) -> Callable[[Any], Any]:
    """Returns a VQ-VAE's compiled `encode`: images uint8 [B, H, W, C] to int32 [B, *shape]."""
    return compile_function(model.encode, model.variables, jit=False)


def compiled_decoder(model: keras.Model) -> Callable[[Any], Any]:
    """Returns a VQ-VAE's compiled `decode`: codes [B, *shape] to images uint8 [B, H, W, C]."""
    return compile_function(model.decode, model.variables, jit=False)


def in_batches(function: Callable[[Any], Any], rows: np.ndarray, batch_size: int) -> np.ndarray:
    """Returns the results [N, ...] of a compiled function for rows [N, ...], N at least 1.

    The rows are passed in batches. The last batch is padded, so that only one shape is compiled and
    results do not depend on N.
    """
    made = []
    for first in range(0, len(rows), batch_size):
        batch = rows[first : first + batch_size]
        padded = np.pad(batch, ((0, batch_size - len(batch)), *[(0, 0)] * (batch.ndim - 1)))
        made.append(keras.ops.convert_to_numpy(function(padded))[: len(batch)])
    return np.concatenate(made)


def _jit_with_weights(
    function: Callable[..., Any], variables: list[keras.Variable]
) -> Callable[..., Any]:
    import jax

    # Weights are arguments because `jax.jit` would embed captured values as constants.
    @jax.jit
    def pure(values, *tensors):
        state = zip(variables, values, strict=True)
        with keras.StatelessScope(state_mapping=state), full_precision():
            return function(*tensors)

    def compiled(*tensors):
        return pure([variable.value for variable in variables], *tensors)

    return compiled
