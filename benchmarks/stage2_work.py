"""What all sides of `stage2.py` share: the sizes, and how the limit is counted."""

import math

import numpy as np

LAYERS, WIDTH, HEADS, LABELS = 6, 256, 8, 10
HIDDEN = math.ceil(8 * WIDTH / 3 / 32) * 32  # of the feed-forward, with its three matrices
# Codes of an image, and the codebook's size.
GRIDS = {64: 512, 256: 1024}
SAMPLING_BATCHES = (1, 16, 64)
TRAINING_TOKENS = 4096  # in a batch
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 0.05
WARM_UP_STEPS, BLOCK_STEPS, BLOCKS = 4, 4, 4
DTYPES = ("float32", "bfloat16")
# Rows, inner and columns of the product whose speed is the limit.
MATMUL = (2048, WIDTH, 2 * HIDDEN)


def multiply_adds(num_codes: int) -> int:
    """Returns the multiplications by weights for one token; those of attention are left out."""
    block = 3 * WIDTH * WIDTH + WIDTH * WIDTH + 3 * WIDTH * HIDDEN
    return LAYERS * block + WIDTH * num_codes


def codes(length: int) -> np.ndarray:
    """Returns noise in the form of code grids, int32 [256, T]."""
    drawn = np.random.default_rng(0).integers(0, GRIDS[length], (256, length))
    return drawn.astype("int32")
