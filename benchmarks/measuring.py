"""Measures time and memory, and reports them to `side_by_side.py`."""

import ctypes
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable

# Set by `--smoke`: everything is done once, to see that it runs; the times mean nothing.
SMOKE = "SMOKE" in os.environ or "--smoke" in sys.argv


def seconds(call: Callable[[], object], least: int = 3, budget: float = 1.5) -> float:
    """Returns the median time of a call; call once before, to exclude one-time work."""
    least, budget = (1, 0) if SMOKE else (least, budget)
    times: list[float] = []
    while len(times) < least or sum(times) < budget:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def step_seconds(step: Callable[[], object], warm_up: int, steps: int, blocks: int) -> float:
    """Returns the seconds per step: the median over blocks of `steps`, after a warm-up."""
    warm_up, steps, blocks = (1, 1, 1) if SMOKE else (warm_up, steps, blocks)
    for _ in range(warm_up):
        step()

    def block():
        for _ in range(steps):
            step()

    return seconds(block, least=blocks, budget=0) / steps


def resident_bytes() -> int:
    """Returns the resident memory of the process without freed memory (Linux with glibc)."""
    ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")


def peak_bytes(call: Callable[[], object], before: int) -> int:
    """Returns the peak of resident memory during a call, minus `before`."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the current size
    call()
    return max(0, _status("VmHWM") - before)


def report(work: str, variant: str = "", **measures) -> None:
    """Prints one measurement for `side_by_side.ask`, which reads standard output."""
    print(json.dumps({"work": work, "variant": variant, **measures}), flush=True)


def _status(name: str) -> int:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
