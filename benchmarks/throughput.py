"""Compares encoding and preparing through Beam with bare loops, and measures both at many sizes.

    python benchmarks/throughput.py RUN --data-dir FOLDER

RUN is a finished run on tfds:cifar10, and FOLDER is where TFDS keeps that dataset. Each measurement
runs in its own process, and the two sides take turns. Larger datasets repeat the same images with
hard links. `--sizes 10000,100000,1000000` counts training images, to which the 10,000 held-out
images are added; it takes about half an hour and 10 GB. Do not run other programs at the same time.
"""

import argparse
import pathlib
import statistics
import sys
import tempfile
from collections import defaultdict

sys.path.append(str(pathlib.Path(__file__).parents[1]))

from side_by_side import ask, table

WORKS = ("encode", "prepare")
LIMITS = {"encode": 1.15, "prepare": 1.3}


def beside_loops(run: str, data_dir: str, count: int, turns: int) -> list[list[str]]:
    """Returns a row for encoding and for preparing: CPU time of both sides, and their ratio."""
    rows = []
    for work in WORKS:
        found = defaultdict(list)
        for _ in range(turns):
            for side in ("bare", "beam"):
                found[side].append(_measure(work, side, run, data_dir, count))
        bare, beam = (statistics.median(m["cpu"] for m in found[s]) for s in ("bare", "beam"))
        wall = statistics.median(m["seconds"] for m in found["beam"])
        images = found["beam"][0]["images"]
        each = [f"{1e6 * cpu / images:,.0f} µs" for cpu in (bare, beam)]
        rows.append(
            [
                work,
                *each,
                f"×{beam / bare:.2f}",
                f"×{LIMITS[work]}",
                f"{images / wall:,.0f} images/s",
            ]
        )
    return rows


def sizes(run: str, data_dir: str, counts: list[int]) -> list[list[str]]:
    """Returns a row for each stage and size: wall time per image, and peak memory."""
    rows = []
    for work in WORKS:
        for count in counts:
            found = _measure(work, "beam", run, data_dir, count)
            each = f"{1e6 * found['seconds'] / found['images']:,.0f} µs"
            rows.append([work, f"{found['images']:,}", each, f"{found['bytes'] / 2**20:,.0f} MB"])
    return rows


def _measure(work: str, side: str, run: str, data_dir: str, count: int) -> dict:
    with tempfile.TemporaryDirectory(dir=pathlib.Path(run).parent) as scratch:
        words = [work, side, run, data_dir, str(count), scratch]
        (found,) = ask(sys.executable, "throughput_work.py", words)
    return found


def main() -> None:
    """Measures and prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("run", help="folder of a finished run on tfds:cifar10")
    parser.add_argument("--data-dir", required=True, help="where TFDS keeps the dataset")
    parser.add_argument("--images", type=int, default=50_000, help="beside bare loops")
    parser.add_argument("--turns", type=int, default=3, help="turns of each side (default 3)")
    parser.add_argument("--sizes", default="", help="such as 10000,100000,1000000")
    given = parser.parse_args()
    run = str(pathlib.Path(given.run).resolve())
    header = ["CPU time of an image", "bare loop", "through Beam", "ratio", "goal", "wall"]
    print(table(header, beside_loops(run, given.data_dir, given.images, given.turns)), flush=True)
    if given.sizes:
        counts = [int(count) for count in given.sizes.split(",")]
        header = ["work", "images", "wall time of an image", "peak memory"]
        print(f"\n{table(header, sizes(run, given.data_dir, counts))}")


if __name__ == "__main__":
    main()
