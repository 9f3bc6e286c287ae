"""Uniform random numbers that depend only on the seed, the image and the position."""

import numpy as np


def uniforms(seed: int, indices: np.ndarray, length: int) -> np.ndarray:
    """Returns uniform random numbers in [0, 1), one for each image and position.

    Row i depends only on `seed` and `indices[i]`, so an image is the same for any batch size,
    backend and machine. The generator is Philox4x64 of Salmon et al., "Parallel Random Numbers: As
    Easy as 1, 2, 3" (https://doi.org/10.1145/2063384.2063405). Its key is the seed, and the top
    word of its counter is the image index.

    Args:
        seed: Any integer, reduced modulo 2^128.
        indices: Image index of each row, integers [N], at least 0.
        length: Random numbers per image.

    Returns:
        A float32 array [N, length] in [0, 1).
    """
    rows = [_raw(seed, index, length) for index in np.asarray(indices, "uint64")]
    # float32 has a precision of 24 bits: with more bits, the largest numbers would round to 1.
    bits = np.array(rows, "uint64").reshape(len(rows), length) >> np.uint64(40)
    return bits.astype("float32") * np.float32(2**-24)


def _raw(seed: int, index: np.uint64, length: int) -> np.ndarray:
    counter = np.array([0, 0, 0, index], "uint64")
    return np.random.Philox(key=seed % 2**128, counter=counter).random_raw(length)
