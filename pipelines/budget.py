"""Estimates the time of a run on this machine from trial steps, and fits its steps to a time."""

import contextlib
import dataclasses
import gc
import math
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import keras
import numpy as np
import tensorflow as tf

from vqbeam.configs import Config, override
from vqbeam.pipelines.sources import Unit, open_source
from vqbeam.pipelines.sources.images import encode_png
from vqbeam.pipelines.sources.source import DECODERS
from vqbeam.prior.training import build_optimizer as prior_optimizer
from vqbeam.prior.training import build_prior
from vqbeam.vqvae.augmentation import variant_count
from vqbeam.vqvae.building import build_model
from vqbeam.vqvae.finetuning.decoder import build_trainer
from vqbeam.vqvae.finetuning.features import (
    FEATURES_BATCH,
    build_classification,
    build_features,
)
from vqbeam.vqvae.fitting.data import TrainingData, training_data
from vqbeam.vqvae.fitting.devices import data_parallel, evenly_shared, peak_memory
from vqbeam.vqvae.fitting.optimizers import build_optimizer
from vqbeam.vqvae.fitting.program import steps_per_call, training_program
from vqbeam.vqvae.layout import code_layout
from vqbeam.vqvae.storage.labels import Labels
from vqbeam.vqvae.storage.run_folder import STAGES, RunFolder
from vqbeam.vqvae.training import VALIDATION_IMAGES, augmented_batches

# Two classes, since the number of classes does not affect the time of a step.
_LABELS = Labels(("a", "b"))
# A training with fewer steps takes seconds, mostly to start: a trial would take as long.
_FEWEST_STEPS = 100
# Seconds of trial steps, for a plan and to choose the number of steps.
PLAN_SECONDS, MINUTES_SECONDS = 2.0, 5.0
# The following are not measured on each machine; these values are from a CPU.
# Time of a forward pass, and of the encoder's, as shares of a training step.
_FORWARD, _ENCODER = 1 / 3, 1 / 6
# Time to sample a code, with cached keys and values, as a multiple of its share of a forward pass.
_SAMPLING = 4.0
# Time to compile a sampler, as a multiple of the time to compile a training step.
_SAMPLER_START = 0.8
# Seconds to load the libraries, and to open and close a stage.
_LOADING = 8.0
_STAGE = 1.5
# Seconds to read, encode and write an image, without the network.
_SECONDS_PER_IMAGE = 3e-4


