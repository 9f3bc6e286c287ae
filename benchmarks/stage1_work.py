"""What both sides of `stage1.py` share: the sizes, and how time and memory are taken."""

import ctypes
import json
import pathlib
import statistics
import time
from collections.abc import Callable

import numpy as np

IMAGE_SIDE, NUM_CODES, CODE_DIM = 32, 512, 64
WIDTH, RESIDUAL_LAYERS, RESIDUAL_WIDTH = 128, 2, 32
BATCH_SIZE, LEARNING_RATE, COMMITMENT, DECAY = 32, 3e-4, 0.25, 0.99
WARM_UP_STEPS, BLOCK_STEPS, BLOCKS = 10, 12, 4
# Of the 3×3 convolution on the 8×8 grids of a batch: positions, inputs, outputs.
MATMUL = (BATCH_SIZE * 8 * 8, 9 * WIDTH, WIDTH)
DTYPES = ("float32", "bfloat16")


def training_images() -> np.ndarray:
    """Returns noise in the form of training images, uint8 [1024, 32, 32, 3]."""
    return numbers().integers(0, 256, (1024, IMAGE_SIDE, IMAGE_SIDE, 3), np.uint8)


def quantizer_operands(size: int, num_codes: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns vectors [1, N, D] and a codebook [K, D], float32."""
    drawn = numbers().standard_normal((size + num_codes, dim), "float32")
    return drawn[None, :size], drawn[size:]


def numbers() -> np.random.Generator:
    """Returns the same stream of random numbers on both sides."""
    return np.random.default_rng(0)


def matmul_shapes() -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns the shapes of the factors of the product whose speed is the limit."""
    return MATMUL[:2], MATMUL[1:]


def seconds(call: Callable[[], object], least: int = 3, budget: float = 1.5) -> float:
    """Returns the median time of a call; make one before, for what is done once."""
    times: list[float] = []
    while len(times) < least or sum(times) < budget:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def resident_bytes() -> int:
    """Returns how much memory the process holds, without what it has freed; Linux with glibc."""
    ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")


def peak_bytes(call: Callable[[], object], before: int) -> int:
    """Returns by how much resident memory is above `before` at most during a call."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # sets the peak to the present size
    call()
    return max(0, _status("VmHWM") - before)


def report(work: str, variant: str = "", **measures) -> None:
    """Gives one measurement to `stage1.py`, which reads standard output."""
    print(json.dumps({"work": work, "variant": variant, **measures}), flush=True)


def _status(name: str) -> int:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
