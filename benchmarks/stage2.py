"""Compares stage 2 with plain PyTorch and Hugging Face's transformers, on a CPU.

    python -m venv torchenv
    torchenv/bin/pip install -r benchmarks/requirements-torch.txt
    python benchmarks/stage2.py --torch-python torchenv/bin/python

Measures sampling, in batches of 1, 16 and 64 images, and training, for a prior with 6 layers, width
256 and 8 heads over grids of 64 and of 256 codes. Plain PyTorch runs the same transformer with a
static cache (`stage2_torch.py`); transformers runs a GPT-2 of the same size with `generate`. Each
side first runs all its variants (float32 and bfloat16; eager and compiled, which needs a C++
compiler) and then its fastest variants. All sides take turns, each time in a new process, and
medians over the turns are reported. Do not run other programs at the same time. The script prints a
table.
"""

import sys

import stage2_work as work
from side_by_side import Results, ask, options, publish

SCRIPTS = {
    "vqbeam": "stage2_vqbeam.py",
    "PyTorch": "stage2_torch.py",
    "transformers": "stage2_transformers.py",
}
HEADER = ["", *SCRIPTS, "to PyTorch", "to transformers", "share of the limit"]


def measure(python: dict[str, str], case: list[str], turns: int) -> dict[str, Results]:
    """Measures one case on the given sides, after a trial of all their variants."""
    tried = {side: Results() for side in python}
    for side, results in tried.items():
        results.add(ask(python[side], SCRIPTS[side], case))
    found = {side: Results() for side in python}
    for _ in range(turns):
        for side, results in found.items():
            variants = [] if side == "vqbeam" else tried[side].fastest_variants()
            results.add(ask(python[side], SCRIPTS[side], [*case, *variants]))
    return found


def sampling_row(length: int, batch_size: int, found: dict[str, Results]) -> list[str]:
    """Returns a row of images per second."""
    best = {side: results.fastest("sampling") for side, results in found.items()}
    rates = [f"{batch_size / seconds:,.1f} ({name})" for seconds, name in best.values()]
    work_done = batch_size * length * work.multiply_adds(work.GRIDS[length])
    share = work_done / speed_of(found["vqbeam"], "float32") / best["vqbeam"][0]
    title = f"images/s, T = {length}, K = {work.GRIDS[length]}, batch {batch_size}"
    return [title, *rates, *ratios(best), f"{share:.0%}"]


def training_row(length: int, found: dict[str, Results]) -> list[str]:
    """Returns a row of tokens per second, each side in its faster precision."""
    best = {side: results.fastest("training") for side, results in found.items()}
    rates = [f"{work.TRAINING_TOKENS / seconds:,.0f} ({name})" for seconds, name in best.values()]
    seconds, dtype = best["vqbeam"]
    # Forward, gradient of the inputs, gradient of the weights.
    work_done = 3 * work.TRAINING_TOKENS * work.multiply_adds(work.GRIDS[length])
    share = work_done / speed_of(found["vqbeam"], dtype) / seconds
    title = f"training, tokens/s, T = {length}"
    return [title, *rates, "", *ratios(best), "", f"{share:.0%}"]


def ratios(best: dict[str, tuple[float, str]]) -> list[str]:
    """Returns the speed of vqbeam relative to each of the other sides."""
    mine, *others = best.values()
    return [f"×{seconds / mine[0]:.2f}" for seconds, _ in others]


def speed_of(results: Results, dtype: str) -> float:
    """Returns the multiply-adds per second of a single large matrix product."""
    rows, inner, columns = work.MATMUL
    return rows * inner * columns / results.fastest(f"matmul, {dtype}")[0]


def main() -> None:
    """Measures everything and prints the table."""
    parser = options(__doc__.splitlines()[0], ("training", "sampling"))
    parser.add_argument(
        "--length", type=int, choices=work.GRIDS, help="codes of an image (default: both)"
    )
    arguments = parser.parse_args()
    python = dict.fromkeys(SCRIPTS, arguments.torch_python) | {"vqbeam": sys.executable}
    both = {side: python[side] for side in ("vqbeam", "PyTorch")}
    turns = 1 if arguments.smoke else arguments.turns
    rows, cases = [], {}
    for length in [arguments.length] if arguments.length else work.GRIDS:
        if arguments.only != "sampling":
            found = measure(both, ["training", str(length)], turns)
            rows.append(training_row(length, found))
            cases[f"training {length}"] = found
        for batch_size in work.SAMPLING_BATCHES if arguments.only != "training" else ():
            case = ["sampling", str(length), str(batch_size)]
            found = measure(python, case, turns)
            rows.append(sampling_row(length, batch_size, found))
            cases[" ".join(case)] = found
    publish(HEADER, rows, cases, arguments.output)


if __name__ == "__main__":
    main()