@dataclasses.dataclass(frozen=True)
class Trial:
    """The measurements from the trial steps of a training.

    Attributes:
        step: Seconds of a step.
        start: Seconds to build and compile the program.
        parameters: Number of trained parameters.
    """

    step: float
    start: float
    parameters: int


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a run with its own progress bar, and the seconds that it takes.

    Attributes:
        stage: The stage that it belongs to.
        title: The title of its bar.
        start: Seconds before the bar moves.
        bar: Seconds of the bar.
        end: Seconds after it.
    """

    stage: str
    title: str
    start: float
    bar: float
    end: float = 0.0

    @property
    def seconds(self) -> float:
        """Seconds of the whole part."""
        return self.start + self.bar + self.end


# The trainings by the titles of their bars, with their stage and their number of steps.
TRAININGS: dict[str, tuple[str, Callable[[Config], int]]] = {
    "train vqvae": ("train-vqvae", lambda config: config.vqvae.steps),
    "features": ("train-vqvae", lambda config: config.vqvae.feature_steps),
    "decoder": ("train-vqvae", lambda config: config.vqvae.finetune_steps),
    "train prior": ("train-prior", lambda config: config.prior.steps),
}


def fit_to_minutes(
    config: Config, minutes: float, counts: Mapping[str, int], unit: Unit | None
) -> tuple[Config, dict[str, Trial]]:
    """Returns the config with training steps that fill a time on this machine, and the trials.

    Prints the numbers of steps.

    Args:
        config: The config, whose steps give the proportions between the trainings.
        minutes: Time for all stages, above 0, from the start of the command.
        counts: Number of images by split, as far as known.
        unit: A unit of the images that are not prepared yet; see `survey`.
    """
    begun = time.monotonic()
    trials = measure(config, tuple(STAGES), MINUTES_SECONDS, fewest=1)
    prepare = seconds_per_image(config, unit) if unit else 0.0
    used = _LOADING + time.monotonic() - begun
    fitted = scaled(config, 60 * minutes - used, trials, counts, prepare)
    total = used + sum(part.seconds for part in parts_of(fitted, trials, counts, prepare))
    for title, trial in trials.items():
        steps = TRAININGS[title][1](fitted)
        print(f"{title}: {steps:,} steps ({1e3 * trial.step:,.0f} ms each)", flush=True)
    if total > 66 * minutes:
        print(
            f"{minutes:g} minutes are too few: to start up, encode and sample alone takes about "
            f"{math.ceil(total / 60)}",
            flush=True,
        )
    return fitted, trials


def scaled(
    config: Config,
    seconds: float,
    trials: Mapping[str, Trial],
    counts: Mapping[str, int],
    prepare: float,
) -> Config:
    """Returns the config with all steps multiplied by one factor, to fill a time.

    The epochs are scaled as well, so their number stays the same, and so does the time of
    everything other than training steps.

    Args:
        config: The config.
        seconds: Time for all stages.
        trials: A trial of each training of the config.
        counts: See `parts_of`.
        prepare: See `parts_of`.
    """
    steps = sum(trial.step * TRAININGS[title][1](config) for title, trial in trials.items())
    all_parts = sum(part.seconds for part in parts_of(config, trials, counts, prepare))
    factor = max(0.0, seconds - (all_parts - steps)) / steps
    changes = {}
    for prefix, names in {"vqvae": ("steps", "finetune_steps"), "prior": ("steps",)}.items():
        section = getattr(config, prefix)
        before = min(section.steps_per_epoch, section.steps)
        epoch = factor * before
        # A number with many divisors: on a GPU, the steps of a call must divide it.
        epoch = 10 * round(epoch / 10) if epoch >= 100 else max(1, round(epoch))
        changes[f"{prefix}.steps_per_epoch"] = epoch
        for name in (*names, "warmup_steps"):
            steps = getattr(section, name)
            changes[f"{prefix}.{name}"] = max(1, round(steps / before * epoch)) if steps else 0
    return override(config, changes)


def with_steps_of(config: Config, other: Config) -> Config:
    """Returns the config with the steps of another one."""
    each = ("steps", "steps_per_epoch", "warmup_steps")
    changes = {}
    for section, names in {"vqvae": (*each, "finetune_steps"), "prior": each}.items():
        changes |= {f"{section}.{name}": getattr(getattr(other, section), name) for name in names}
    return override(config, changes)


def parts_of(
    config: Config, trials: Mapping[str, Trial], counts: Mapping[str, int], prepare: float
) -> list[Part]:
    """Returns the parts of all stages in order, without trainings that have no trial.

    Args:
        config: The config.
        trials: A trial of each training, by the title of its bar.
        counts: Number of images in the splits "train" and "validation", as far as known.
        prepare: Seconds to prepare an image.
    """
    train, held_out = counts.get("train", 0), counts.get("validation", VALIDATION_IMAGES)
    settings = config.vqvae
    parts = [Part("prepare", "prepare", _STAGE, prepare * sum(counts.values()))]
    for title, trial in trials.items():
        stage, steps = TRAININGS[title]
        section = settings if stage == "train-vqvae" else config.prior
        validated = _FORWARD * trial.step / section.batch_size
        bar, end = steps(config) * trial.step, 0.0
        if title.startswith("train "):
            epochs = math.ceil(section.steps / min(section.steps, section.steps_per_epoch))
            bar += epochs * min(held_out, VALIDATION_IMAGES) * validated
            end = held_out * validated + _STAGE
        if title == "train prior" and config.prior.pictures:
            bar += _SAMPLER_START * trial.start
            bar += epochs * _drawing(config, trial, config.prior.pictures, guided=False)
        parts.append(Part(stage, title, trial.start, bar, end))
    if "train vqvae" in trials:
        trial = trials["train vqvae"]
        images = held_out + train * variant_count(config.encode.augment)
        each = _ENCODER * trial.step / settings.batch_size + _SECONDS_PER_IMAGE
        parts.append(Part("encode", "encode", _STAGE + trial.start / 2, images * each))
    if "train prior" in trials:
        trial = trials["train prior"]
        drawn = _drawing(config, trial, config.sample.num, config.sample.guidance != 1)
        start = _STAGE + _SAMPLER_START * trial.start
        parts.append(Part("sample", "sample", start, drawn))
    return sorted(parts, key=lambda part: list(STAGES).index(part.stage))


def _drawing(config: Config, trial: Trial, images: int, guided: bool) -> float:
    """Returns the seconds to sample images; guidance takes two passes."""
    each = _FORWARD * trial.step / config.prior.batch_size
    return _SAMPLING * images * each * (2 if guided else 1)


def seconds_per_image(config: Config, unit: Unit) -> float:
    """Returns the seconds to prepare an image, measured for about one second."""
    times = [time.perf_counter()]
    for _ in open_source(config.data).convert(unit, encode_png):
        times.append(time.perf_counter())
        images = len(times) - 1
        # Results come in bursts of as many as there are threads.
        if times[-1] - times[0] >= 1 and images % DECODERS == 0:
            break
    # The first burst is not timed, if there are others: it includes opening the source.
    first = DECODERS if images >= 2 * DECODERS else 0
    return (times[-1] - times[first]) / (images - first)


def survey(run: RunFolder, config: Config) -> tuple[dict[str, int], Unit | None]:
    """Returns what can be known about the images of a run without reading them.

    Returns:
        The number of images by split, empty if unknown; and a unit of the images that are not
        prepared yet, None if all are prepared or if they are unknown.
    """
    if run.exists() and (made := run.manifest("prepare")):
        return made["counts"], None
    source = open_source(config.data)
    if not source.lists_at_once:
        return {}, None
    splits, labels = source.listing()  # `plan` may compare the files
    counts = {split: len(images) for split, images in splits.items()}
    return counts, source.units(splits, labels)[0]


def used_memory() -> int:
    """Returns the peak use of device memory in bytes, or on a CPU that of main memory."""
    unit = 1 if sys.platform == "darwin" else 1024
    return peak_memory() or unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(
    config: Config, stages: Sequence[str], seconds: float, fewest: int = _FEWEST_STEPS
) -> dict[str, Trial]:
    """Returns trials on random data for the trainings of stages, by the titles of their bars.

    Prints a line first, since this takes a while.

    Args:
        config: The config.
        stages: Names from `STAGES`.
        seconds: Duration of the trial steps of each training.
        fewest: Trainings with fewer steps get no trial.
    """
    wanted = [
        title
        for title, (stage, steps) in TRAININGS.items()
        if stage in stages and steps(config) >= fewest
    ]
    if wanted:
        print("measuring the speed of this machine ...", file=sys.stderr, flush=True)
    trials = {}
    for title in wanted:
        begun = time.perf_counter()
        with _devices(title, config):
            model, data, settings = _BUILDERS[title](config)
            trials[title] = _trial(model, data, settings.steps_per_epoch, seconds, begun)
    gc.collect()  # models have reference cycles, and the stages need the GPU's memory
    return trials


def _devices(title: str, config: Config) -> contextlib.AbstractContextManager[None]:
    """Returns the context of the devices that a training will have."""
    if title == "train prior":
        return data_parallel(config.prior.part_size, config.prior.dtype)
    return data_parallel(config.vqvae.batch_size, config.vqvae.dtype)


def _trial(
    model: keras.Model, data: TrainingData, epoch: int, seconds: float, begun: float
) -> Trial:
    # A hundred steps of a large model, as in a training, would take most of a minute.
    together = steps_per_call(math.gcd(epoch, 10))
    watch = _Stopwatch(together, seconds)
    with training_program(model, data, together) as program:
        model.fit(
            program.batches(0),
            steps_per_epoch=10**6,  # more than are ever done
            shuffle=False,
            verbose=0,
            callbacks=[watch],
        )
    parameters = sum(math.prod(variable.shape) for variable in model.trainable_variables)
    return Trial(watch.per_step, watch.first - begun, parameters)


class _Stopwatch(keras.callbacks.Callback):
    """Measures the time of steps, and ends training after some seconds."""

    def __init__(self, together: int, seconds: float):
        super().__init__()
        self.together, self.seconds = together, seconds
        self.calls, self.first, self.start, self.per_step = 0, 0.0, 0.0, 0.0

    def on_train_batch_end(self, batch, logs=None):
        now = time.perf_counter()
        self.calls += 1
        if self.calls == 1:
            self.first = now
        if self.calls <= 2:  # the first call compiles, and the second may still be slow
            self.start = now
            return
        self.per_step = (now - self.start) / (self.calls - 2) / self.together
        self.model.stop_training = now - self.start >= self.seconds


def _images(config: Config, batch_size: int, answers: bool = False) -> TrainingData:
    size = 4 * batch_size
    rng = np.random.default_rng(config.seed)
    images = rng.integers(0, 256, (size, *config.image_shape), np.uint8)
    if not answers:
        examples = tf.data.Dataset.from_tensor_slices({"image": images})
        return augmented_batches(examples, size, config, config.vqvae.augment)
    arrays = {"image": images, "label": np.arange(size, dtype=np.int32) % 2}
    return _batches(
        arrays,
        batch_size,
        lambda batch: (keras.ops.cast(batch["image"], "float32"), batch["label"]),
    )


def _batches(arrays: dict[str, np.ndarray], batch_size: int, prepare: Callable) -> TrainingData:
    return training_data(
        tf.data.Dataset.from_tensor_slices(arrays),
        size=len(next(iter(arrays.values()))),
        batch_size=batch_size,
        seed=0,
        numbers=lambda seed, count: {},
        prepare=prepare,
    )


def _vqvae(config: Config):
    model = build_model(config, data_variance=1.0)
    model.compile(build_optimizer(config.vqvae))
    return model, _images(config, config.vqvae.batch_size), config.vqvae


def _features(config: Config):
    features = build_features(config.image_shape, len(_LABELS.names), config.vqvae.dtype)
    model = build_classification(features, config.vqvae.feature_steps, config.vqvae.dtype)
    return model, _images(config, evenly_shared(FEATURES_BATCH), answers=True), config.vqvae


def _decoder(config: Config):
    settings = config.vqvae
    features = build_features(config.image_shape, len(_LABELS.names), settings.dtype)
    model = build_model(config, data_variance=1.0)
    trainer = build_trainer(model, features if settings.perceptual else None, settings)
    return trainer, _images(config, settings.batch_size), settings


def _prior(config: Config):
    settings, layout = config.prior, code_layout(config)
    model = build_prior(config, _LABELS)
    model.compile(prior_optimizer(settings))
    size = 4 * settings.batch_size
    rng = np.random.default_rng(config.seed)
    codes = rng.integers(0, layout.num_codes, (size, *layout.shape), np.int32)
    arrays = {"codes": codes, "labels": np.zeros(size, np.int32)}
    return model, _batches(arrays, settings.batch_size, lambda batch: batch), settings


# By the title of each training, a function from a config to the compiled model, its data, and its
# section of the config.
_BUILDERS: dict[str, Callable] = {
    "train vqvae": _vqvae,
    "features": _features,
    "decoder": _decoder,
    "train prior": _prior,
}
