"""The sizes and operands that both sides of `stage1.py` share."""

import numpy as np

IMAGE_SIDE, NUM_CODES, CODE_DIM = 32, 512, 64
WIDTH, RESIDUAL_LAYERS, RESIDUAL_WIDTH = 128, 2, 32
BATCH_SIZE, LEARNING_RATE, COMMITMENT, DECAY = 32, 3e-4, 0.25, 0.99
WARM_UP_STEPS, BLOCK_STEPS, BLOCKS = 10, 12, 4
# Positions, inputs and outputs of the 3×3 convolution on the 8×8 grids of a batch.
MATMUL = (BATCH_SIZE * 8 * 8, 9 * WIDTH, WIDTH)
DTYPES = ("float32", "bfloat16")


def training_images() -> np.ndarray:
    """Returns noise as training images, uint8 [1024, 32, 32, 3]."""
    return numbers().integers(0, 256, (1024, IMAGE_SIDE, IMAGE_SIDE, 3), np.uint8)


def quantizer_operands(size: int, num_codes: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns vectors [1, N, D] and a codebook [K, D], float32."""
    drawn = numbers().standard_normal((size + num_codes, dim), "float32")
    return drawn[None, :size], drawn[size:]


def numbers() -> np.random.Generator:
    """Returns a random generator, which is the same on both sides."""
    return np.random.default_rng(0)


def matmul_shapes() -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns the shapes of the two factors of the matrix product that defines the limit."""
    return MATMUL[:2], MATMUL[1:]
