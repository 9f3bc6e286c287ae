"""The sizes that all sides of `stage2.py` share, and the count of multiply-adds."""

import math

import numpy as np

LAYERS, WIDTH, HEADS, LABELS = 6, 256, 8, 10
# Number of codes of an image: size of the codebook.
GRIDS = {64: 512, 256: 1024}
SAMPLING_BATCHES = (1, 16, 64)
TRAINING_TOKENS = 4096  # per batch
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 0.05
WARM_UP_STEPS, BLOCK_STEPS, BLOCKS = 4, 4, 4
DTYPES = ("float32", "bfloat16")
# Rows, inner dimension and columns of the matrix product that defines the limit.
MATMUL = (2048, WIDTH, 1408)


def hidden(width: int) -> int:
    """Returns the width of the feed-forward layer, which has three matrices."""
    return math.ceil(8 * width / 3 / 32) * 32


def multiply_adds(num_codes: int, layers: int = LAYERS, width: int = WIDTH) -> int:
    """Returns the multiply-adds with weights for one token, without those of attention."""
    block = 4 * width * width + 3 * width * hidden(width)
    return layers * block + width * num_codes


def codes(length: int) -> np.ndarray:
    """Returns noise as grids of codes, int32 [256, T]."""
    drawn = np.random.default_rng(0).integers(0, GRIDS[length], (256, length))
    return drawn.astype("int32")
