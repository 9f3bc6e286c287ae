"""Random numbers that depend on the seed, the image and the position alone."""

import numpy as np


def uniforms(seed: int, indices: np.ndarray, length: int) -> np.ndarray:
    """Returns one uniform number for each image and position.

    Row i depends on `seed` and `indices[i]` only, so that an image is the same at any batch size,
    on any backend and on any machine. The generator is Philox4x64 of Salmon et al., "Parallel
    Random Numbers: As Easy as 1, 2, 3" (https://doi.org/10.1145/2063384.2063405): its key is the
    seed, and the top word of its counter is the image.

    Args:
        seed: Any integer; it is taken modulo 2^128.
        indices: Integers [N] from 0 up, which image each row is for.
        length: Numbers for an image.

    Returns:
        A float32 array [N, length] in [0, 1).
    """
    rows = [_raw(seed, index, length) for index in np.asarray(indices, "uint64")]
    # 24 bits are all that float32 holds: with more, the largest would round to 1.
    bits = np.array(rows, "uint64").reshape(len(rows), length) >> np.uint64(40)
    return bits.astype("float32") * np.float32(2**-24)


def _raw(seed: int, index: np.uint64, length: int) -> np.ndarray:
    counter = np.array([0, 0, 0, index], "uint64")
    return np.random.Philox(key=seed % 2**128, counter=counter).random_raw(length)
