"""Samples code grids one code at a time, with cached keys and values; scores given grids."""

import functools
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import keras
import numpy as np
from keras import ops

from vqbeam.configs import SamplerSettings, VqbeamError
from vqbeam.prior.filters import sample_code, sampler_tensors, uniforms
from vqbeam.prior.transformer import CodePrior, check_labels
from vqbeam.vqvae.fitting.devices import compile_function, on_cpu

# Attention reads the complete cache, so the cache starts short and grows in this many steps.
SEGMENTS = 4
# Minimum number of images that one CPU core samples at once.
LEAST_SHARE = 8
_DEFAULTS = SamplerSettings()


class Sampler:
    """Samples the code grids of images from a prior, in batches of a fixed size.

    Image i of a seed is the same at any batch size, since each image has its own random numbers.
    The only exception is a number within a rounding error of the boundary between two codes: there,
    programs compiled for different batch sizes or backends may differ. With precision "fast", they
    differ in many images, since bfloat16 rounds so coarsely.

    The program is compiled on first use, once for each combination of precision, guidance, filters,
    interpolation and completion. All other settings are inputs of the compiled program.

    Args:
        model: The prior. Later changes to its weights take effect, but not with precision "fast".
        batch_size: Images sampled at once. The last batch is padded.

    Example:
        >>> sampler = Sampler(prior, batch_size=64)
        >>> settings = SamplerSettings(top_p=0.95, guidance=2.0)
        >>> codes = sampler(np.arange(10), seed=0, settings=settings)  # int32 [10, h, w]
    """

    def __init__(self, model: CodePrior, batch_size: int):
        self.model = model
        self.batch_size = batch_size
        self.share = _share(batch_size)
        self._program = functools.cache(self._compile)

    def _compile(self, precision: str, guided: bool, filtered: bool) -> Callable[..., Any]:
        model = in_precision(self.model, precision)
        loop = functools.partial(sample_codes, model, guided=guided, filtered=filtered)
        return compile_function(loop, model.weights, jit=True)

    def __call__(
        self,
        labels: np.ndarray,
        seed: int,
        settings: SamplerSettings = _DEFAULTS,
        *,
        indices: np.ndarray | None = None,
        towards: tuple[np.ndarray, np.ndarray] | None = None,
        known: tuple[np.ndarray, np.ndarray] | None = None,
        on_batch: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """Returns the sampled codes of one image for each label.

        With guidance of scale s, the logits are u + s·(c - u), where c and u are those with and
        without the label (Ho and Salimans, https://arxiv.org/abs/2207.12598, eq. 6, s = 1 + w).

        Args:
            labels: Classes, integers [N] from 0 to `model.null_label`, where -1 also means no
                class; or attributes [N, A] of zeros and ones, with rows of -1 if unknown.
            seed: Any integer.
            settings: Temperature, filters, guidance and precision.
            indices: Integers [N], the index of each image among those of the seed; None for 0, 1,
                and so on.
            towards: A second label [N] of each image and its weight w [N] in [0, 1]: c becomes
                (1 - w)·c + w·c', where c' are the logits with the second label.
            known: Codes [N, *layout.shape], and a bool mask of the same shape or the shape of one
                image's codes. Codes are kept where the mask is True. Each of the others is sampled
                given all codes before it in the sequence; codes kept after it have no effect on it.
            on_batch: Called at least once per batch, with the number of images sampled so far.

        Returns:
            An int32 array [N, *layout.shape] of codes in [0, K).

        Raises:
            VqbeamError: A setting or label does not fit the model.
        """
        labels, layout = np.asarray(labels, "int32"), self.model.layout
        if settings.top_k > layout.num_codes:
            raise VqbeamError(
                f"sample.top_k is {settings.top_k}; the model has {layout.num_codes} codes; use "
                "0 for all"
            )
        # The model does not know whether it was trained with label dropout; assume that it was.
        settings.check_guidance(self.model.num_labels > 0, label_dropout=1)
        check_labels(self.model, labels)
        images = {"labels": labels}
        if towards is not None:
            images["towards"] = np.asarray(towards[0], "int32")
            images["blend"] = np.asarray(towards[1], "float32")
            check_labels(self.model, images["towards"])
        if known is not None:
            codes, keep = np.asarray(known[0], "int32"), np.asarray(known[1], bool)
            images["known"] = codes.reshape(-1, layout.length)
            images["keep"] = np.broadcast_to(keep, codes.shape).reshape(-1, layout.length)
        indices = np.arange(len(labels)) if indices is None else np.asarray(indices)
        tensors, kind = sampler_tensors(settings, layout.length)
        program = self._program(settings.precision, **kind)

        def sample(start):
            rows = slice(start, start + self.share)
            numbers = uniforms(seed, indices[rows], layout.length)
            batch = {"uniforms": numbers} | {name: array[rows] for name, array in images.items()}
            padded = {name: self._padded(array) for name, array in batch.items()}
            return ops.convert_to_numpy(program(padded, tensors))[: len(numbers)]

        codes = np.zeros((len(labels), layout.length), "int32")
        starts = range(0, len(labels), self.share)
        with ThreadPoolExecutor(math.ceil(self.batch_size / self.share)) as pool:
            for start, sampled in zip(starts, pool.map(sample, starts), strict=True):
                codes[start : start + len(sampled)] = sampled
                if on_batch is not None:
                    on_batch(start + len(sampled))
        return codes.reshape(-1, *layout.shape)

    def _padded(self, rows: np.ndarray) -> np.ndarray:
        missing = self.share - len(rows)
        return np.pad(rows, ((0, missing), *[(0, 0)] * (rows.ndim - 1)), mode="edge")


def in_precision(model: CodePrior, precision: str) -> CodePrior:
    """Returns the model itself for "exact", or for "fast" a copy of it in bfloat16.

    Weights, caches and matrix products of the copy are in bfloat16, which takes half the bytes and
    runs on a GPU's fast units. The statistics of the norms, the softmax of attention, the head with
    its logits, and the probabilities of codes are computed in float32.

    Args:
        model: The prior.
        precision: See `SamplerSettings`.
    """
    return model.with_dtype("bfloat16") if precision == "fast" else model


def _share(batch_size: int) -> int:
    """Returns how many images of a batch one call of the program samples.

    On a CPU, a step consists of many small operations, which gain little from a second core. So
    each core runs its own program, unless its share of the images is so small that reading the
    weights would dominate.
    """
    if not on_cpu():
        return batch_size
    cores = min(os.cpu_count(), max(1, batch_size // LEAST_SHARE))
    return math.ceil(batch_size / cores)


def sample_codes(
    model: CodePrior,
    images: dict[str, Any],
    settings: dict[str, Any],
    *,
    guided: bool,
    filtered: bool,
    segments: int = SEGMENTS,
):
    """Returns the sampled codes of a batch of images; can be traced as one function.

    Args:
        model: The prior.
        images: Inputs per image: `labels`, int32 [B]; `uniforms`, float32 [B, T] in [0, 1); to
            interpolate, `towards`, int32 [B], and `blend`, float32 [B]; and to complete, `known`,
            int32 [B, T], and `keep`, bool [B, T]. See `Sampler`.
        settings: Inputs shared by all images, from `sampler_tensors`.
        guided: Whether to apply guidance, which takes twice the work.
        filtered: Whether to apply the filters.
        segments: How many times the cache grows; the codes do not depend on it.

    Returns:
        An int32 tensor [B, T].
    """
    labels = images["labels"]
    batch_size, length = ops.shape(labels)[0], model.layout.length
    classes = [images[name] for name in ("labels", "towards") if name in images]
    if guided:
        classes.append(ops.full_like(labels, model.null_label))
    x = ops.concatenate([model.embed_labels(one) for one in classes])

    def advance(position, x, codes, caches):
        def here(name):
            return ops.slice(images[name], (0, position), (batch_size, 1))

        logits, caches = model.step(x, caches, position)
        scale = ops.take(settings["guidance"], position) if guided else None
        logits = _combined(ops.split(logits, len(classes)), images.get("blend"), scale)
        code = sample_code(logits, here("uniforms"), settings, filtered=filtered)
        if "known" in images:
            code = ops.where(here("keep"), here("known"), code)
        x = model.embed_codes(ops.concatenate([code] * len(classes)), position)
        return position + 1, x, ops.slice_update(codes, (0, position), code), caches

    bounds = sorted({math.ceil(length * i / segments) for i in range(1, segments + 1)})
    state = (
        ops.zeros((), "int32"),
        x,
        ops.zeros((batch_size, length), "int32"),
        model.empty_caches(ops.shape(x)[0], 0),
    )
    for bound in bounds:
        state = (*state[:3], _grown(state[3], bound))
        state = ops.while_loop(lambda position, *_, end=bound: position < end, advance, state)
    return state[2]


def _combined(logits: list, blend, scale):
    """Returns guided, interpolated logits, given those with a label, a second one, and no label."""
    with_class = logits[0]
    if blend is not None:
        with_class = (1 - blend[:, None]) * logits[0] + blend[:, None] * logits[1]
    return with_class if scale is None else logits[-1] + scale * (with_class - logits[-1])


def _grown(caches: list, length: int) -> list:
    """Returns caches of keys [N, D, C] and values [N, C, D] with C = `length`."""
    missing = length - caches[0][0].shape[2]
    return [
        (
            ops.pad(keys, ((0, 0), (0, 0), (0, missing))),
            ops.pad(values, ((0, 0), (0, missing), (0, 0))),
        )
        for keys, values in caches
    ]


# From codes, int [B, *layout.shape], and labels, int [B] or [B, A], to nats, float32 [B].
Score = Callable[[np.ndarray, np.ndarray], np.ndarray]


def code_scorer(
    prior: CodePrior, counted: np.ndarray | None = None, precision: str = "exact"
) -> Score:
    """Returns a compiled function from codes and labels to the log-likelihood of the codes.

    The log-likelihood is the sum over positions of log p(code | label, previous codes), in nats.

    Args:
        prior: The prior.
        counted: Bool [*layout.shape], the positions to include; None for all.
        precision: See `in_precision`.
    """
    prior = in_precision(prior, precision)
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


def code_predictor(prior: CodePrior) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Returns a compiled function from codes and labels to the prior's prediction of each code.

    It returns log p(code | label, previous codes) for all K codes at each position, float32
    [B, T, K]. The function of `code_scorer` uses only that of the given codes.
    """

    def predict(codes, labels):
        return ops.log_softmax(prior({"codes": codes, "labels": labels}, training=False))

    compiled = compile_function(predict, prior.variables, jit=False)
    return lambda codes, labels: ops.convert_to_numpy(compiled(codes, labels))
