"""A trained run from Python: NumPy arrays in, NumPy arrays out."""

import functools
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from etils import epath

from vqbeam.configs import Config, VqbeamError
from vqbeam.pipelines.sampling.complete import completed_label, draw_completions
from vqbeam.pipelines.sampling.decoder import (
    Models,
    Samples,
    changed_defaults,
    fitted,
    learned_labels,
)
from vqbeam.pipelines.sampling.input_images import region_mask
from vqbeam.pipelines.sampling.labels import parse_label
from vqbeam.pipelines.sampling.sample import draw
from vqbeam.pipelines.sampling.score import log_likelihoods
from vqbeam.vqvae.fitting.compilation import in_batches
from vqbeam.vqvae.layout import code_layout
from vqbeam.vqvae.storage.labels import Labels
from vqbeam.vqvae.storage.run_folder import STAGES, RunFolder


def open(path: epath.PathLike) -> "Run":
    """Opens the folder of a run.

    Args:
        path: The folder that `vqbeam run` was given as --run-dir, local or gs://.

    Raises:
        VqbeamError: The folder holds no run.
    """
    return Run(path)


class Run:
    """A run, opened with `vqbeam.open`.

    Models are loaded when they are first needed, and kept. The VQ-VAE is enough for `encode`,
    `decode`, `reconstruct` and `codebook`; the other methods need the prior as well.

    Every method raises a VqbeamError, with one line that says what to do, where a model is not
    trained yet or an argument does not fit the run.

    Args:
        path: The run's folder.

    Attributes:
        path: The run's folder.
        config: The run's config.
    """

    def __init__(self, path: epath.PathLike):
        self._folder = RunFolder(path)
        self._models = Models(self._folder)
        self.path = self._folder.root
        self.config: Config = self._folder.load_config()

    def __repr__(self) -> str:
        return f"vqbeam.open({str(self.path)!r})"

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes, or of the attributes, by number; empty where there are none."""
        for stage in ("train-prior", "encode", "prepare"):
            if manifest := self._folder.manifest(stage):
                return Labels.of(manifest).names
        raise VqbeamError(f"{self.path} has no images yet, so its labels are not known")

    @property
    def history(self) -> dict[str, list[dict[str, float]]]:
        """What was measured after each epoch of `train-vqvae` and `train-prior`, once finished."""
        manifests = {stage: self._folder.manifest(stage) or {} for stage in STAGES}
        return {stage: made["history"] for stage, made in manifests.items() if "history" in made}

    @functools.cached_property
    def codebook(self) -> np.ndarray:
        """The vectors that the codes stand for, float32 [K, D].

        It is [levels, K, D] where a run has several codebooks: of the residual quantizer, or of two
        grids, the coarse one first. The predictive quantizer adds these vectors to its predictions.
        The vectors of fsq and lfq are not learned.
        """
        model = self._models.vqvae
        grids = [model.quantizer]
        if self.config.vqvae.grids == 2:
            grids.insert(0, model.top_quantizer)
        levels = [level for grid in grids for level in getattr(grid, "quantizers", [grid])]
        codes = np.arange(model.layout.num_codes, dtype="int32")
        vectors = [keras.ops.convert_to_numpy(level.decode_codes(codes)) for level in levels]
        return vectors[0] if len(vectors) == 1 else np.stack(vectors)

    def sample(
        self,
        num: int | None = None,
        labels: Sequence[Any] | str | None = None,
        seed: int | None = None,
        **settings: Any,
    ) -> Samples:
        """Draws new images, the same ones as `vqbeam sample` with the same arguments.

        Args:
            num: How many; by default one for each label, or as many as the run's config says.
            labels: What to draw, in turn: names or numbers of classes, or None for any. Of
                attributes, names joined by commas. By default all classes.
            seed: Image i of a seed is always the same image. The run's own by default.
            **settings: `temperature`, `top_k`, `top_p`, `min_p`, `guidance` and the other fields
                of `vqbeam.configs.SampleConfig`; by default those of the run.

        Returns:
            A `Samples` with `images`, uint8 [N, H, W, C]; `codes`, int32 [N, *shape]; `labels`,
            int32 [N], or [N, A] of A attributes, −1 for any; and `names`, "" for any, or None of
            a run without classes.
        """
        if isinstance(labels, str):
            labels = [labels]
        if labels is not None and not len(labels):
            raise VqbeamError("labels is empty; give at least one, or None for all classes")
        if num is None and labels is not None:
            num = len(labels)
        changes = {"num": num} | settings
        changes = {name: value for name, value in changes.items() if value is not None}
        return draw(self._folder, changes, labels, self._seed(seed), self._models)

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Returns the codes of images.

        Args:
            images: uint8 [N, H, W, C], of the run's own shape.

        Returns:
            int32 [N, h, w]; [N, h, w, depth] of the residual quantizer; [N, T] of two grids.
        """
        images = self._checked_images(images)
        codes = in_batches(self._models.encode, images, self._batch_size)
        return codes.astype("int32", copy=False)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Returns the images, uint8 [N, H, W, C], of codes as `encode` and `sample` give them."""
        return in_batches(self._models.decode, self._checked_codes(codes), self._batch_size)

    def reconstruct(self, images: np.ndarray) -> np.ndarray:
        """Encodes and decodes images, uint8 [N, H, W, C] both."""
        return self.decode(self.encode(images))

    def log_likelihood(self, images: np.ndarray, labels: Sequence[Any] | None = None) -> np.ndarray:
        """Returns how likely the prior finds the codes of images, as `vqbeam score` does.

        Args:
            images: uint8 [N, H, W, C].
            labels: One for each image, as in `sample`; None for none.

        Returns:
            log p(codes | label) in nats, float32 [N].
        """
        codes, known = self.encode(images), learned_labels(self._folder)
        if labels is None:
            labels = [None] * len(codes)
        if isinstance(labels, str) or len(labels) != len(codes):
            raise VqbeamError(f"labels must be a list of {len(codes)}, one for each image")
        rows = np.asarray([parse_label(label, known) for label in labels], np.int32)
        return log_likelihoods(self._models, codes, rows, self._batch_size)

    def complete(
        self,
        images: np.ndarray,
        keep: str | np.ndarray,
        num: int = 4,
        *,
        candidates: int = 1,
        label: Any = None,
        seed: int | None = None,
        **settings: Any,
    ) -> np.ndarray:
        """Keeps a part of each image and draws the rest, as `vqbeam complete` does.

        Args:
            images: uint8 [N, H, W, C].
            keep: "top-half", "bottom-half", "left-half", "right-half", the path of a mask (white
                is kept), or a bool array [H, W], True where the images are kept.
            num: Completions of each image.
            candidates: How many are drawn for each completion; the likeliest is taken.
            label: Name or number of the class of the images; None for unknown.
            seed: Of the random numbers; the run's own by default.
            **settings: See `sample`.

        Returns:
            uint8 [N, num, H, W, C].
        """
        images, mask = self._checked_images(images), self._mask(keep)
        for name, value in {"num": num, "candidates": candidates}.items():
            if value < 1:
                raise VqbeamError(f"{name} is {value}; it must be at least 1")
        number = completed_label(label, learned_labels(self._folder))
        chosen = changed_defaults(self._folder, settings)
        chosen = fitted(chosen, len(images) * num * candidates)
        seed = self._seed(seed)
        return draw_completions(self._models, chosen, seed, images, mask, number, num, candidates)

    @property
    def _batch_size(self) -> int:
        return self.config.encode.batch_size

    def _seed(self, seed: int | None) -> int:
        return self.config.seed if seed is None else seed

    def _mask(self, keep: str | np.ndarray) -> np.ndarray:
        if not isinstance(keep, np.ndarray):
            return region_mask(str(keep), self.config)
        shape = self.config.image_shape[:2]
        if keep.dtype != bool or keep.shape != shape:
            raise VqbeamError(
                f"keep is {_kind(keep)}; give bool {list(shape)}, such as keep = mask > 0"
            )
        return keep.astype("float32")

    def _checked_images(self, images: Any) -> np.ndarray:
        images, shape = np.asarray(images), self.config.image_shape
        if images.dtype != np.uint8 or images.shape[1:] != shape or not len(images):
            raise VqbeamError(
                f"images is {_kind(images)}; give uint8 {_sizes(shape)} with pixels from 0 to 255"
            )
        return images

    def _checked_codes(self, codes: Any) -> np.ndarray:
        codes, layout = np.asarray(codes), code_layout(self.config)
        if codes.dtype.kind not in "iu" or codes.shape[1:] != layout.shape or not len(codes):
            raise VqbeamError(
                f"codes is {_kind(codes)}; give integers {_sizes(layout.shape)}, as encode returns"
            )
        if codes.min() < 0 or codes.max() >= layout.num_codes:
            raise VqbeamError(
                f"codes go from {codes.min()} to {codes.max()}; this run has codes from 0 to "
                f"{layout.num_codes - 1}"
            )
        return codes.astype("int32")


def _kind(array: np.ndarray) -> str:
    """Returns dtype and shape in words."""
    return f"{array.dtype} {list(array.shape)}"


def _sizes(shape: Sequence[int]) -> str:
    return f"[{', '.join(['N', *map(str, shape)])}]"
