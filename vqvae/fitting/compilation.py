"""Compiles functions that read model weights, on TensorFlow or JAX."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from vqbeam.configs import VqbeamError


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
    """Returns the results, [N, ...], of a compiled function for rows [N, ...], batch by batch.

    The last batch is padded, so only one shape is compiled, and results do not depend on N.
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
