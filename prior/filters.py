"""Samples one code: its random number, and the filters and guidance of its distribution."""

import numpy as np
from keras import ops

from vqbeam.configs import SamplerSettings
from vqbeam.vqvae.fitting.devices import on_cpu

# Enough for an interval of 100 to shrink below the spacing of float32 logits.
HALVINGS = 40


def uniforms(seed: int, indices: np.ndarray, length: int) -> np.ndarray:
    """Returns uniform random numbers in [0, 1), one for each image and position.

    Row i depends only on `seed` and `indices[i]`, so an image is the same for any batch size,
    backend and machine. The generator is Philox4x64 of Salmon et al., "Parallel Random Numbers: As
    Easy as 1, 2, 3" (https://doi.org/10.1145/2063384.2063405). Its key is the seed, and the top
    word of its counter is the image index.

    Args:
        seed: Any integer, reduced modulo 2^128.
        indices: Image index of each row, integers [N], at least 0.
        length: Random numbers per image.

    Returns:
        A float32 array [N, length] in [0, 1).
    """
    rows = [_raw(seed, index, length) for index in np.asarray(indices, "uint64")]
    # float32 has a precision of 24 bits: with more bits, the largest numbers would round to 1.
    bits = np.array(rows, "uint64").reshape(len(rows), length) >> np.uint64(40)
    return bits.astype("float32") * np.float32(2**-24)


def _raw(seed: int, index: np.uint64, length: int) -> np.ndarray:
    counter = np.array([0, 0, 0, index], "uint64")
    return np.random.Philox(key=seed % 2**128, counter=counter).random_raw(length)


def sample_code(logits, uniform, settings, *, filtered: bool):
    """Returns one code for each row of logits, by inversion of the cumulative probabilities.

    The logits are divided by the temperature. Then the `FILTERS` are applied in order, each to the
    codes that the ones before it have kept.

    Args:
        logits: float32 tensor [B, K].
        uniform: float32 tensor [B, 1] in [0, 1).
        settings: float32 scalars by name: `temperature`, at least 0, where 0 takes the most likely
            code, and the setting of each filter.
        filtered: Whether to apply the filters.

    Returns:
        An int32 tensor [B, 1]: the first code whose cumulative probability is above `uniform`.
    """
    num_codes, temperature = logits.shape[-1], settings["temperature"]
    likeliest = ops.cast(ops.argmax(logits, axis=-1, keepdims=True), "int32")
    logits = logits - ops.max(logits, axis=-1, keepdims=True)
    weights = ops.exp(logits / ops.where(temperature > 0, temperature, 1.0))
    if filtered:
        for name, keep in FILTERS.items():
            weights = keep(weights, logits, settings[name])
    cumulative = ops.cumsum(weights, axis=-1)
    # XLA adds in parallel, so the sum may change by a rounding error even where a weight is 0; such
    # codes are therefore excluded explicitly. The total times a number below 1 is below the total,
    # even when rounded, so there is always a code left.
    total = ops.max(cumulative * ops.cast(weights > 0, "float32"), axis=-1, keepdims=True)
    reached = (weights > 0) & (cumulative > uniform * total)
    code = ops.min(ops.where(reached, ops.arange(num_codes), num_codes), axis=-1, keepdims=True)
    return ops.where(temperature > 0, ops.cast(code, "int32"), likeliest)


def top_k(weights, logits, k):
    """Keeps the k most likely codes, or all of them if k is 0.

    Like every filter, it takes unnormalized probabilities [B, K], the largest of which is 1 and
    those of removed codes 0; the logits [B, K] before the temperature, of all codes, the largest of
    which is 0; and its setting, a float32 scalar. It returns the probabilities, with 0 for codes
    that it removes.
    """
    count = ops.where(k > 0, k, float(logits.shape[-1]))
    return _keep_largest(weights, logits, ops.ones_like(logits), count)


def top_p(weights, logits, p):
    """Keeps the smallest set of most likely codes whose probability is at least p, in (0, 1].

    Holtzman et al., "The Curious Case of Neural Text Degeneration",
    https://arxiv.org/abs/1904.09751.
    """
    probabilities = weights / ops.sum(weights, axis=-1, keepdims=True)
    return _keep_largest(weights, logits, probabilities, p)


