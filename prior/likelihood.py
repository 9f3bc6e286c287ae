"""How likely a prior finds codes that are given."""

from collections.abc import Callable

import keras
import numpy as np
from keras import ops

from vqbeam.prior.transformer import CodePrior
from vqbeam.vqvae.fitting.compilation import compile_function

# From codes int [B, *layout.shape] and labels int [B] to nats float32 [B], all NumPy.
Score = Callable[[np.ndarray, np.ndarray], np.ndarray]


def code_scorer(prior: CodePrior, counted: np.ndarray | None = None) -> Score:
    """Returns a compiled function from codes and labels to the log-likelihood of the codes.

    It is the sum over positions of log p(code | label, codes before it), in nats, 0 at most.

    Args:
        prior: The prior.
        counted: Bool [*layout.shape], the positions that count; all of them by default.
    """
    weights = np.ones(prior.layout.length, "float32")
    if counted is not None:
        weights = np.reshape(counted, -1).astype("float32")

    def score(codes, labels):
        logits = prior({"codes": codes, "labels": labels}, training=False)
        flat = ops.reshape(codes, (-1, prior.layout.length))
        losses = keras.losses.sparse_categorical_crossentropy(flat, logits, from_logits=True)
        return -ops.sum(weights * losses, axis=-1)

    compiled = compile_function(score, prior.variables, jit=False)
    return lambda codes, labels: ops.convert_to_numpy(compiled(codes, labels))
