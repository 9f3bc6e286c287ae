"""Where a codebook begins: at vectors of the data, or at the centres of their clusters."""

import numpy as np
from keras import ops

from vqbeam.vqvae.quantizers.nearest import nearest_codes

_ITERATIONS = 10


def initial_codebook(vectors, num_codes: int, method: str, seed: int):
    """Returns a codebook float32 [K, D] and how many vectors choose each code, float32 [K].

    Args:
        vectors: float32 tensor [N, D].
        num_codes: K. Where there are fewer vectors than codes, some are taken twice.
        method: "data" for K of the vectors, "kmeans" for the centres after some rounds of Lloyd's
            algorithm (1982, https://doi.org/10.1109/TIT.1982.1056489) from there.
        seed: Of the choice of vectors.
    """
    if method not in ("data", "kmeans"):
        raise ValueError(f"method is {method!r}; choose 'data' or 'kmeans'")
    numbers = np.random.default_rng(seed)
    codebook = _draw(vectors, num_codes, numbers)
    for _ in range(_ITERATIONS if method == "kmeans" else 0):
        counts, sums = _assigned(vectors, codebook)
        # An empty cluster starts again at another vector.
        centres = sums / ops.maximum(counts, 1.0)[:, None]
        codebook = ops.where(counts[:, None] > 0, centres, _draw(vectors, num_codes, numbers))
    return codebook, _assigned(vectors, codebook)[0]


def _draw(vectors, num_codes, numbers):
    size = vectors.shape[0]
    return ops.take(vectors, numbers.choice(size, num_codes, replace=size < num_codes), axis=0)


def _assigned(vectors, codebook):
    codes = nearest_codes(vectors, codebook)
    ones = ops.ones_like(codes, dtype="float32")
    num_codes = codebook.shape[0]
    return (
        ops.segment_sum(ones, codes, num_segments=num_codes),
        ops.segment_sum(vectors, codes, num_segments=num_codes),
    )
