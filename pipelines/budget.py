"""Training steps for a given time: the speed of this machine is measured first."""

import time
from collections.abc import Callable

import keras
import numpy as np

from vqbeam.configs import Config, override
from vqbeam.prior.training import build_optimizer as prior_optimizer
from vqbeam.prior.training import build_prior
from vqbeam.vqvae.building import build_model
from vqbeam.vqvae.finetuning.decoder import build_trainer
from vqbeam.vqvae.finetuning.features import build_features
from vqbeam.vqvae.fitting.optimizers import build_optimizer
from vqbeam.vqvae.layout import code_layout
from vqbeam.vqvae.storage.labels import Labels

# The rest goes to everything else: reading, compiling, encoding, validating and sampling.
_SHARE_OF_TRAINING = 0.85
_SECONDS_OF_EACH = 5.0
# A prior with classes takes as long for any number of them.
_LABELS = Labels(("a", "b"))


def fit_to_minutes(config: Config, minutes: float) -> Config:
    """Returns the config with as many training steps as take about that time on this machine.

    Prints the numbers of steps.

    Args:
        config: The config, whose steps say how the time is divided.
        minutes: Time for all stages, above 0.
    """
    print("measuring the speed of this machine ...", flush=True)
    seconds = _seconds_per_step(config)
    fitted = scaled(config, minutes, seconds)
    counts = ", ".join(
        f"{of(fitted):,} steps of {name} ({1e3 * seconds[name]:,.0f} ms each)"
        for name, of in _TRAININGS.items()
        if name in seconds
    )
    print(f"for {minutes:g} minutes: {counts}", flush=True)
    return fitted


def scaled(config: Config, minutes: float, seconds: dict[str, float]) -> Config:
    """Returns the config with all steps and epochs multiplied by one factor, to fit the time.

    Args:
        config: The config.
        minutes: Time for all stages.
        seconds: Time of a step, for each training of the config by name; see `_TRAININGS`.
    """
    before = sum(each * _TRAININGS[name](config) for name, each in seconds.items())
    factor = 60 * minutes * _SHARE_OF_TRAINING / before
    changes = {}
    for prefix, names in {"vqvae": ("steps", "finetune_steps"), "prior": ("steps",)}.items():
        section = getattr(config, prefix)
        epoch = factor * min(section.steps_per_epoch, section.steps)
        # A number with divisors: on a GPU, a call of the training program takes one of them.
        epoch = 10 * round(epoch / 10) if epoch >= 100 else max(1, round(epoch))
        changes[f"{prefix}.steps_per_epoch"] = epoch
        for name in names:
            epochs = getattr(section, name) / min(section.steps_per_epoch, section.steps)
            changes[f"{prefix}.{name}"] = round(epochs) * epoch
    return override(config, changes)


def with_steps_of(config: Config, other: Config) -> Config:
    """Returns the config with the steps of another one."""
    names = ("vqvae.steps", "vqvae.steps_per_epoch", "vqvae.finetune_steps", "prior.steps")
    changes = {}
    for name in (*names, "prior.steps_per_epoch"):
        section, _, field = name.partition(".")
        changes[name] = getattr(getattr(other, section), field)
    return override(config, changes)


# By name, the number of steps of each training.
_TRAININGS: dict[str, Callable[[Config], int]] = {
    "stage 1": lambda config: config.vqvae.steps,
    "its decoder": lambda config: config.vqvae.finetune_steps,
    "stage 2": lambda config: config.prior.steps,
}


def _seconds_per_step(config: Config) -> dict[str, float]:
    """Returns the time of a step of each training, on random data."""
    settings, rng = config.vqvae, np.random.default_rng(config.seed)
    images = rng.uniform(-1, 1, (settings.batch_size, *config.image_shape)).astype("float32")
    model = build_model(config, data_variance=1.0)
    model.compile(build_optimizer(settings))
    seconds = {"stage 1": _seconds(model, images)}
    if settings.finetune_steps:
        features = build_features(config.image_shape, len(_LABELS.names), settings.dtype)
        seconds["its decoder"] = _seconds(build_trainer(model, features, settings), images)
    prior = build_prior(config, _LABELS)
    prior.parts = config.prior.grad_accumulation
    prior.compile(prior_optimizer(config.prior))
    size, layout = config.prior.batch_size, code_layout(config)
    codes = rng.integers(0, layout.num_codes, (size, *layout.shape), np.int32)
    inputs = {"codes": codes, "labels": np.zeros(size, np.int32)}
    return seconds | {"stage 2": _seconds(prior, inputs)}


def _seconds(model: keras.Model, batch) -> float:
    for _ in range(2):  # compiles
        model.train_on_batch(batch)
    start, steps = time.perf_counter(), 0
    while steps < 2 or time.perf_counter() - start < _SECONDS_OF_EACH:
        model.train_on_batch(batch)
        steps += 1
    return (time.perf_counter() - start) / steps
