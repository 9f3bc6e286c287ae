"""The entropy loss: each vector sure of its code, all codes used alike."""

from keras import ops

from vqbeam.vqvae.fitting.replicas import mean_over_replicas

_SMALL = 1e-5


def entropy_loss(vectors, chosen, codebook):
    """Returns E[H(p)] − H(E[p]) in nats, where p is the soft assignment of a vector.

    As in section 3.1 of Yu et al. 2023 (https://arxiv.org/abs/2310.05737), with p the softmax of
    −‖z − e‖² in units of the mean squared distance to the code chosen, so that it is the same at
    any scale of z. The gradient reaches the vectors alone.

    Args:
        vectors: float32 [N, D].
        chosen: float32 [N, D], the code vector of each.
        codebook: float32 [K, D].
    """
    codebook = ops.stop_gradient(codebook)
    error = ops.mean(ops.sum(ops.square(ops.stop_gradient(vectors - chosen)), axis=1))
    unit = ops.maximum(mean_over_replicas(error), _SMALL)
    distances = (
        ops.sum(ops.square(vectors), axis=1, keepdims=True)
        - 2.0 * ops.matmul(vectors, ops.transpose(codebook))
        + ops.sum(ops.square(codebook), axis=1)
    )
    log_p = ops.log_softmax(-distances / unit, axis=1)
    p = ops.exp(log_p)
    mean_p = mean_over_replicas(ops.mean(p, axis=0))
    of_each = -ops.mean(ops.sum(p * log_p, axis=1))
    of_mean = -ops.sum(mean_p * ops.log(ops.maximum(mean_p, 1e-20)))
    return of_each - of_mean
