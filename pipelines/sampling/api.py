"""A trained run from Python: NumPy arrays in, NumPy arrays out.

The commands that use a trained run call the same methods.
"""

import base64
import contextlib
import dataclasses
import difflib
import functools
import hashlib
import html
import io
import json
import math
import operator
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
from etils import epath

from vqbeam.configs import Config, SampleConfig, VqbeamError
from vqbeam.pipelines.hub import local_run
from vqbeam.pipelines.sampling.input_images import kept_codes, region_mask
from vqbeam.prior.sampler import Sampler, Score, code_predictor, code_scorer
from vqbeam.prior.training import load_prior
from vqbeam.prior.transformer import CodePrior
from vqbeam.vqvae.figures import label_figure
from vqbeam.vqvae.fitting.devices import compiled_decoder, compiled_encoder, in_batches
from vqbeam.vqvae.fitting.progress import ProgressBar
from vqbeam.vqvae.layout import code_layout
from vqbeam.vqvae.model import VQVAE
from vqbeam.vqvae.storage.files import read_json, write_json
from vqbeam.vqvae.storage.labels import Label, Labels, label_name, labels_for, parse_label
from vqbeam.vqvae.storage.run_folder import MODELS, STAGES, RunFolder
from vqbeam.vqvae.training import MODEL_FILE, load_vqvae

_DEFAULTS_FILE = "sample.json"
# Limit for the pixels of images that are sampled at once.
_MOST_BYTES = 2**34
# Maximum number of images that a notebook shows.
_MOST_SHOWN = 128
# Settings that only one guidance schedule uses, and that schedule.
_OF_SCHEDULE = {
    "guidance_power": "cosine",
    "guidance_start": "interval",
    "guidance_end": "interval",
}


def open(path: epath.PathLike) -> "Run":
    """Returns the run in a folder or on the Hugging Face hub.

    Args:
        path: The --run-dir of `vqbeam run`, local or gs://; or hf://USER/NAME[@REVISION], which is
            downloaded if it is not in the cache.

    Raises:
        VqbeamError: The folder holds no run, or the run cannot be downloaded.
    """
    return Run(local_run(os.fspath(path)))


@dataclasses.dataclass(frozen=True, repr=False)
class Samples:
    """New images and the settings that they were sampled with.

    Attributes:
        images: uint8 [N, H, W, C].
        codes: int32 [N, h, w], or another shape that `Run.encode` returns.
        labels: Classes, int32 [N], or attributes, int32 [N, A]; −1 for any.
        names: The name of each image's label, "" for any; None if the run has no labels.
        settings: Preset, checkpoint, seed and sampler settings.
        first: The index of the first image among those of the seed; the others follow.
    """

    images: np.ndarray
    codes: np.ndarray
    labels: np.ndarray
    names: list[str] | None
    settings: dict[str, Any]
    first: int = 0

    def __repr__(self) -> str:
        return f"Samples({_kind(self.images)}, seed {self.settings['seed']})"

    def _repr_html_(self) -> str:
        """Returns the HTML that a notebook shows: the images as a grid, under their labels."""
        shown = slice(_MOST_SHOWN)
        names = self.names and self.names[shown]
        title = f"{len(self.images):,} new images"
        text = f"{title}, seed {self.settings['seed']}, checkpoint {self.settings['checkpoint']}"
        buffer = io.BytesIO()
        label_figure(self.images[shown], names, fill=True).save(buffer, "PNG")
        return f"{_picture(buffer.getvalue(), title)}<p>{html.escape(text)}</p>"


