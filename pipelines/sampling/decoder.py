"""Codes drawn from the prior of a run, decoded to images."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from vqbeam.configs import SampleConfig, VqbeamError
from vqbeam.pipelines.sampling.labels import label_name
from vqbeam.pipelines.sampling.provenance import checkpoint
from vqbeam.prior.likelihood import Score, code_scorer
from vqbeam.prior.sampler import Sampler, sampler_arguments
from vqbeam.prior.training import load_prior
from vqbeam.prior.transformer import CodePrior
from vqbeam.vqvae.fitting.compilation import compiled_decoder, compiled_encoder, in_batches
from vqbeam.vqvae.fitting.progress import progress_bar
from vqbeam.vqvae.model import VQVAE
from vqbeam.vqvae.storage.files import read_json, write_json
from vqbeam.vqvae.storage.labels import Labels
from vqbeam.vqvae.storage.run_folder import RunFolder
from vqbeam.vqvae.training import load_vqvae


@dataclasses.dataclass(frozen=True)
class Samples:
    """New images and what they were drawn with.

    Attributes:
        images: uint8 [N, H, W, C].
        codes: int32 [N, *layout.shape].
        labels: int32 [N]; −1 for none; or of attributes [N, A].
        names: The label's name of each image; None where the run has no classes.
        settings: Preset, checkpoint, seed and sampler settings.
        first: Index of the first image among those of the seed; the others follow.
    """

    images: np.ndarray
    codes: np.ndarray
    labels: np.ndarray
    names: list[str] | None
    settings: dict
    first: int = 0


class Models:
    """The models of a run and what is compiled of them: each is made on first use, and kept.

    Args:
        run: The run. A model that it lacks is a VqbeamError on first use.
    """

    def __init__(self, run: RunFolder):
        self.run = run
        self.sampler = functools.cache(lambda batch_size: Sampler(self.prior, batch_size))

    @functools.cached_property
    def vqvae(self) -> VQVAE:
        """The trained VQ-VAE."""
        return load_vqvae(self.run)

    @functools.cached_property
    def prior(self) -> CodePrior:
        """The trained prior."""
        return load_prior(self.run)

    @functools.cached_property
    def encode(self) -> Callable[[Any], Any]:
        """See `compiled_encoder`."""
        return compiled_encoder(self.vqvae)

    @functools.cached_property
    def decode(self) -> Callable[[Any], Any]:
        """See `compiled_decoder`."""
        return compiled_decoder(self.vqvae)

    @functools.cached_property
    def score(self) -> Score:
        """See `code_scorer`."""
        return code_scorer(self.prior)


class Drawer:
    """Both models of a run, loaded once and then drawn from as often as is asked.

    Args:
        run: Both of its models are trained.
        settings: All of it but `num` counts.
        seed: Of the random numbers.
        models: Those of the run, where they are loaded already.

    Raises:
        VqbeamError: A model is missing, or there is nothing to guide towards.
    """

    def __init__(
        self, run: RunFolder, settings: SampleConfig, seed: int, models: Models | None = None
    ):
        self.known = learned_labels(run)
        if not self.known.names and settings.guidance != 1:
            raise VqbeamError(
                f"guidance is {settings.guidance}, but {run.root} has no classes; use 1"
            )
        models = models or Models(run)
        self.arguments = sampler_arguments(settings, models.prior.layout.length)
        self.sampler = models.sampler(settings.batch_size)
        self.decode = models.decode
        self.batch_size, self.seed = settings.batch_size, seed
        self.provenance = provenance(run, settings, seed)

    def __call__(
        self,
        labels: np.ndarray,
        first: int = 0,
        on_batch: Callable[[int], None] | None = None,
    ) -> Samples:
        """Draws codes and decodes them.

        Args:
            labels: int32 [N]; −1 for none; or of attributes [N, A].
            first: Index of the first image among those of the seed.
            on_batch: Called with the number of images drawn so far.

        Raises:
            VqbeamError: A setting or label is out of range.
        """
        # Rounding may depend on the place in a batch: each image has the same one always.
        ahead = first % self.batch_size
        padded = np.concatenate([np.repeat(labels[:1], ahead, axis=0), labels])
        indices = first - ahead + np.arange(len(padded))
        codes = self.sampler(
            padded, self.seed, indices=indices, on_batch=on_batch, **self.arguments
        )
        images = in_batches(self.decode, codes, self.batch_size)
        names = [label_name(label, self.known) for label in labels] if self.known.names else None
        return Samples(images[ahead:], codes[ahead:], labels, names, self.provenance, first)


def draw_samples(
    run: RunFolder,
    settings: SampleConfig,
    seed: int,
    labels: np.ndarray,
    first: int = 0,
    models: Models | None = None,
) -> Samples:
    """Draws from the prior of a run with a progress bar, and decodes; see `Drawer`."""
    drawer = Drawer(run, settings, seed, models)
    with _bar(first % settings.batch_size + len(labels)) as move:
        return drawer(labels, first, move)


def draw_grids(
    models: Models, settings: SampleConfig, seed: int, labels: np.ndarray, **given: Any
) -> np.ndarray:
    """Draws codes, int32 [N, *layout.shape], with a progress bar; `given` goes to `Sampler`."""
    with _bar(len(labels)) as move:
        return models.sampler(settings.batch_size)(
            labels,
            seed,
            on_batch=move,
            **sampler_arguments(settings, models.prior.layout.length),
            **given,
        )


def fitted(settings: SampleConfig, count: int) -> SampleConfig:
    """Returns the settings with batches no larger than the images that are drawn."""
    return dataclasses.replace(settings, batch_size=min(settings.batch_size, count))


def learned_labels(run: RunFolder) -> Labels:
    """Returns the classes or attributes that the prior of a run has learned."""
    return Labels.of(run.require("train-prior"))


def provenance(run: RunFolder, settings: SampleConfig, seed: int) -> dict:
    """Returns what decides how images are drawn, by name, for their files."""
    drawn_by = {"preset": run.load_config().name, "checkpoint": checkpoint(run), "seed": seed}
    return drawn_by | dataclasses.asdict(settings)


@contextlib.contextmanager
def _bar(total: int) -> Iterator[Callable[[int], None]]:
    """Shows a progress bar while the block runs; gives what moves it to so many images."""
    with progress_bar("sample", total) as bar:
        yield lambda drawn: bar.update(drawn - bar.n)


_FILE = "sample.json"


def sampling_defaults(run: RunFolder) -> SampleConfig:
    """Returns the run's settings, without guidance where there are no classes to guide towards.

    Raises:
        VqbeamError: The run has no trained prior, or what is stored is not what vqbeam stores.
    """
    path = run.root / _FILE
    settings = _stored(path) if path.exists() else run.load_config().sample
    has_classes = bool(run.require("train-prior")["label_names"])
    return settings if has_classes else dataclasses.replace(settings, guidance=1.0)


def _stored(path: epath.Path) -> SampleConfig:
    try:
        return SampleConfig(**read_json(path))
    except TypeError as error:
        raise VqbeamError(
            f"{path} does not fit this version of vqbeam ({error}); delete it"
        ) from error


def changed_defaults(run: RunFolder, settings: Mapping[str, Any]) -> SampleConfig:
    """Returns the run's settings with those that are not None in place of its own.

    Raises:
        VqbeamError: As `sampling_defaults`; or the run cannot be guided, or not so.
    """
    changes = {name: value for name, value in settings.items() if value is not None}
    changed = dataclasses.replace(sampling_defaults(run), **changes)
    bounds = [name for name in ("guidance_start", "guidance_end") if name in changes]
    if bounds and changed.guidance_schedule != "interval":
        raise VqbeamError(
            f"{bounds[0]} is {changes[bounds[0]]}, but guidance_schedule "
            f"{changed.guidance_schedule} has no start and no end; set it to interval"
        )
    check_guidance(run, changed)
    return changed


def check_guidance(run: RunFolder, settings: SampleConfig) -> None:
    """Raises a VqbeamError where the settings guide away from what the run's prior never saw."""
    if settings.guidance != 1 and not run.load_config().prior.label_dropout:
        raise VqbeamError(
            f"guidance is {settings.guidance}, but {run.root} was trained with "
            "prior.label_dropout 0 and does not know images without a label; use 1"
        )


def store_sampling_defaults(run: RunFolder, settings: SampleConfig) -> epath.Path:
    """Has all later drawing from a run go by these settings; returns the file that says so."""
    path = run.root / _FILE
    write_json(path, dataclasses.asdict(settings))
    return path
