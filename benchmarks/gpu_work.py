"""The sizes and the data that both sides of `gpu.py` share: those of the presets for GPUs.

Of vqbeam, it imports only the presets, for which the standard library is enough.
"""

import pathlib
import sys

sys.path.append(str(pathlib.Path(__file__).parents[1]))

import numpy as np
from measuring import SMOKE

from vqbeam.configs import Config, load_preset, override, smoke

PRESETS = ("imagenet64",) if SMOKE else ("cifar10_gpu", "imagenet64")
PARTS = ("stage1", "stage2", "encode", "sampling")
BATCHES = (2,) if SMOKE else (1, 64, 1024)  # of sampling
# Steps that are timed together, three times: a step of this transformer takes a third of a second.
STEPS = {("stage2", "imagenet64"): 20}
USUAL_STEPS, BLOCKS = 100, 3
LABELS = 10


def preset(name: str) -> Config:
    """Returns a preset; its quantizer restarts no codes, since that of the other side does not."""
    config = override(load_preset(name), {"vqvae.restart_below": 0.0})
    return smoke(config) if SMOKE else config


def grid(config: Config) -> tuple[int, int]:
    """Returns the sides of the code grid of an image."""
    return config.data.height // config.vqvae.downsampling, (
        config.data.width // config.vqvae.downsampling
    )


def images(config: Config, count: int) -> np.ndarray:
    """Returns noise as images, uint8 [N, H, W, C]."""
    return np.random.default_rng(0).integers(0, 256, (count, *config.image_shape), np.uint8)


def codes(config: Config) -> np.ndarray:
    """Returns noise as grids of codes, int32 [4096, h, w]."""
    shape = (4096, *grid(config))
    return np.random.default_rng(0).integers(0, config.vqvae.num_codes, shape, np.int32)
