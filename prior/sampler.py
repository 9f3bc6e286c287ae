"""Draws the codes of new images from a prior, one at a time, with cached keys and values."""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from keras import ops

from configs import VqbeamError
from prior.transformer import CodePrior
from prior.uniforms import uniforms
from vqvae.compilation import compile_function

# Attention reads its cache in full, so the cache starts short and grows.
SEGMENTS = 4
# Enough for an interval of 100 to shrink below the spacing of float32 logits.
HALVINGS = 40


class Sampler:
    """Draws the codes of images from a prior in batches of one size.

    Image i of a seed is the same image at any batch size, since its random numbers are its own.
    Only where a number falls within a rounding of the border between two codes may programs for
    different batch sizes or backends part ways, which is rare.

    All settings are inputs of the compiled program: it is compiled once with and once without
    guidance, and once with and once without filters, when first asked for.

    Args:
        model: The prior. Weights assigned to it later on are seen.
        batch_size: Images drawn at once. A last batch that is smaller is padded.

    Example:
        >>> sampler = Sampler(prior, batch_size=64)
        >>> codes = sampler(np.arange(10), seed=0, top_p=0.95, guidance=2.0)  # int32 [10, h, w]
    """

    def __init__(self, model: CodePrior, batch_size: int):
        self.model = model
        self.batch_size = batch_size
        self._program = functools.cache(self._compile)

    def _compile(self, guided: bool, filtered: bool) -> Callable[..., Any]:
        loop = functools.partial(sample_codes, self.model, guided=guided, filtered=filtered)
        return compile_function(loop, self.model.weights, jit=True)

    def __call__(
        self,
        labels: np.ndarray,
        seed: int,
        *,
        first_index: int = 0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        guidance: float = 1.0,
        on_batch: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """Draws the codes of one image for each label.

        Args:
            labels: Integers [N] from 0 up to `model.null_label`; -1 means no class as well.
            seed: Any integer.
            first_index: Index of the first image among those of the seed.
            temperature: Divides the logits; 0 takes the likeliest code.
            top_k: Draw from the k likeliest codes only; 0 for all.
            top_p: Draw from the fewest of the likeliest codes whose probability, after `top_k`, is
                at least this (Holtzman et al., https://arxiv.org/abs/1904.09751); in (0, 1].
            guidance: Scale s of classifier-free guidance, u + s·(c - u), where c and u are the
                logits with and without the class (Ho and Salimans,
                https://arxiv.org/abs/2207.12598, eq. 6, with s = 1 + w); 1 for none.
            on_batch: Called after each batch with the number of images drawn so far.

        Returns:
            An int32 array [N, *layout.shape] of codes in [0, K).

        Raises:
            VqbeamError: A setting or a label is out of range, or an unconditional model is given a
                guidance scale.
        """
        labels = np.asarray(labels, "int32")
        self._check(labels, temperature, top_k, top_p, guidance)
        layout, num_codes = self.model.layout, self.model.layout.num_codes
        filtered = 0 < top_k < num_codes or top_p < 1
        program = self._program(guidance != 1, filtered)
        settings = (
            np.asarray(temperature, "float32"),
            np.asarray(top_k or num_codes, "float32"),
            np.asarray(top_p, "float32"),
            np.asarray(guidance, "float32"),
        )
        codes = np.zeros((len(labels), layout.length), "int32")
        for start in range(0, len(labels), self.batch_size):
            batch = labels[start : start + self.batch_size]
            padded = np.pad(batch, (0, self.batch_size - len(batch)), mode="edge")
            indices = first_index + start + np.arange(self.batch_size)
            numbers = uniforms(seed, indices, layout.length)
            drawn = ops.convert_to_numpy(program(padded, numbers, *settings))
            codes[start : start + len(batch)] = drawn[: len(batch)]
            if on_batch is not None:
                on_batch(start + len(batch))
        return codes.reshape(-1, *layout.shape)

    def _check(self, labels, temperature, top_k, top_p, guidance):
        model, num_codes = self.model, self.model.layout.num_codes
        if not temperature >= 0:
            raise VqbeamError(f"temperature is {temperature}; it must be at least 0")
        if not 0 <= top_k <= num_codes:
            raise VqbeamError(
                f"top_k is {top_k}; it must be from 1 to {num_codes}, the number of codes, or 0 "
                "for all"
            )
        if not 0 < top_p <= 1:
            raise VqbeamError(f"top_p is {top_p}; it must be above 0 and at most 1, which is all")
        if not 0 <= guidance < np.inf:
            raise VqbeamError(f"guidance is {guidance}; it must be at least 0; 1 is none")
        if guidance != 1 and model.num_labels == 0:
            raise VqbeamError(
                f"guidance is {guidance}, but the prior was trained without classes; set it to 1"
            )
        wrong = labels[(labels < -1) | (labels > model.null_label)]
        if wrong.size:
            raise VqbeamError(
                f"label {wrong[0]} is out of range; the prior knows labels 0 to "
                f"{model.num_labels - 1}"
                if model.num_labels
                else f"label {wrong[0]} is given, but the prior was trained without classes; use -1"
            )


def sample_codes(
    model: CodePrior,
    labels,
    uniforms,
    temperature,
    top_k,
    top_p,
    guidance,
    *,
    guided: bool,
    filtered: bool,
    segments: int = SEGMENTS,
):
    """Draws the codes of a batch of images; the whole of it is one traceable function.

    Args:
        model: The prior.
        labels: int32 tensor [B].
        uniforms: float32 tensor [B, T] in [0, 1).
        temperature: float32 scalar; see `Sampler` for this and the next three.
        top_k: float32 scalar from 1 to K.
        top_p: float32 scalar in (0, 1].
        guidance: float32 scalar.
        guided: Whether `guidance` is used, which takes twice the work.
        filtered: Whether `top_k` and `top_p` are used.
        segments: How often the cache grows; the codes do not depend on it.

    Returns:
        An int32 tensor [B, T].
    """
    batch_size, length = labels.shape[0], model.layout.length
    x = model.embed_labels(labels)
    if guided:
        x = ops.concatenate([x, model.embed_labels(ops.full_like(labels, model.null_label))])

    def advance(position, x, codes, caches):
        logits, caches = model.step(x, caches, position)
        if guided:
            with_class, without = ops.split(logits, 2)
            logits = without + guidance * (with_class - without)
        uniform = ops.slice(uniforms, (0, position), (batch_size, 1))
        code = draw_codes(logits, uniform, temperature, top_k, top_p, filtered=filtered)
        x = model.embed_codes(ops.concatenate([code, code]) if guided else code, position)
        return position + 1, x, ops.slice_update(codes, (0, position), code), caches

    bounds = sorted({math.ceil(length * i / segments) for i in range(1, segments + 1)})
    state = (
        ops.zeros((), "int32"),
        x,
        ops.zeros((batch_size, length), "int32"),
        model.empty_caches(x.shape[0], 0),
    )
    for bound in bounds:
        state = (*state[:3], _grown(state[3], bound))
        state = ops.while_loop(lambda position, *_, end=bound: position < end, advance, state)
    return state[2]


def _grown(caches: list, length: int) -> list:
    return [
        tuple(ops.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2]), (0, 0))) for x in pair)
        for pair in caches
    ]


def draw_codes(logits, uniform, temperature, top_k, top_p, *, filtered: bool):
    """Turns uniform numbers into codes, by inversion of the cumulative probabilities.

    Args:
        logits: float32 tensor [B, K].
        uniform: float32 tensor [B, 1] in [0, 1).
        temperature: float32 scalar; see `Sampler` for this and the next two.
        top_k: float32 scalar from 1 to K.
        top_p: float32 scalar in (0, 1].
        filtered: Whether `top_k` and `top_p` are used.

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
