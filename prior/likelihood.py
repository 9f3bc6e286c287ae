"""Log-likelihood of given codes under a prior."""

from collections.abc import Callable

import keras
import numpy as np
from keras import ops

from vqbeam.prior.transformer import CodePrior
from vqbeam.vqvae.fitting.compilation import compile_function

# Codes, int [B, *layout.shape], and labels, int [B] or [B, A], to nats, float32 [B]; all NumPy.
Score = Callable[[np.ndarray, np.ndarray], np.ndarray]


def code_scorer(prior: CodePrior, counted: np.ndarray | None = None) -> Score:
    """Returns a compiled function from codes and labels to the log-likelihood of the codes.

    The log-likelihood is the sum over positions of log p(code | label, previous codes), in nats.

    Args:
        prior: The prior.
        counted: Bool [*layout.shape], the positions to include; all by default.
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
