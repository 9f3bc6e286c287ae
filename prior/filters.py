"""Sampling of a code from its logits (temperature, top-k, top-p, min-p) and guidance schedules."""

import numpy as np
from keras import ops

from vqbeam.configs import SampleConfig

# Enough to shrink an interval of 100 below the spacing of float32 logits.
HALVINGS = 40


def draw_codes(logits, uniform, temperature, top_k, top_p, min_p, *, filtered: bool):
    """Samples one code per row by inverse transform sampling.

    The settings are applied in this order, each to the remaining codes: the temperature divides
    the logits; `top_k` keeps the k most likely codes; `top_p` keeps the smallest set of most likely
    codes with at least this total probability (Holtzman et al., https://arxiv.org/abs/1904.09751);
    `min_p` keeps the codes with at least this fraction of the highest probability (Nguyen et al.,
    https://arxiv.org/abs/2407.01082).

    Args:
        logits: float32 tensor [B, K].
        uniform: Uniform random numbers, float32 tensor [B, 1] in [0, 1).
        temperature: float32 scalar, at least 0; 0 takes the most likely code, ignoring the filters.
        top_k: float32 scalar from 1 to K.
        top_p: float32 scalar in (0, 1].
        min_p: float32 scalar in [0, 1).
        filtered: Whether to apply `top_k`, `top_p` and `min_p`.

    Returns:
        An int32 tensor [B, 1]: the first code whose cumulative probability exceeds `uniform`.
    """
    num_codes = logits.shape[-1]
    likeliest = ops.cast(ops.argmax(logits, axis=-1, keepdims=True), "int32")
    logits = logits - ops.max(logits, axis=-1, keepdims=True)
    weights = ops.exp(logits / ops.where(temperature > 0, temperature, 1.0))
    if filtered:
        weights = _keep_largest(weights, logits, ops.ones_like(logits), top_k)
        probabilities = weights / ops.sum(weights, axis=-1, keepdims=True)
        weights = _keep_largest(weights, logits, probabilities, top_p)
        # The most likely code has weight 1.
        weights = ops.where(weights >= min_p, weights, 0.0)
    cumulative = ops.cumsum(weights, axis=-1)
    # XLA sums in parallel, so rounding can change the cumulative sum even where a weight is 0; such
    # codes are excluded explicitly. The total times a number below 1 is below the total, even after
    # rounding, so at least one code is always reached.
    total = ops.max(cumulative * ops.cast(weights > 0, "float32"), axis=-1, keepdims=True)
    reached = (weights > 0) & (cumulative > uniform * total)
    code = ops.min(ops.where(reached, ops.arange(num_codes), num_codes), axis=-1, keepdims=True)
    return ops.where(temperature > 0, ops.cast(code, "int32"), likeliest)


def _keep_largest(weights, logits, shares, target):
    """Keeps the weights of the fewest largest logits whose shares reach the target; zeros others.

    Among equal logits, the first are kept, as in `argmax`. Bisection takes a third of the time of
    sorting, which XLA does slowly on a CPU (benchmarks/choices.py).
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
    """Returns the scale of classifier-free guidance at each position, float32 [T].

    "constant" is the scale s at all positions. "linear" increases from 1 (no guidance) at the first
    position to s at the last: 1 + (s - 1) p / (T - 1). "interval" is s at positions p with p / T in
    [start, end), and 1 elsewhere.

    Args:
        settings: Of which `guidance`, `guidance_schedule`, `guidance_start` and `guidance_end` are
            used.
        length: Number of codes T of an image.
    """
    scale = settings.guidance
    if settings.guidance_schedule == "linear":
        # Reversed, so that for T = 1 the only position has the scale s.
        return np.linspace(scale, 1, length, dtype="float32")[::-1]
    scales = np.full(length, scale, "float32")
    if settings.guidance_schedule == "interval":
        shares = np.arange(length) / length
        inside = (settings.guidance_start <= shares) & (shares < settings.guidance_end)
        return np.where(inside, scales, np.float32(1))
    return scales
