"""The plan of a command: its stages and steps, the time they take, and what they need."""

import dataclasses
import math
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence

from etils import epath

from vqbeam.configs import Config
from vqbeam.pipelines.budget import (
    PLAN_SECONDS,
    TRAININGS,
    Part,
    Trial,
    measure,
    parts_of,
    seconds_per_image,
    survey,
    used_memory,
)
from vqbeam.pipelines.errors import printable
from vqbeam.pipelines.inspect import file_size
from vqbeam.vqvae.augmentation import variant_count
from vqbeam.vqvae.fitting.devices import describe_devices
from vqbeam.vqvae.fitting.progress import clock, seconds_after, seconds_of_bar
from vqbeam.vqvae.layout import code_layout
from vqbeam.vqvae.storage.files import is_local
from vqbeam.vqvae.storage.run_folder import MODELS, RunFolder

# Maximum number of checkpoints on disk, each with weights and two averages of the optimizer.
_CHECKPOINTS = 3


def announce(
    run: RunFolder,
    config: Config,
    stages: Sequence[str],
    trials: Mapping[str, Trial] | None = None,
    here: bool = True,
) -> None:
    """Prints a plan of the stages about to run; progress bars then show the total time as well.

    Args:
        run: The run.
        config: Its config.
        stages: The stages to run, in order.
        trials: Trials of the trainings; None to make them now.
        here: Whether the stages run on this machine; if not, no times are predicted.
    """
    if here and trials is None and set(stages) & {*MODELS}:
        trials = measure(config, stages, PLAN_SECONDS)
    trials = {
        title: trial for title, trial in (trials or {}).items() if TRAININGS[title][0] in stages
    }
    counts, unit = survey(run, config)
    prepare = seconds_per_image(config, unit) if trials and unit and "prepare" in stages else 0.0
    done = {stage: run.trained_steps(stage) for stage in stages if stage in MODELS}
    parts = [
        _rest(part, config, done)
        for part in parts_of(config, trials, counts, prepare)
        if part.stage in stages
    ]
    foretell(parts)
    for line in plan_lines(run, config, stages, parts, counts, trials, done):
        print(line, file=sys.stderr)
    # Shown before training, so that a wrong folder is noticed in time.
    if unit and unit.labels.names:
        names = textwrap.shorten(", ".join(unit.labels.names), 36, placeholder=" …")
        labels = f"{len(unit.labels.names):,}: {printable(names)}"
        print(f"  {unit.labels.kind:<12} {labels}", file=sys.stderr)
    sys.stderr.flush()


def _rest(part: Part, config: Config, done: Mapping[str, int]) -> Part:
    """Returns a part without the time of the steps that are already done."""
    steps = done.get(part.stage, 0)
    if not steps or part.title not in ("train vqvae", "train prior"):
        return part
    share = 1 - min(1.0, steps / TRAININGS[part.title][1](config))
    return dataclasses.replace(part, bar=part.bar * share)


def foretell(parts: Sequence[Part]) -> None:
    """Tells each bar how many seconds it and the parts after it are expected to take."""
    seconds_of_bar.clear()
    seconds_after.clear()
    later = 0.0
    for part in reversed(parts):
        if part.bar:
            seconds_of_bar[part.title] = part.bar
        seconds_after[part.title] = later + part.end
        later += part.seconds


def plan_lines(
    run: RunFolder,
    config: Config,
    stages: Sequence[str],
    parts: Sequence[Part],
    counts: Mapping[str, int],
    trials: Mapping[str, Trial],
    done: Mapping[str, int],
) -> list[str]:
    """Returns the plan as lines of fewer than 60 characters, except those with paths or devices.

    Args:
        run: The run.
        config: Its config.
        stages: The stages to run, in order.
        parts: Their parts.
        counts: Number of images by split, as far as known.
        trials: Trials of the trainings.
        done: Steps that are already done, by stage.
    """
    lines = [f"plan for {run.root}:"]
    total = sum(part.seconds for part in parts)
    for stage in stages:
        # A training without a trial takes seconds, or its time is unknown.
        tried = stage not in MODELS or any(TRAININGS[title][0] == stage for title in trials)
        seconds = sum(part.seconds for part in parts if part.stage == stage)
        time = f"about {clock(seconds)}" if trials and tried and seconds >= 1 else ""
        work = _work(stage, config, counts)
        if done.get(stage):
            work += f", {done[stage]:,} done"
        lines.append(f"  {stage:<12} {work:<30} {time:>13}".rstrip())
    if trials:
        lines.append(f"  {'in all':<43} {f'about {clock(total)}':>13}")
    needed = _disk(config, stages, counts, trials)
    if needed and is_local(run.root):
        free = shutil.disk_usage(_existing(run.root)).free
        lines.append(f"  disk         up to {file_size(needed)}, of {file_size(free)} free")
        if needed > free:
            lines.append("  the disk is too full: make room, or choose another --run-dir")
    for title, trial in trials.items():
        # Rounded, since the trial does not know how many classes there are.
        lines.append(f"  {title:<12} about {float(f'{trial.parameters:.2g}'):,.0f} parameters")
    if set(stages) & {*MODELS}:
        lines.append(f"  codes        {code_layout(config).describe()}")
        lines += [f"  device       {line}" for line in describe_devices().splitlines()]
    if trials:
        lines.append(f"  memory       {file_size(used_memory())} in trial steps, and the dataset")
    return lines


def _work(stage: str, config: Config, counts: Mapping[str, int]) -> str:
    settings, images = config.vqvae, sum(counts.values())
    match stage:
        case "train-vqvae":
            more = f" + {settings.finetune_steps:,}" if settings.finetune_steps else ""
            return f"{settings.steps:,}{more} steps of {settings.batch_size}"
        case "train-prior":
            most = "up to " if config.prior.early_stopping else ""
            return f"{most}{config.prior.steps:,} steps of {config.prior.batch_size}"
        case "encode":
            images += (variant_count(config.encode.augment) - 1) * counts.get("train", 0)
        case "sample":
            images = config.sample.num
    return f"{images:,} images" if images else "images not counted yet"


def _disk(
    config: Config, stages: Sequence[str], counts: Mapping[str, int], trials: Mapping[str, Trial]
) -> int:
    """Returns an upper estimate of the bytes that stages write, as far as known."""
    bytes_of_code = math.ceil((config.vqvae.num_codes - 1).bit_length() / 7)  # as protocol buffers
    codes = code_layout(config).length * bytes_of_code + 100
    views = sum(counts.values()) + (variant_count(config.encode.augment) - 1) * counts.get(
        "train", 0
    )
    found = sum(4 * trial.parameters * (1 + 3 * _CHECKPOINTS) for trial in trials.values())
    found += sum(counts.values()) * math.prod(config.image_shape) * ("prepare" in stages)
    return found + views * codes * ("encode" in stages)


def _existing(path: epath.Path) -> epath.Path:
    """Returns a path, or the nearest folder above it that exists."""
    path = path.resolve()
    return next(place for place in (path, *path.parents) if place.exists())
