"""Blockwise nearest-code search and codebook initialization."""

import numpy as np
from keras import ops

from vqbeam.vqvae.fitting.devices import full_precision, on_cpu

# Scores per block. On a CPU they take 4 MB, which fits in a core's cache. On a GPU, which computes
# one block after the other, they take 256 MB, so that a training batch is a single block.
BLOCK_SIZE = 2**20
_GPU_BLOCK_SIZE = 2**26
# Maximum number of codes per block.
_MAX_CODES = 4096
# Scores are first reduced to their maximum per group of this many codes: a maximum over a small,
# fixed number of elements uses vector instructions; argmax over all codes does not.
_GROUP = 64


def nearest_codes(vectors, codebook, penalties=None, block_size=None):
    """Returns the index of the nearest code by squared L2 distance for each vector.

    Ties go to the lowest index. The nearest code maximizes z·e − ‖e‖²/2 = (‖z‖² − ‖z − e‖²)/2.
    These scores are computed in float32, in blocks of vectors and codes, so memory use does not
    grow with N·K. No gradient flows.

    Args:
        vectors: float32 [N, D]. N may be 0 or unknown at trace time.
        codebook: float32 [K, D].
        penalties: float32 [K], added to the squared distances to each code; None for none.
        block_size: Approximate number of scores in memory at once; None chooses for the device.

    Returns:
        int32 [N] in [0, K).
    """
    if block_size is None:
        block_size = BLOCK_SIZE if on_cpu() else _GPU_BLOCK_SIZE
    codes = _code_blocks(ops.stop_gradient(codebook), penalties, block_size)  # [G, D + 1, k]
    size = ops.shape(vectors)[0]
    rows = _row_blocks(ops.stop_gradient(vectors), max(1, block_size // codes.shape[-1]))
    with full_precision():
        if rows.shape[0] == 1:
            nearest = _nearest_of_block(rows[0], codes)
        else:
            nearest = ops.map(lambda block: _nearest_of_block(block, codes), rows)
    return ops.reshape(nearest, (-1,))[:size]


def _code_blocks(codebook, penalties, block_size):
    """Returns the codes as [G, D + 1, k]: columns e above −‖e‖²/2, or −inf for padding."""
    num_codes = codebook.shape[0]
    count = -(-num_codes // min(_MAX_CODES, max(_GROUP, block_size)))
    width = _GROUP * -(-num_codes // (count * _GROUP))
    added = count * width - num_codes
    offsets = ops.sum(ops.square(codebook), axis=1, keepdims=True)
    if penalties is not None:
        offsets = offsets + ops.stop_gradient(penalties)[:, None]
    codes = ops.concatenate(
        [
            ops.pad(codebook, ((0, added), (0, 0))),
            ops.pad(-0.5 * offsets, ((0, added), (0, 0)), constant_values=-float("inf")),
        ],
        axis=1,
    )
    return ops.transpose(ops.reshape(codes, (count, width, -1)), (0, 2, 1))


def _row_blocks(vectors, most):
    """Returns the vectors as [B, R, D + 1], with a last column of ones and R at most `most`."""
    size, dim = ops.shape(vectors)
    filled = ops.maximum(size, 1) if ops.is_tensor(size) else max(size, 1)
    count = -(-filled // most)
    length = -(-filled // count)
    rows = ops.concatenate([vectors, ops.ones_like(vectors[:, :1])], axis=1)
    # Not ops.pad, which does not accept widths that are unknown at trace time.
    rows = ops.concatenate([rows, ops.zeros((count * length - size, dim + 1))], axis=0)
    return ops.reshape(rows, (count, length, dim + 1))


def _nearest_of_block(rows, codes):
    """Returns the indices [R] for rows [R, D + 1] and codes [G, D + 1, k], block by block."""
    count, _, width = codes.shape

    def step(i, found):
        best, index = _best_of_block(rows, codes[i])
        better = best > found[0]  # not ≥: ties go to the lowest index
        return ops.where(better, best, found[0]), ops.where(better, index + i * width, found[1])

    first = _best_of_block(rows, codes[0])
    return first[1] if count == 1 else ops.fori_loop(1, count, step, first)[1]


def _best_of_block(rows, codes):
    """Returns the highest score of each row [R] and the index of its code [R]."""
    groups = codes.shape[1] // _GROUP
    scores = ops.reshape(ops.matmul(rows, codes), (-1, groups, _GROUP))
    highest = ops.max(scores, axis=2)  # [R, groups]
    best = ops.max(highest, axis=1)
    group = _first(highest == best[:, None])
    places = ops.arange(ops.shape(rows)[0], dtype="int32") * groups + group
    members = ops.take(ops.reshape(scores, (-1, _GROUP)), places, axis=0)  # [R, _GROUP]
    return best, group * _GROUP + _first(members == best[:, None])


def _first(mask):
    """Returns the index of the first True in each row, or 0 if there is none, as with NaN."""
    # Cast to integers, since Keras's argmax over floats makes several passes to handle −0.0.
    return ops.argmax(ops.cast(mask, "int32"), axis=1)


_ITERATIONS = 10


def initial_codebook(vectors, num_codes: int, method: str, seed: int):
    """Returns a codebook, float32 [K, D], and the number of vectors per code, float32 [K].

    Args:
        vectors: float32 tensor [N, D].
        num_codes: Codebook size K. If N < K, vectors are sampled with replacement.
        method: "data" samples K of the vectors; "kmeans" then runs ten iterations of Lloyd's
            algorithm (1982, https://doi.org/10.1109/TIT.1982.1056489) from them.
        seed: Random seed.

    Raises:
        ValueError: `method` is neither.
    """
    if method not in ("data", "kmeans"):
        raise ValueError(f"method is {method!r}; choose 'data' or 'kmeans'")
    numbers = np.random.default_rng(seed)
    codebook = _draw(vectors, num_codes, numbers)
    for _ in range(_ITERATIONS if method == "kmeans" else 0):
        counts, sums = _assigned(vectors, codebook)
        # Empty clusters restart at random vectors.
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
