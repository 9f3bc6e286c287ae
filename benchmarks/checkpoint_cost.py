"""Times the writing of checkpoints, as a share of the time of training.

    python benchmarks/checkpoint_cost.py
    python benchmarks/checkpoint_cost.py --backend jax

Trains the models of some presets for a few steps on noise, with a checkpoint after each step, and
prints the size of a checkpoint, the median time to write one, and the share of that time in a
training with the default interval. Do not run other programs at the same time.
"""

import argparse
import os
import pathlib
import statistics
import sys
import tempfile
import time
from unittest import mock

sys.path.append(str(pathlib.Path(__file__).parents[1]))

HEADER = ["model", "MB", "seconds to write", "seconds between", "share of training"]
PRESETS = ("glyphs", "cifar10", "imagenet64")
BATCH_SIZE = 2  # a checkpoint does not depend on it


def untrained(preset: str, part: str):
    """Returns a compiled model, its data, and a function from a batch to the input."""
    import numpy as np

    from vqbeam import configs
    from vqbeam.prior.training import build_optimizer as build_prior_optimizer
    from vqbeam.prior.training import build_prior
    from vqbeam.vqvae.building import build_model
    from vqbeam.vqvae.fitting.optimizers import build_optimizer
    from vqbeam.vqvae.layout import code_layout
    from vqbeam.vqvae.model import scale_images
    from vqbeam.vqvae.storage.labels import Labels

    config, numbers = configs.load_preset(preset), np.random.default_rng(0)
    if part == "vqvae":
        model = build_model(config, data_variance=1.0)
        model.compile(build_optimizer(config.vqvae))
        images = numbers.integers(0, 256, (64, *config.image_shape), dtype="uint8")
        return model, {"images": images}, lambda batch: scale_images(batch["images"])
    model = build_prior(config, Labels(("a", "b")))
    model.compile(build_prior_optimizer(config.prior))
    layout = code_layout(config)
    codes = numbers.integers(0, layout.num_codes, (64, *layout.shape)).astype("int32")
    return model, {"codes": codes, "labels": np.arange(64, dtype="int32") % 2}, lambda batch: batch


def written(model, held, prepare, steps: int) -> list[tuple[float, float]]:
    """Returns the seconds and the MB of each checkpoint that a training writes."""
    import tensorflow as tf
    from etils import epath

    from vqbeam.vqvae.fitting.checkpoints import Checkpoints
    from vqbeam.vqvae.fitting.data import training_data
    from vqbeam.vqvae.fitting.fit import Schedule, fit

    found, save = [], Checkpoints._save_within_epoch

    def timed(checkpoints, step):
        begun = time.perf_counter()
        save(checkpoints, step)
        seconds = time.perf_counter() - begun
        found.append((seconds, checkpoints._files()[step].stat().length / 1e6))

    data = training_data(
        tf.data.Dataset.from_tensor_slices(held),
        size=64,
        batch_size=BATCH_SIZE,
        seed=0,
        numbers=lambda seed, count: {},
        prepare=prepare,
    )
    schedule = Schedule(
        title="checkpoints", steps=steps, steps_per_epoch=steps, batch_size=BATCH_SIZE, seed=0
    )
    at_each_step = dict(seconds=0, largest_share=float("inf"), _save_within_epoch=timed)
    with (
        mock.patch.multiple(Checkpoints, **at_each_step),
        tempfile.TemporaryDirectory() as folder,
    ):
        fit(model, schedule, data, None, epath.Path(folder), ["f"])
    return found


def row(preset: str, part: str, steps: int) -> list[str]:
    """Returns a row of the table."""
    from vqbeam.vqvae.fitting.checkpoints import Checkpoints

    found = written(*untrained(preset, part), steps)
    seconds = statistics.median(seconds for seconds, _ in found)
    pause = max(Checkpoints.seconds, seconds / Checkpoints.largest_share)
    return [
        f"{preset}, {part}",
        f"{found[0][1]:.1f}",
        f"{seconds:.3f}",
        f"{pause:.0f}",
        f"{seconds / (pause + seconds):.2%}",
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--backend", choices=("jax", "tensorflow"), default="tensorflow")
    parser.add_argument("--smoke", action="store_true", help="one preset, to see that it runs")
    words = parser.parse_args()
    os.environ["KERAS_BACKEND"] = words.backend
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from side_by_side import table

    presets, steps = (PRESETS[:1], 3) if words.smoke else (PRESETS, 8)
    rows = [row(preset, part, steps) for preset in presets for part in ("vqvae", "prior")]
    print(table(HEADER, rows))
