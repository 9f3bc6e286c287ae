"""Compares stage 1 with the same network in PyTorch and vector-quantize-pytorch, on a CPU.

    python -m venv torchenv
    torchenv/bin/pip install -r benchmarks/requirements-torch.txt
    python benchmarks/stage1.py --torch-python torchenv/bin/python

Measures the training time of the classic VQ-VAE for CIFAR-10, including the optimizer and the
moving averages of the codebook, and the time and peak memory of the forward pass of the quantizer
alone, for several (N, K, D). PyTorch first runs all variants: float32 and bfloat16 (autocast),
contiguous and channels-last, eager and compiled (which needs a C++ compiler). It then runs its
fastest variants. Both sides take turns, each time in a new process, and medians over the turns are
reported. Do not run other programs at the same time. The script prints a table.
"""

import sys

from side_by_side import Results, ask, options, publish

QUANTIZERS = ((8192, 512, 64), (8192, 8192, 8), (2048, 65536, 32))
CASES = (("training",), *(("quantizer", *map(str, sizes)) for sizes in QUANTIZERS))
BATCH_SIZE = 32
DTYPES = ("float32", "bfloat16")
HEADER = ["", "vqbeam", "PyTorch at its best", "ratio", "that is"]


def measure(case: tuple[str, ...], torch_python: str, turns: int) -> tuple[Results, Results]:
    """Measures one case on both sides, after a trial of all PyTorch variants."""
    tried, ours, theirs = Results(), Results(), Results()
    tried.add(ask(torch_python, "stage1_torch.py", [*case]))
    for _ in range(turns):
        ours.add(ask(sys.executable, "stage1_vqbeam.py", [*case]))
        theirs.add(ask(torch_python, "stage1_torch.py", [*case, *tried.fastest_variants()]))
    for work, least in tried.least_bytes.items():
        theirs.least_bytes[work] = min(least, theirs.least_bytes[work])
    return ours, theirs


def training_rows(ours: Results, theirs: Results) -> list[list[str]]:
    """Returns the rows of training: images per second, and the share of the matmul limit."""
    rows, best = [], []
    for dtype in DTYPES:
        mine, _ = ours.fastest(f"training, {dtype}")
        other, variant = theirs.fastest(f"training, {dtype}")
        best.append((mine, other, variant))
        rows.append(training_row(f"training, {dtype}", mine, other, variant))
    other, variant = min((other, variant) for _, other, variant in best)
    rows.append(training_row("training, each at its best", min(best)[0], other, variant))
    for dtype in DTYPES:
        shares = [
            limit_seconds(side, dtype) / side.fastest(f"training, {dtype}")[0]
            for side in (ours, theirs)
        ]
        rows.append([f"share of the matmul limit, {dtype}", *(f"{s:.0%}" for s in shares), "", ""])
    return rows


def training_row(title: str, mine: float, other: float, variant: str) -> list[str]:
    """Returns a row of images per second, from the seconds per step."""
    rates = [f"{BATCH_SIZE / seconds:,.0f} images/s" for seconds in (mine, other)]
    return [title, *rates, f"×{other / mine:.2f}", variant]


def limit_seconds(side: Results, dtype: str) -> float:
    """Returns the time of the multiply-adds of a step, at the speed of a single matrix product."""
    rows, inner, columns = side.records[f"matmul, {dtype}"]["shape"]
    speed = rows * inner * columns / side.fastest(f"matmul, {dtype}")[0]
    # Forward, gradient of the inputs, gradient of the weights.
    return 3 * BATCH_SIZE * side.records["network"]["multiply_adds"] / speed


def quantizer_rows(sizes: tuple[str, ...], ours: Results, theirs: Results) -> list[list[str]]:
    """Returns the rows of the quantizer: milliseconds and megabytes."""
    rows = []
    for work in ("evaluation", "training"):
        title = f"quantizer {'×'.join(sizes)}, {work}"
        mine, _ = ours.fastest(work)
        other, variant = theirs.fastest(work)
        times = [f"{1e3 * seconds:,.1f} ms" for seconds in (mine, other)]
        rows.append([f"{title}: time", *times, f"×{other / mine:.2f}", variant])
        sizes_used = [side.least_bytes[work] for side in (ours, theirs)]
        memory = [f"{used / 1e6:,.0f} MB" for used in sizes_used]
        share = f"×{sizes_used[0] / max(1, sizes_used[1]):.2f}"
        rows.append([f"{title}: memory", *memory, share, "least of all"])
        check_agreement(title, ours.records[work]["error"], theirs.records[work]["error"])
    return rows


def check_agreement(title: str, mine: float, other: float) -> None:
    """Exits if the quantization errors of the two sides differ, since their inputs are the same."""
    if abs(mine - other) > 1e-2 * other:
        sys.exit(f"{title}: mean squared error {mine} in vqbeam, {other} in PyTorch")


def main() -> None:
    """Measures everything and prints the table."""
    arguments = options(__doc__.splitlines()[0], ("training", "quantizer")).parse_args()
    turns = 1 if arguments.smoke else arguments.turns
    rows, cases = [], {}
    for case in CASES:
        if arguments.only in (None, case[0]):
            ours, theirs = measure(case, arguments.torch_python, turns)
            found = training_rows if case == ("training",) else quantizer_rows
            rows += found(*(case[1:] and [case[1:]]), ours, theirs)
            sides = {"vqbeam": ours, "PyTorch": theirs}
            cases[" ".join(case)] = sides
            if case == ("training",):
                network = {name: side.records["network"] for name, side in sides.items()}
                print(f"networks: {network}", file=sys.stderr)
    publish(HEADER, rows, cases, arguments.output)


if __name__ == "__main__":
    main()