class Run:
    """A trained run, opened with `vqbeam.open`.

    Models are loaded and compiled on first use, and then kept. `encode`, `decode`, `reconstruct`
    and `codebook` need only the VQ-VAE; the other methods need the prior as well.

    Every method raises a one-line VqbeamError if a model is not trained yet or if an argument does
    not fit the run.

    Args:
        path: The run's folder.

    Attributes:
        path: The run's folder.
        config: The run's config.
    """

    def __init__(self, path: epath.PathLike):
        self.folder = RunFolder(path, remember=True)
        self.path = self.folder.root
        self.config: Config = self.folder.load_config()
        self.sampler = functools.cache(lambda batch_size: Sampler(self.prior, batch_size))
        self._scorer = functools.cache(
            lambda precision: code_scorer(self.prior, precision=precision)
        )

    def __repr__(self) -> str:
        return f"vqbeam.open({str(self.path)!r})"

    def _repr_html_(self) -> str:
        """Returns the HTML that a notebook shows: figures with their meaning, and pictures."""
        from vqbeam.pipelines.report.facts import key_figures, read_facts

        facts = read_facts(self.folder)
        title = f"{facts.root}: preset {facts.config.name}, seed {facts.config.seed}"
        rows = "".join(
            f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>"
            for row in key_figures(facts)
        )
        pictures = ""
        for stage, name, text in (
            ("train-vqvae", "reconstructions.png", "Held-out images above their reconstructions"),
            ("sample", "samples.png", "New images"),
        ):
            path = self.folder.folder(stage) / name
            if path.exists() and not self.folder.is_stale(stage):
                pictures += f"<p>{text}</p>{_picture(path.read_bytes(), text)}"
        return f"<b>{html.escape(title)}</b><table>{rows}</table>{pictures}"

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes, or of the attributes, by number; empty if there are none."""
        for stage in ("train-prior", "encode", "prepare"):
            if manifest := self.folder.manifest(stage):
                return Labels.of(manifest).names
        raise VqbeamError(f"{self.path} has no images yet, so its labels are not known")

    @property
    def history(self) -> dict[str, list[dict[str, float]]]:
        """The metrics of each epoch of `train-vqvae` and `train-prior`, once they are finished."""
        manifests = {stage: self.folder.manifest(stage) or {} for stage in STAGES}
        return {stage: made["history"] for stage, made in manifests.items() if "history" in made}

    @functools.cached_property
    def codebook(self) -> np.ndarray:
        """The codebook vectors, float32 [K, D].

        With several codebooks it is [levels, K, D]: the levels of the residual quantizer, or the
        coarse and the fine grid. The predictive quantizer adds these vectors to its predictions.
        The vectors of fsq and lfq are fixed.
        """
        model = self.vqvae
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
        """Returns new images, the same ones as `vqbeam sample` with the same arguments.

        Args:
            num: Number of images; by default one for each label, or else the run's own number.
            labels: Labels to use in turn: names or numbers of classes; names of attributes, joined
                by commas; or None for any. By default all classes, or each attribute alone.
            seed: Image i of a seed is always the same image. By default the run's own seed.
            **settings: `temperature`, `top_k`, `top_p`, `min_p`, `guidance` and the other fields
                of `vqbeam.configs.SampleConfig`; by default the run's own.
        """
        if isinstance(labels, str):
            labels = [labels]
        if labels is not None and not len(labels):
            raise VqbeamError("labels is empty; give at least one, or None for all classes")
        if num is None and labels is not None:
            num = len(labels)
        chosen = self.settings(num=num, **settings)
        self.check_count(chosen.num)
        rows = labels_for(labels, self.prior_labels, chosen.num)
        return self.sample_rows(rows, self.seed(seed), chosen)

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Returns the codes of images.

        Args:
            images: uint8 [N, H, W, C], of the run's own shape.

        Returns:
            int32 [N, h, w]; [N, h, w, depth] with the residual quantizer; [N, T] with two grids.
        """
        codes = in_batches(self.encoder, self._checked_images(images), self._batch_size)
        return codes.astype("int32", copy=False)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Returns the images, uint8 [N, H, W, C], for codes of the kind that `encode` returns."""
        return in_batches(self.decoder, self._checked_codes(codes), self._batch_size)

    def reconstruct(self, images: np.ndarray) -> np.ndarray:
        """Returns the images encoded and decoded again, uint8 [N, H, W, C]."""
        return self.decode(self.encode(images))

    def log_likelihood(
        self,
        images: np.ndarray,
        labels: Sequence[Any] | None = None,
        *,
        precision: str | None = None,
    ) -> np.ndarray:
        """Returns the log-likelihood of the codes of images, as `vqbeam score` does.

        Args:
            images: uint8 [N, H, W, C].
            labels: One label for each image, as in `sample`; None for unconditional likelihoods.
            precision: "exact" or "fast"; by default the run's own.

        Returns:
            log p(codes | label) in nats, float32 [N].
        """
        precision = self.settings(precision=precision).precision
        codes = self.encode(images)
        if labels is None:
            labels = [None] * len(codes)
        if isinstance(labels, str) or len(labels) != len(codes):
            raise VqbeamError(f"labels must be a list of {len(codes)}, one for each image")
        rows = np.asarray([parse_label(label, self.prior_labels) for label in labels], np.int32)
        return self.code_log_likelihood(codes, rows, precision)

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
        """Returns images of which a part is kept and the rest is sampled.

        The codes of the kept part stay, so it looks as in the reconstruction. The other codes are
        sampled in the order of the sequence, each conditioned on all codes before it, so the kept
        part does not influence earlier codes. With several candidates it does: those are chosen
        under which the kept codes are most likely.

        Args:
            images: uint8 [N, H, W, C].
            keep: "top-half", "bottom-half", "left-half", "right-half", the path of a mask (white
                is kept), or a bool array [H, W], True where the images are kept.
            num: Number of completions of each image.
            candidates: Number of candidates sampled for each completion; the best are returned.
            label: Name or number of the class of the images; None for unknown.
            seed: Seed of the random numbers; by default the run's own.
            **settings: See `sample`.

        Returns:
            uint8 [N, num, H, W, C].
        """
        images, mask = self._checked_images(images), self._mask(keep)
        for name, value in {"num": num, "candidates": candidates}.items():
            if value < 1:
                raise VqbeamError(f"{name} is {value}; it must be at least 1")
        sampled = num * candidates
        chosen = self.settings(**settings).with_at_most(len(images) * sampled)
        keep_codes = kept_codes(mask, self.vqvae.layout)
        known = np.repeat(in_batches(self.encoder, images, chosen.batch_size), sampled, axis=0)
        rows = np.repeat([self.completion_label(label)], len(known), axis=0)
        codes = self.sample_codes(rows, self.seed(seed), chosen, known=(known, keep_codes))
        codes = codes.reshape(len(images), sampled, *codes.shape[1:])
        if candidates > 1:
            score = code_scorer(self.prior, keep_codes, chosen.precision)
            codes = _likeliest(score, codes, rows[: chosen.batch_size], num)
        decoded = in_batches(self.decoder, codes.reshape(-1, *codes.shape[2:]), chosen.batch_size)
        return decoded.reshape(len(images), num, *decoded.shape[1:])

    def interpolate(
        self,
        start: Any,
        end: Any,
        num: int = 4,
        *,
        steps: int = 8,
        seed: int | None = None,
        **settings: Any,
    ) -> np.ndarray:
        """Returns rows of images, each with the same random numbers, from one label to another.

        The logits of column i are those of classifier-free guidance, u + s·(c - u), where c is
        replaced by (1 - w)·c + w·c' of the two labels and w = i / (steps - 1).

        Args:
            start: Name or number of the class of the first column; or attributes, as in `sample`.
            end: The same for the last column.
            num: Number of rows.
            steps: Number of columns, at least 2.
            seed: Seed of the random numbers; by default the run's own.
            **settings: See `sample`.

        Returns:
            uint8 [num, steps, H, W, C].
        """
        if not self.prior_labels.names:
            raise VqbeamError(f"{self.path} has no classes to interpolate; it was trained without")
        first, last = (parse_label(label, self.prior_labels) for label in (start, end))
        if first == last:
            name = label_name(first, self.prior_labels)
            raise VqbeamError(f"the first and the last class are both {name}; give two classes")
        for name, value, least in (("num", num, 1), ("steps", steps, 2)):
            if value < least:
                raise VqbeamError(f"{name} is {value}; it must be at least {least}")
        chosen = self.settings(**settings).with_at_most(num * steps)
        weights = np.tile(np.linspace(0, 1, steps), num)
        codes = self.sample_codes(
            np.repeat([first], len(weights), axis=0),
            self.seed(seed),
            chosen,
            towards=(np.repeat([last], len(weights), axis=0), weights),
            indices=np.repeat(np.arange(num), steps),
        )
        images = in_batches(self.decoder, codes, chosen.batch_size)
        return images.reshape(num, steps, *images.shape[1:])

    # The rest is for the commands, and not documented as public.

    @functools.cached_property
    def vqvae(self) -> VQVAE:
        """The trained VQ-VAE."""
        return load_vqvae(self.folder)

    @functools.cached_property
    def prior(self) -> CodePrior:
        """The trained prior."""
        return load_prior(self.folder)

    @functools.cached_property
    def encoder(self) -> Callable[[Any], Any]:
        """The compiled encoder, from a batch of images to codes; see `compiled_encoder`."""
        return compiled_encoder(self.vqvae)

    @functools.cached_property
    def decoder(self) -> Callable[[Any], Any]:
        """The compiled decoder, from a batch of codes to images; see `compiled_decoder`."""
        return compiled_decoder(self.vqvae)

    @functools.cached_property
    def _predict(self) -> Callable[[Any, Any], np.ndarray]:
        return code_predictor(self.prior)

    @functools.cached_property
    def prior_labels(self) -> Labels:
        """The classes or attributes that the prior was trained with."""
        return Labels.of(self.folder.require("train-prior", among=MODELS))

    @functools.cached_property
    def checkpoint(self) -> str:
        """A fingerprint of the weights of both models, whatever the date of their files."""
        sums = []
        for stage in MODELS:
            self.folder.require(stage, among=MODELS)
            path = self.folder.folder(stage) / MODEL_FILE
            with path.open("rb") as file, zipfile.ZipFile(file) as archive:
                members = {member.filename: member.CRC for member in archive.infolist()}
            members.pop("metadata.json", None)  # it holds the date
            sums.append(sorted(members.items()))
        return hashlib.sha256(json.dumps(sums).encode()).hexdigest()[:16]

    def seed(self, seed: int | None) -> int:
        """Returns the seed, or for None the run's own; raises a VqbeamError if it is no integer."""
        try:
            return operator.index(self.config.seed if seed is None else seed)
        except TypeError:
            raise VqbeamError(f"seed is {seed!r}; give an integer") from None

    def default_settings(self) -> SampleConfig:
        """Returns the run's settings, without guidance if the prior has no labels.

        They come from `sample.json` (see `store_default_settings`), or else from the config.

        Raises:
            VqbeamError: The run has no trained prior, or `sample.json` cannot be used.
        """
        path = self.path / _DEFAULTS_FILE
        settings = self.config.sample
        if path.exists():
            try:
                settings = SampleConfig(**read_json(path))
            except (TypeError, VqbeamError) as error:
                raise VqbeamError(
                    f"{path} does not fit this version of vqbeam ({error}); delete it"
                ) from error
        return settings if self.prior_labels.names else dataclasses.replace(settings, guidance=1.0)

    def store_default_settings(self, settings: SampleConfig) -> epath.Path:
        """Makes `settings` the run's defaults; returns the file that stores them."""
        path = self.path / _DEFAULTS_FILE
        write_json(path, dataclasses.asdict(settings))
        return path

    def settings(self, **changes: Any) -> SampleConfig:
        """Returns the run's settings with the changes that are not None.

        Raises:
            VqbeamError: See `default_settings`; or a setting is unknown or out of range, or this
                prior cannot be guided.
        """
        known = [field.name for field in dataclasses.fields(SampleConfig)]
        for name in changes:
            if name not in known:
                nearest = difflib.get_close_matches(name, known, 1)
                hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(known)}"
                raise VqbeamError(f"there is no setting {name}; {hint}")
        changes = {
            name: value.item() if isinstance(value, np.generic) else value
            for name, value in changes.items()
            if value is not None
        }
        changed = self.checked(dataclasses.replace(self.default_settings(), **changes))
        for name, schedule in _OF_SCHEDULE.items():
            if name in changes and changed.guidance_schedule != schedule:
                raise VqbeamError(
                    f"{name} is {changes[name]}, but guidance_schedule "
                    f"{changed.guidance_schedule} does not use it; set it to {schedule}"
                )
        return changed

    def checked(self, settings: SampleConfig) -> SampleConfig:
        """Returns the settings; raises a VqbeamError if the prior cannot be guided as they ask."""
        settings.check_guidance(bool(self.prior_labels.names), self.config.prior.label_dropout)
        return settings

    def check_count(self, num: int) -> None:
        """Raises a VqbeamError if `num` images would take too much memory at once."""
        most = _MOST_BYTES // math.prod(self.config.image_shape)
        if num > most:
            raise VqbeamError(
                f"num is {num:,}; at most {most:,} images are sampled at once, and any number by "
                "vqbeam generate"
            )

    def provenance(self, settings: SampleConfig, seed: int) -> dict[str, Any]:
        """Returns, by name, what sampled images depend on, to be stored in their files."""
        models = {"preset": self.config.name, "checkpoint": self.checkpoint, "seed": seed}
        return models | dataclasses.asdict(settings)

    def sample_rows(
        self,
        labels: np.ndarray,
        seed: int,
        settings: SampleConfig,
        first: int = 0,
        on_batch: Callable[[int], None] | None = None,
    ) -> Samples:
        """Returns one new image for each label.

        Args:
            labels: Classes, int32 [N], −1 for any; or attributes, int32 [N, A].
            seed: Seed of the random numbers.
            settings: Sampler settings and batch size.
            first: The index of the first image among those of the seed.
            on_batch: Called after each batch with the number of images so far; None shows a
                progress bar.
        """
        settings = settings.with_at_most(settings.num)
        # Rounding may depend on the position in a batch, so each image always has the same one.
        ahead = first % settings.batch_size
        padded = np.concatenate([np.repeat(labels[:1], ahead, axis=0), labels])
        indices = first - ahead + np.arange(len(padded))
        codes = self.sample_codes(padded, seed, settings, on_batch=on_batch, indices=indices)
        images = in_batches(self.decoder, codes, settings.batch_size)
        known = self.prior_labels
        names = [label_name(label, known) for label in labels] if known.names else None
        facts = self.provenance(settings, seed)
        return Samples(images[ahead:], codes[ahead:], labels, names, facts, first)

    def sample_codes(
        self,
        labels: np.ndarray,
        seed: int,
        settings: SampleConfig,
        on_batch: Callable[[int], None] | None = None,
        **inputs: Any,
    ) -> np.ndarray:
        """Returns sampled codes, int32 [N, *layout.shape]; `inputs` are those of `Sampler`."""
        sampler = self.sampler(settings.batch_size)
        with contextlib.nullcontext(on_batch) if on_batch else _bar(len(labels)) as moved:
            return sampler(labels, seed, settings, on_batch=moved, **inputs)

    def code_log_likelihood(
        self, codes: np.ndarray, labels: np.ndarray, precision: str
    ) -> np.ndarray:
        """Returns log p(codes | label) in nats, float32 [N].

        Args:
            codes: int32 [N, *layout.shape].
            labels: Classes, int32 [N], −1 for none; or attributes, int32 [N, A].
            precision: "exact" or "fast".
        """
        score = self._scorer(precision)

        def nats(rows):
            return score(codes[rows], labels[rows])

        return in_batches(nats, np.arange(len(codes)), self._batch_size)

    def code_log_probabilities(self, codes: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Returns log p(code | label, previous codes) of each of the K codes at each position.

        Args:
            codes: int32 [N, *layout.shape], computed in one batch, so N must be small.
            labels: Classes, int32 [N], −1 for none; or attributes, int32 [N, A].

        Returns:
            float32 [N, T, K].
        """
        return self._predict(codes, labels)

    def completion_label(self, label: Any) -> Label:
        """Returns the result of `parse_label`, but for None the class, if there is only one."""
        known = self.prior_labels
        if label is None and known.kind == "classes" and len(known.names) == 1:
            return 0
        return parse_label(label, known)

    @property
    def _batch_size(self) -> int:
        return self.config.encode.batch_size

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


def _picture(png: bytes, alt: str) -> str:
    data = base64.b64encode(png).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'


def _likeliest(score: Score, codes: np.ndarray, labels: np.ndarray, num: int) -> np.ndarray:
    """Returns the `num` most likely candidates of each image, the best first.

    Args:
        score: From `code_scorer`.
        codes: [N, candidates, *layout.shape].
        labels: The labels of a batch, [B] or [B, A]; every batch has the same.
        num: Number of candidates to choose.
    """
    flat = codes.reshape(-1, *codes.shape[2:])
    scores = in_batches(lambda batch: score(batch, labels), flat, len(labels))
    best = np.argsort(-scores.reshape(codes.shape[:2]), axis=1, kind="stable")[:, :num]
    return codes[np.arange(len(codes))[:, None], best]


@contextlib.contextmanager
def _bar(total: int) -> Iterator[Callable[[int], None]]:
    """Shows a progress bar; yields the function that sets its position."""
    with ProgressBar("sample", total) as bar:
        yield lambda done: bar.update(done - bar.n)


def _kind(array: np.ndarray) -> str:
    """Returns dtype and shape as text."""
    return f"{array.dtype} {list(array.shape)}"


def _sizes(shape: Sequence[int]) -> str:
    return f"[{', '.join(['N', *map(str, shape)])}]"
