"""How a gradient passes the quantizer, which has none: from the quantized vector to z."""

from keras import ops

_SMALL = 1e-6


def straight_through(z, quantized):
    """Returns `quantized` in value, with the gradient of the identity on `z`.

    The estimator of Bengio et al. 2013 (https://arxiv.org/abs/1308.3432), as used in section 3.2
    of van den Oord et al. 2017: z + sg(e − z).
    """
    return z + ops.stop_gradient(quantized - z)


def rotation_trick(z, quantized):
    """Returns `quantized` in value, with the gradient of the rotation that takes z to it.

    From Fifty et al. 2024 (https://arxiv.org/abs/2410.06424), section 4.2: with û, q̂ the
    directions of z and e, and w that of their sum, e = ‖e‖/‖z‖ · (z − 2 (z·w) w + 2 (z·û) q̂),
    where all but z are constants. The angle between gradient and vector stays as it was, where
    the straight-through estimator keeps the gradient's direction.

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
    # Where a length is next to nothing, the rotation is not whole; the value is e in any case.
    return rotated + ops.stop_gradient(quantized - rotated)


def diveq(z, quantized):
    """Returns `quantized` in value, with the gradient on `z` across the error alone.

    From Vali et al. 2025 (https://arxiv.org/abs/2509.26469), without the noise: e = z + ‖e − z‖ u,
    where the direction u of the error and, unlike there, e are constants. The gradient at z is that
    at e less its part along u: a step of z that way makes the error longer or shorter, but e is
    as it was, and so is what the decoder makes of it.

    Args:
        z: float32 [..., D].
        quantized: float32 [..., D].
    """
    error = ops.stop_gradient(quantized - z)
    direction = error / _length(error)
    across = z - _dot(z, direction) * direction
    return across + ops.stop_gradient(quantized - across)


def no_estimator(z, quantized):
    """Returns `quantized` in value, with no gradient to anything.

    No model trains with it: it is what `vqbeam gradients` sets beside the others. It closes the
    one path that they open, and opens none to the codebook, which they have not either.
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
