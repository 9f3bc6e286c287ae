"""Samples the codes of new images from a prior, one at a time, with a key/value cache."""

import functools
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import keras
import numpy as np
from keras import ops

from vqbeam.configs import SampleConfig, VqbeamError
from vqbeam.prior.filters import draw_codes, guidance_scales
from vqbeam.prior.transformer import CodePrior, check_labels
from vqbeam.prior.uniforms import uniforms
from vqbeam.vqvae.fitting.compilation import compile_function
from vqbeam.vqvae.layout import CodeLayout

# Attention reads the complete cache, so the cache starts short and grows in this many steps.
SEGMENTS = 4
# Minimum number of images per program on a CPU.
LEAST_SHARE = 8


class Sampler:
    """Samples the codes of images from a prior in batches of a fixed size.

    Image i of a seed is the same for any batch size, since each image has its own random numbers.
    In rare cases, rounding can make different batch sizes or backends choose different codes when a
    random number is at the boundary between two codes.

    All settings are inputs of the compiled program. It is compiled on first use for each
    combination of: with or without guidance, filters, a second label, and known codes.

    Args:
        model: The prior. Later changes to its weights take effect.
        batch_size: Number of images sampled at once. The last batch is padded to this size.

    Example:
        >>> sampler = Sampler(prior, batch_size=64)
        >>> codes = sampler(np.arange(10), seed=0, top_p=0.95, guidance=2.0)  # int32 [10, h, w]
    """

    def __init__(self, model: CodePrior, batch_size: int):
        self.model = model
        self.batch_size = batch_size
        self.share = _share(batch_size)
        self._program = functools.cache(self._compile)

    def _compile(self, guided: bool, filtered: bool) -> Callable[..., Any]:
        loop = functools.partial(sample_codes, self.model, guided=guided, filtered=filtered)
        return compile_function(loop, self.model.weights, jit=True)

    def __call__(
        self,
        labels: np.ndarray,
        seed: int,
        *,
        indices: np.ndarray | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        guidance: float | np.ndarray = 1.0,
        towards: tuple[np.ndarray, np.ndarray] | None = None,
        known: np.ndarray | None = None,
        keep: np.ndarray | None = None,
        on_batch: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """Samples the codes of one image for each label.

        Args:
            labels: Class labels, integers [N] in [0, `model.null_label`], or -1 for no class; or
                attributes [N, A] of zeros and ones, with rows of -1 for no attributes given.
            seed: Any integer.
            indices: Integers [N], the index of each image within the seed; 0, 1, ... by default.
            temperature: Divides the logits; 0 takes the most likely code.
            top_k: Sample only from the k most likely codes; 0 for all. See `prior.filters` for how
                `top_k`, `top_p` and `min_p` are combined.
            top_p: Sample from the smallest set of codes with this total probability, in (0, 1].
            min_p: Sample from codes with at least this fraction of the highest probability, in
                [0, 1).
            guidance: Scale s of classifier-free guidance, u + s·(c - u), where c and u are the
                logits with and without the label (Ho and Salimans,
                https://arxiv.org/abs/2207.12598, eq. 6, with s = 1 + w); 1 for none. A scalar, or
                [T] for one scale per position.
            towards: Second labels, shaped like `labels`, and their weights w [N] in [0, 1]: c is
                replaced by (1 - w)·c + w·c', where c' are the logits with the second label.
            known: Codes of partially known images, integers [N, *layout.shape] in [0, K).
            keep: Mask of the known codes to keep, bool [N, *layout.shape] or [*layout.shape]. Each
                other code is sampled given all codes before it in the sequence; kept codes after it
                have no influence.
            on_batch: Called at least once per batch with the number of images sampled so far.

        Returns:
            An int32 array [N, *layout.shape] of codes in [0, K).

        Raises:
            VqbeamError: A setting or label is out of range, or guidance is used with an
                unconditional model.
        """
        labels, layout = np.asarray(labels, "int32"), self.model.layout
        settings, kind = program_settings(layout, temperature, top_k, top_p, min_p, guidance)
        self._check(labels, temperature, top_k, top_p, min_p, settings["guidance"])
        images = {"labels": labels}
        if towards is not None:
            images["towards"] = np.asarray(towards[0], "int32")
            images["blend"] = np.asarray(towards[1], "float32")
            check_labels(self.model, images["towards"])
        if known is not None:
            keep = np.broadcast_to(np.asarray(keep, bool), np.shape(known))
            images["known"] = np.asarray(known, "int32").reshape(-1, layout.length)
            images["keep"] = keep.reshape(-1, layout.length)
        program = self._program(**kind)
        indices = np.arange(len(labels)) if indices is None else np.asarray(indices)

        def draw(start):
            rows = slice(start, start + self.share)
            numbers = uniforms(seed, indices[rows], layout.length)
            batch = {"uniforms": numbers} | {name: array[rows] for name, array in images.items()}
            padded = {name: self._padded(array) for name, array in batch.items()}
            return ops.convert_to_numpy(program(padded, settings))[: len(numbers)]

        codes = np.zeros((len(labels), layout.length), "int32")
        starts = range(0, len(labels), self.share)
        with ThreadPoolExecutor(math.ceil(self.batch_size / self.share)) as pool:
            for start, drawn in zip(starts, pool.map(draw, starts), strict=True):
                codes[start : start + len(drawn)] = drawn
                if on_batch is not None:
                    on_batch(start + len(drawn))
        return codes.reshape(-1, *layout.shape)

    def _padded(self, rows: np.ndarray) -> np.ndarray:
        missing = self.share - len(rows)
        return np.pad(rows, ((0, missing), *[(0, 0)] * (rows.ndim - 1)), mode="edge")

    def _check(self, labels, temperature, top_k, top_p, min_p, scales):
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
        if not 0 <= min_p < 1:
            raise VqbeamError(f"min_p is {min_p}; it must be at least 0, which is all, and below 1")
        wrong, guided = scales[~((scales >= 0) & (scales < np.inf))], scales[scales != 1]
        if wrong.size:
            raise VqbeamError(f"guidance is {wrong[0]:g}; it must be at least 0; 1 is none")
        if guided.size and model.num_labels == 0:
            raise VqbeamError(
                f"guidance is {guided[0]:g}, but the prior was trained without classes; set it to 1"
            )
        check_labels(self.model, labels)


def _share(batch_size: int) -> int:
    """Returns the number of images of a batch that one program samples.

    On a CPU, a step has many small operations, which gain little from a second core. Each core runs
    its own program, unless that leaves so few images per core that reading the weights dominates.
    """
    if not all(name.startswith("cpu") for name in keras.distribution.list_devices()):
        return batch_size
    cores = min(os.cpu_count(), max(1, batch_size // LEAST_SHARE))
    return math.ceil(batch_size / cores)


def sampler_arguments(settings: SampleConfig, length: int) -> dict[str, Any]:
    """Returns the keyword arguments for calling a `Sampler` with the settings of a config.

    Args:
        settings: The `sample` section of the config.
        length: Number of codes T of an image.
    """
    names = ("temperature", "top_k", "top_p", "min_p")
    arguments = {name: getattr(settings, name) for name in names}
    return arguments | {"guidance": guidance_scales(settings, length)}


def program_settings(
    layout: CodeLayout, temperature: float, top_k: int, top_p: float, min_p: float, guidance
) -> tuple[dict[str, np.ndarray], dict[str, bool]]:
    """Returns the `settings` of `sample_codes` and its arguments `guided` and `filtered`.

    Args:
        layout: Layout of the codes.
        temperature: See `Sampler` for this and the next four.
        top_k: Number of codes; 0 for all.
        top_p: Total probability.
        min_p: Fraction of the highest probability.
        guidance: Scalar or [T].
    """
    scales = np.broadcast_to(np.asarray(guidance, "float32"), (layout.length,))
    settings = {
        "temperature": temperature,
        "top_k": top_k or layout.num_codes,
        "top_p": top_p,
        "min_p": min_p,
        "guidance": scales,
    }
    filtered = 0 < top_k < layout.num_codes or top_p < 1 or min_p > 0
    kind = {"guided": bool(np.any(scales != 1)), "filtered": filtered}
    return {name: np.asarray(value, "float32") for name, value in settings.items()}, kind


def sample_codes(
    model: CodePrior,
    images: dict[str, Any],
    settings: dict[str, Any],
    *,
    guided: bool,
    filtered: bool,
    segments: int = SEGMENTS,
):
    """Samples the codes of a batch of images, as one traceable function.

    Args:
        model: The prior.
        images: Tensors with one row per image: `labels`, int32 [B] or [B, A]; `uniforms`, float32
            [B, T] in [0, 1), the random numbers; optionally `towards`, like `labels`, with its
            weights `blend`, float32 [B]; and optionally `known`, int32 [B, T], with `keep`, bool
            [B, T]. See `Sampler`.
        settings: float32 tensors shared by all images: the scalars `temperature`, `top_k` from 1 to
            K, `top_p` and `min_p`, and `guidance` [T].
        guided: Whether to apply guidance, which also computes the logits without a label.
        filtered: Whether to apply `top_k`, `top_p` and `min_p`.
        segments: Number of steps in which the cache grows; it does not affect the codes.

    Returns:
        An int32 tensor [B, T] of codes in [0, K).
    """
    labels, filters = images["labels"], ("temperature", "top_k", "top_p", "min_p")
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
        drawing = [settings[name] for name in filters]
        code = draw_codes(logits, here("uniforms"), *drawing, filtered=filtered)
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
    """Returns the blended and guided logits, given those with label, second label and no label."""
    with_class = logits[0]
    if blend is not None:
        with_class = (1 - blend[:, None]) * logits[0] + blend[:, None] * logits[1]
    return with_class if scale is None else logits[-1] + scale * (with_class - logits[-1])


def _grown(caches: list, length: int) -> list:
    """Returns the caches, keys [N, D, C] and values [N, C, D], padded to C = `length`."""
    missing = length - caches[0][0].shape[2]
    return [
        (
            ops.pad(keys, ((0, 0), (0, 0), (0, missing))),
            ops.pad(values, ((0, 0), (0, missing), (0, 0))),
        )
        for keys, values in caches
    ]
