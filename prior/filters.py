"""Draws a code from its logits: temperature, filters, and a uniform number."""

import numpy as np
from keras import ops

from vqbeam.configs import SampleConfig

# Enough for an interval of 100 to shrink below the spacing of float32 logits.
HALVINGS = 40


def draw_codes(logits, uniform, temperature, top_k, top_p, min_p, *, filtered: bool):
    """Turns uniform numbers into codes, by inversion of the cumulative probabilities.

    The settings work in this order, each on what those before it leave: the temperature divides
    the logits; `top_k` keeps the k likeliest codes; `top_p` keeps the fewest of the likeliest
    codes whose probability is at least this (Holtzman et al., https://arxiv.org/abs/1904.09751);
    `min_p` keeps the codes whose probability is at least this share of the likeliest one's
    (Nguyen et al., https://arxiv.org/abs/2407.01082).

    Args:
        logits: float32 tensor [B, K].
        uniform: float32 tensor [B, 1] in [0, 1).
        temperature: float32 scalar from 0 up; 0 takes the likeliest code, whatever the filters.
        top_k: float32 scalar from 1 to K.
        top_p: float32 scalar in (0, 1].
        min_p: float32 scalar in [0, 1).
        filtered: Whether the last three are used.

    Returns:
        An int32 tensor [B, 1]: the first code whose cumulative probability is above `uniform`.
    """
    num_codes = logits.shape[-1]
    likeliest = ops.cast(ops.argmax(logits, axis=-1, keepdims=True), "int32")
    logits = logits - ops.max(logits, axis=-1, keepdims=True)
    weights = ops.exp(logits / ops.where(temperature > 0, temperature, 1.0))
    if filtered:
        weights = _keep_largest(weights, logits, ops.ones_like(logits), top_k)
        probabilities = weights / ops.sum(weights, axis=-1, keepdims=True)
        weights = _keep_largest(weights, logits, probabilities, top_p)
        # The likeliest code weighs 1.
        weights = ops.where(weights >= min_p, weights, 0.0)
    cumulative = ops.cumsum(weights, axis=-1)
    # XLA adds up in parallel, so that the sum may waver by a rounding where a weight is 0: such a
    # code must be passed over by name. A total times a number below 1 is below the total, even
    # when rounded, so there is always a code left.
    total = ops.max(cumulative * ops.cast(weights > 0, "float32"), axis=-1, keepdims=True)
    reached = (weights > 0) & (cumulative > uniform * total)
    code = ops.min(ops.where(reached, ops.arange(num_codes), num_codes), axis=-1, keepdims=True)
    return ops.where(temperature > 0, ops.cast(code, "int32"), likeliest)


def _keep_largest(weights, logits, shares, target):
    """Zeroes the weights of all but the fewest largest logits whose shares reach the target.

    Of equal logits the first are kept, as `argmax` does. Sorting would do the same, but XLA sorts
    slowly on a CPU: halving intervals takes a third of the time (benchmarks/choices.py).
    """

    def halve(_, interval):
        low, high = interval
        middle = (low + high) / 2
        share = ops.sum(ops.where(logits >= middle, shares, 0.0), axis=-1, keepdims=True)
        enough = share >= target
        return ops.where(enough, middle, low), ops.where(enough, high, middle)

    interval = [f(logits, axis=-1, keepdims=True) for f in (ops.min, ops.max)]
    low, _ = ops.fori_loop(0, HALVINGS, halve, tuple(interval))
    smallest = ops.min(ops.where(logits >= low, logits, np.inf), axis=-1, keepdims=True)
    above = logits > smallest
    missing = target - ops.sum(ops.where(above, shares, 0.0), axis=-1, keepdims=True)
    tied = ops.where(logits == smallest, shares, 0.0)
    first = (logits == smallest) & (ops.cumsum(tied, axis=-1) - tied < missing)
    return ops.where(above | first, weights, 0.0)


def guidance_scales(settings: SampleConfig, length: int) -> np.ndarray:
    """Returns the scale of classifier-free guidance at each position of a sequence of codes.

    "constant" is the scale s everywhere. "linear" goes from 1, no guidance, at the first position
    to s at the last: 1 + (s - 1) p / (T - 1). "interval" is s at those positions p whose share
    p / T lies in [start, end), and 1 elsewhere.

    Args:
        settings: Its `guidance`, `guidance_schedule`, `guidance_start` and `guidance_end` count.
        length: Codes T of an image.

    Returns:
        float32 [T].
    """
    scale = settings.guidance
    if settings.guidance_schedule == "linear":
        # One code alone is the last.
        return np.linspace(scale, 1, length, dtype="float32")[::-1]
    scales = np.full(length, scale, "float32")
    if settings.guidance_schedule == "interval":
        shares = np.arange(length) / length
        inside = (settings.guidance_start <= shares) & (shares < settings.guidance_end)
        return np.where(inside, scales, np.float32(1))
    return scales