def min_p(weights, logits, p):
    """Keeps the codes with at least p times the probability of the most likely one, p in [0, 1).

    Nguyen et al., "Min-p Sampling", https://arxiv.org/abs/2407.01082.
    """
    del logits
    return ops.where(weights >= p, weights, 0.0)


# By name of the setting, in the order in which they are applied. A new filter takes a function, a
# line here, and a field of `vqbeam.configs.SamplerSettings` whose default keeps all codes. A filter
# that may remove the most likely code must come last: the others rely on a largest weight of 1.
FILTERS = {"top_k": top_k, "top_p": top_p, "min_p": min_p}


def _keep_largest(weights, scores, shares, target):
    """Keeps the weights of the fewest largest scores, finite, whose shares add up to the target.

    Ties go to the first code, as with `argmax`.
    """
    keep = _largest_by_bisection if on_cpu() else _largest_by_sorting
    return ops.where(keep(scores, shares, target), weights, 0.0)


def _largest_by_sorting(scores, shares, target):
    order = ops.argsort(-scores, axis=-1)
    ordered = ops.take_along_axis(shares, order, axis=-1)
    rank = ops.argsort(order, axis=-1)
    return ops.take_along_axis(ops.cumsum(ordered, axis=-1) - ordered < target, rank, axis=-1)


def _largest_by_bisection(scores, shares, target):
    # On a CPU, sorting with XLA takes three times as long (benchmarks/choices.py). On a GPU, each
    # iteration of this loop would be a kernel launch.
    def halve(_, interval):
        low, high = interval
        middle = (low + high) / 2
        share = ops.sum(ops.where(scores >= middle, shares, 0.0), axis=-1, keepdims=True)
        enough = share >= target
        return ops.where(enough, middle, low), ops.where(enough, high, middle)

    interval = [f(scores, axis=-1, keepdims=True) for f in (ops.min, ops.max)]
    low, _ = ops.fori_loop(0, HALVINGS, halve, tuple(interval))
    smallest = ops.min(ops.where(scores >= low, scores, np.inf), axis=-1, keepdims=True)
    above = scores > smallest
    missing = target - ops.sum(ops.where(above, shares, 0.0), axis=-1, keepdims=True)
    tied = ops.where(scores == smallest, shares, 0.0)
    first = (scores == smallest) & (ops.cumsum(tied, axis=-1) - tied < missing)
    return above | first


def guidance_scales(settings: SamplerSettings, length: int) -> np.ndarray:
    """Returns the scale of classifier-free guidance at each position of the sequence.

    It is 1 + (s - 1) f at position p, where s is the scale and f depends on the schedule:

        constant:  f = 1
        linear:    f = p / (T - 1)
        cosine:    f = (1 - cos(π (p / (T - 1))^guidance_power)) / 2
        interval:  f = 1 where p / T lies in [guidance_start, guidance_end), else 0

    The cosine is that of Yu et al. 2024 (https://arxiv.org/abs/2411.00776), section 4.

    Args:
        settings: The sampler's settings.
        length: Codes T of an image.

    Returns:
        float32 [T].
    """
    # Reversed, so that a single code counts as the last one.
    way = np.linspace(1, 0, length)[::-1]
    match settings.guidance_schedule:
        case "constant":
            share = np.ones(length)
        case "linear":
            share = way
        case "cosine":
            share = (1 - np.cos(np.pi * way**settings.guidance_power)) / 2
        case "interval":
            place = np.arange(length) / length
            share = (settings.guidance_start <= place) & (place < settings.guidance_end)
    return (1 + (settings.guidance - 1) * share).astype("float32")


def sampler_tensors(
    settings: SamplerSettings, length: int
) -> tuple[dict[str, np.ndarray], dict[str, bool]]:
    """Returns the settings as inputs of a sampling program, and which program to use.

    Args:
        settings: The sampler's settings.
        length: Codes T of an image.

    Returns:
        float32 arrays by name: scalars for `temperature` and each of `FILTERS`, and `guidance` [T];
        and whether the program is `guided` and whether it is `filtered`, by name.
    """
    defaults = type(settings)()
    scales = guidance_scales(settings, length)
    tensors = {name: getattr(settings, name) for name in ("temperature", *FILTERS)}
    kind = {
        "guided": bool(np.any(scales != 1)),
        "filtered": any(getattr(settings, name) != getattr(defaults, name) for name in FILTERS),
    }
    tensors = {name: np.asarray(value, "float32") for name, value in tensors.items()}
    return tensors | {"guidance": scales}, kind
