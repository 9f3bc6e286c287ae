"""Gradient estimators, which pass the gradient of the quantized vectors on to the input z."""

from keras import ops

_SMALL = 1e-6


def straight_through(z, quantized):
    """Returns the value of `quantized`, with an identity gradient to `z`.

    The straight-through estimator of Bengio et al. 2013 (https://arxiv.org/abs/1308.3432), as used
    in section 3.2 of van den Oord et al. 2017: z + sg(e − z).
    """
    return z + ops.stop_gradient(quantized - z)


def rotation_trick(z, quantized):
    """Returns the value of `quantized`, with the gradient of the rotation that maps z to it.

    From Fifty et al. 2024 (https://arxiv.org/abs/2410.06424), section 4.2. Let û and q̂ be the
    directions of z and e, and w the direction of û + q̂. Then
    e = ‖e‖/‖z‖ · (z − 2 (z·w) w + 2 (z·û) q̂), where everything but z is held constant. This
    preserves the angle between gradient and vector; straight-through preserves the gradient's
    direction.

    Args:
        z: float32 [..., D].
        quantized: float32 [..., D].
    """
    z_length, e_length = _length(ops.stop_gradient(z)), _length(ops.stop_gradient(quantized))
    u = ops.stop_gradient(z) / z_length
    q = ops.stop_gradient(quantized) / e_length
    w = (u + q) / _length(u + q)
    rotated = z - 2 * _dot(z, w) * w + 2 * _dot(z, u) * q
    rotated = rotated * (e_length / z_length)
    # The rotation is inexact where a length is below _SMALL; this makes the value exactly e.
    return rotated + ops.stop_gradient(quantized - rotated)


def diveq(z, quantized):
    """Returns the value of `quantized`, with a gradient to `z` orthogonal to the error.

    From Vali et al. 2025 (https://arxiv.org/abs/2509.26469), without the noise: e = z + ‖e − z‖ u,
    where the error direction u and, unlike in the paper, e are held constant. The gradient for z
    is that for e without its component along u: moving z along u changes the length of the error,
    but neither e nor the reconstruction.

    Args:
        z: float32 [..., D].
        quantized: float32 [..., D].
    """
    error = ops.stop_gradient(quantized - z)
    direction = error / _length(error)
    across = z - _dot(z, direction) * direction
    return across + ops.stop_gradient(quantized - across)


def no_estimator(z, quantized):
    """Returns the value of `quantized`, without any gradient.

    A baseline for `vqbeam gradients`, not available as a training setting.
    """
    del z
    return ops.stop_gradient(quantized)


def _length(vectors):
    return ops.maximum(ops.sqrt(_dot(vectors, vectors)), _SMALL)


def _dot(a, b):
    return ops.sum(a * b, axis=-1, keepdims=True)


ESTIMATORS = {
    "straight_through": straight_through,
    "rotation": rotation_trick,
    "diveq": diveq,
    "none": no_estimator,
}
