"""Compares training, encoding and sampling with PyTorch at its best, on a GPU.

    python benchmarks/gpu.py                         both libraries in this Python
    python benchmarks/gpu.py --torch-python PATH     PyTorch in another
    python benchmarks/gpu.py --only sampling --preset imagenet64

Measures both stages with the sizes of the presets `cifar10_gpu` and `imagenet64`: training with
data on the device, encoding from images to codes on the host, and sampling grids of 64 and of 256
codes in batches of 1, 64 and 1,024. vqbeam runs on JAX, through the functions of the product;
KERAS_BACKEND=tensorflow changes that. `gpu_torch.py` says what PyTorch runs. Both sides take turns,
each time in a new process, and the fastest variant of each counts, by its median over the turns.
The script prints a line of JSON for each measurement at once, and at the end a table. Without a GPU
it runs on the CPU, where only `--smoke` ends soon.
"""

import json
import math
import os
import sys

import gpu_work as work
import stage2_work
from side_by_side import Results, ask, options, publish

SCRIPTS = {"vqbeam": "gpu_vqbeam.py", "PyTorch": "gpu_torch.py"}
HEADER = ["", "vqbeam", "PyTorch", "ratio", "share of the bfloat16 peak"]


def cases(only: str | None, preset: str | None) -> list[tuple[str, ...]]:
    """Returns the arguments of the scripts for each case."""
    found = []
    for part in work.PARTS if only is None else (only,):
        for name in work.PRESETS if preset is None else (preset,):
            batches = [(str(size),) for size in work.BATCHES] if part == "sampling" else [()]
            found += [(part, name, *batch) for batch in batches]
    return found


def measure(case: tuple[str, ...], python: dict[str, str], turns: int) -> dict[str, Results]:
    """Measures one case on all sides, which take turns."""
    found = {side: Results() for side in python}
    for _ in range(turns):
        for side, results in found.items():
            records = ask(python[side], SCRIPTS[side], [*case])
            results.add(records)
            for record in records:
                print(json.dumps({"case": " ".join(case), "side": side, **record}), flush=True)
    return found


def row(case: tuple[str, ...], found: dict[str, Results]) -> list[str]:
    """Returns a row of rates, with the ratio and the share of the peak where they are known."""
    part, name, *batch = case
    count, unit = work_of_call(part, name, batch)
    best = {side: results.fastest(part) for side, results in found.items()}
    rates = {side: f"{count / s:,.0f} {unit} ({variant})" for side, (s, variant) in best.items()}
    seconds = [s for s, _ in best.values()]
    ratio = f"×{seconds[1] / seconds[0]:.2f}" if len(seconds) > 1 else ""
    return [" ".join(case), rates["vqbeam"], rates.get("PyTorch", ""), ratio, share(case, found)]


def work_of_call(part: str, name: str, batch: list[str]) -> tuple[int, str]:
    """Returns what one timed call gets done, and its unit."""
    config = work.preset(name)
    match part:
        case "stage1":
            return config.vqvae.batch_size, "images/s"
        case "stage2":
            return config.prior.batch_size * math.prod(work.grid(config)), "codes/s"
        case "encode":
            return config.encode.batch_size, "images/s"
    return int(batch[0]), "images/s"


def share(case: tuple[str, ...], found: dict[str, Results]) -> str:
    """Returns what part of the peak the products with weights of stage 2 reach on each side."""
    peak = found["vqbeam"].records["device"]["peak"]
    if case[0] != "stage2" or peak is None:
        return ""
    config = work.preset(case[1])
    size = config.vqvae.num_codes, config.prior.layers, config.prior.width
    codes, _ = work_of_call(*case, [])
    # Forward, gradient of the inputs, gradient of the weights; two operations each.
    operations = 6 * codes * stage2_work.multiply_adds(*size)
    shares = [operations / results.fastest("stage2")[0] / peak for results in found.values()]
    return ", ".join(f"{part:.0%}" for part in shares)


def main() -> None:
    """Measures everything and prints the table."""
    parser = options(__doc__.splitlines()[0], work.PARTS, torch_python=sys.executable)
    parser.add_argument("--preset", choices=work.PRESETS, help="the sizes of this preset alone")
    parser.add_argument("--without-torch", action="store_true", help="measure vqbeam alone")
    arguments = parser.parse_args()
    python = {"vqbeam": sys.executable, "PyTorch": arguments.torch_python}
    if arguments.without_torch:
        del python["PyTorch"]
    turns = 1 if arguments.smoke else arguments.turns
    os.environ.setdefault("KERAS_BACKEND", "jax")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # as `vqbeam` does
    measured = {}
    for case in cases(arguments.only, arguments.preset):
        measured[case] = measure(case, python, turns)
    print()
    for results in next(iter(measured.values())).values():
        print(results.records["device"]["name"])
    rows = [row(case, found) for case, found in measured.items()]
    named = {" ".join(case): found for case, found in measured.items()}
    publish(HEADER, rows, named, arguments.output)


if __name__ == "__main__":
    main()
