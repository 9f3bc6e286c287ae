"""Codes drawn from the prior of a run, decoded to images."""

import dataclasses
from typing import Any

import numpy as np

from configs import SampleConfig, VqbeamError
from pipelines.labels import label_name
from pipelines.provenance import checkpoint
from prior.sampler import Sampler, sampler_arguments
from prior.training import load_prior
from prior.transformer import CodePrior
from vqvae.compilation import compile_function, in_batches
from vqvae.labels import Labels
from vqvae.model import VQVAE
from vqvae.progress import progress_bar
from vqvae.run_folder import RunFolder
from vqvae.training import load_vqvae


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


def draw_samples(
    run: RunFolder, settings: SampleConfig, seed: int, labels: np.ndarray, first: int = 0
) -> Samples:
    """Draws codes from the prior of a run and decodes them.

    Args:
        run: Both of its models are trained.
        settings: All of it but `num` counts.
        seed: Of the random numbers.
        labels: int32 [N]; −1 for none; or of attributes [N, A].
        first: Index of the first image among those of the seed.

    Raises:
        VqbeamError: A model is missing, or a setting or label is out of range.
    """
    prior, known = load_prior(run), learned_labels(run)
    if not known.names and settings.guidance != 1:
        raise VqbeamError(f"guidance is {settings.guidance}, but {run.root} has no classes; use 1")
    # Rounding may depend on the place in a batch: each image has the same one always.
    ahead = first % settings.batch_size
    padded = np.concatenate([np.repeat(labels[:1], ahead, axis=0), labels])
    indices = first - ahead + np.arange(len(padded))
    codes = draw_grids(prior, settings, seed, padded, indices=indices)
    images = decode(load_vqvae(run), codes, settings.batch_size)
    used = provenance(run, settings, seed)
    names = [label_name(label, known) for label in labels] if known.names else None
    return Samples(images[ahead:], codes[ahead:], labels, names, used, first)


def draw_grids(
    prior: CodePrior, settings: SampleConfig, seed: int, labels: np.ndarray, **given: Any
) -> np.ndarray:
    """Draws codes, int32 [N, *layout.shape], with a progress bar; `given` goes to `Sampler`."""
    with progress_bar("sample", len(labels)) as bar:
        return Sampler(prior, settings.batch_size)(
            labels,
            seed,
            on_batch=lambda drawn: bar.update(drawn - bar.n),
            **sampler_arguments(settings, prior.layout.length),
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


def decode(model: VQVAE, codes: np.ndarray, batch_size: int) -> np.ndarray:
    """Returns the images of codes.

    Args:
        model: The VQ-VAE.
        codes: Integers [N, *layout.shape].
        batch_size: Images decoded at once.

    Returns:
        uint8 [N, H, W, C].
    """
    compiled = compile_function(model.decode, model.variables, jit=False)
    return in_batches(compiled, codes, batch_size)
