"""The sizes that all sides of `stage2.py` share, and the count of multiply-adds."""

import math

import numpy as np

LAYERS, WIDTH, HEADS, LABELS = 6, 256, 8, 10
HIDDEN = math.ceil(8 * WIDTH / 3 / 32) * 32  # of the feed-forward layer, which has three matrices
# Number of codes of an image: size of the codebook.
GRIDS = {64: 512, 256: 1024}
SAMPLING_BATCHES = (1, 16, 64)
TRAINING_TOKENS = 4096  # per batch
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 0.05
WARM_UP_STEPS, BLOCK_STEPS, BLOCKS = 4, 4, 4
DTYPES = ("float32", "bfloat16")
# Rows, inner dimension and columns of the matrix product that defines the limit.
MATMUL = (2048, WIDTH, 2 * HIDDEN)


def multiply_adds(num_codes: int) -> int:
    """Returns the multiply-adds with weights for one token, without those of attention."""
    block = 3 * WIDTH * WIDTH + WIDTH * WIDTH + 3 * WIDTH * HIDDEN
    return LAYERS * block + WIDTH * num_codes


def codes(length: int) -> np.ndarray:
    """Returns noise as grids of codes, int32 [256, T]."""
    drawn = np.random.default_rng(0).integers(0, GRIDS[length], (256, length))
    return drawn.astype("int32")
