"""Compiles functions that read model weights, alike on TensorFlow and JAX."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from vqbeam.configs import VqbeamError


def compile_function(
    function: Callable[..., Any], variables: Sequence[keras.Variable], *, jit: bool
) -> Callable[..., Any]:
    """Returns a compiled form of a function that reads Keras variables and changes none.

    The weights stay inputs of the compiled program: a value assigned to one of `variables` later
    on is seen by the next call, and nothing is compiled anew.

    Args:
        function: Takes tensors, and returns a tensor or a nest of tensors. It is traced once for
            each combination of shapes and dtypes.
        variables: Every variable that `function` reads.
        jit: Whether TensorFlow compiles the graph with XLA, which pays where a function is called
            often or holds a loop. JAX always does.

    Returns:
        A function of the same tensors. Give it NumPy arrays or tensors, not Python numbers: on
        TensorFlow each new Python number is compiled anew. `keras.ops.convert_to_numpy` takes
        what it returns.

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
    """Returns a context in which GPUs multiply float32 without dropping digits (TF32).

    With fewer digits the nearest code is another one for some vectors, and the images of a seed
    depend on the batch. TensorFlow has one switch for the whole process, and none for a single
    product: there the context sets it for good, and what else the process computes in float32,
    training included, keeps its digits too.
    """
    if keras.backend.backend() == "jax":
        import jax

        return jax.default_matmul_precision("highest")
    import tensorflow as tf

    tf.config.experimental.enable_tensor_float_32_execution(False)
    return contextlib.nullcontext()


def compiled_encoder(model: keras.Model) -> Callable[[Any], Any]:
    """Returns the compiled `encode` of a VQ-VAE: uint8 [B, H, W, C] to codes int32 [B, *shape]."""
    return compile_function(model.encode, model.variables, jit=False)


def compiled_decoder(model: keras.Model) -> Callable[[Any], Any]:
    """Returns the compiled `decode` of a VQ-VAE: codes [B, *shape] to uint8 [B, H, W, C]."""
    return compile_function(model.decode, model.variables, jit=False)


def in_batches(function: Callable[[Any], Any], rows: np.ndarray, batch_size: int) -> np.ndarray:
    """Returns what a compiled function makes of rows, [N, ...] both, in padded batches of one size.

    So there is one shape to compile, and one result for a row, however many are left for it.
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

    # `jax.jit` copies what a function closes over into the program: weights go in as an argument.
    @jax.jit
    def pure(values, *tensors):
        state = zip(variables, values, strict=True)
        with keras.StatelessScope(state_mapping=state), full_precision():
            return function(*tensors)

    def compiled(*tensors):
        return pure([variable.value for variable in variables], *tensors)

    return compiled
