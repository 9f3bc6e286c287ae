"""Trains the same VQ-VAE with each option of stage 1, and prints the resulting metrics.

    python benchmarks/quantizers.py cifar10 --work runs/options --passes 1
    python benchmarks/quantizers.py fashion_mnist --work runs/families --passes 2

The first command changes one option of the classic recipe at a time. The second trains each family
of quantizers and shows how much of its codebook is in use. All rows of a table are trained with the
`vqbeam` command, on the same images for the same number of steps. Finished runs are not repeated.
"""

import argparse
import json
import pathlib
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
IMAGES = {"cifar10": 50_000, "fashion_mnist": 60_000}
BATCH_SIZE = 32
WITHOUT_FINETUNING = "--vqvae.finetune-steps 0 --vqvae.perceptual 0 --vqvae.adversarial 0"

# The recipe of van den Oord et al. 2017 with moving averages; every row changes one option.
CLASSIC = (
    "--vqvae.quantizer vector --vqvae.residual-width 32 --vqvae.optimizer adam "
    "--vqvae.learning-rate 3e-4 --vqvae.schedule constant --vqvae.warmup-steps 0 "
    "--vqvae.restart-below 0 --vqvae.balance 0 --vqvae.estimator straight_through"
)
OPTIONS = {
    "EMA (the classic recipe)": "",
    "gradient instead of EMA": "--vqvae.codebook-update gradient",
    "+ k-means": "--vqvae.codebook-init kmeans",
    "+ restart": "--vqvae.restart-below 0.03",
    "+ restart, K = 4096": "--vqvae.restart-below 0.03 --vqvae.num-codes 4096",
    "+ restart, 8 dimensions": "--vqvae.restart-below 0.03 --vqvae.code-dim 8",
    "+ restart, 8 dimensions, cosine lookup": "--vqvae.restart-below 0.03 --vqvae.code-dim 8 "
    "--vqvae.lookup cosine",
    "+ restart, resnet": "--vqvae.restart-below 0.03 --vqvae.network resnet --vqvae.width 48",
    "+ balance": "--vqvae.balance 0.25",
    "+ cosine lookup": "--vqvae.lookup cosine",
    "+ rotation": "--vqvae.estimator rotation",
    "+ DiVeQ": "--vqvae.estimator diveq",
    "+ cosine schedule from 1e-3": "--vqvae.schedule cosine --vqvae.learning-rate 1e-3",
    "+ Muon, cosine schedule from 3e-3": "--vqvae.optimizer muon --vqvae.schedule cosine "
    "--vqvae.learning-rate 3e-3",
    "+ predictive": "--vqvae.quantizer predictive --vqvae.residual-width 28",
    "FSQ 8,8,8": "--vqvae.quantizer fsq",
    "residual, 2 levels": "--vqvae.quantizer residual --vqvae.depth 2",
}
FAMILIES = {
    "vector, EMA": "",
    "vector, gradient": "--vqvae.codebook-update gradient --vqvae.codebook-init kmeans",
    "vector, cosine lookup": "--vqvae.lookup cosine",
    "predictive": "--vqvae.quantizer predictive",
    "residual, 2 levels": "--vqvae.quantizer residual --vqvae.depth 2",
    "FSQ 8,8,4": "--vqvae.quantizer fsq --vqvae.fsq-levels 8,8,4",
    "LFQ": "--vqvae.quantizer lfq --vqvae.entropy 0.1",
    "SimVQ": "--vqvae.quantizer simvq --vqvae.codebook-init data",
    # The 7×7 grid of Fashion-MNIST cannot be halved.
    "two grids (VQ-VAE-2)": "--vqvae.grids 2 --data.height 32 --data.width 32",
}


def main() -> None:
    """Trains every variant and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("preset", choices=sorted(IMAGES))
    parser.add_argument("--work", required=True, type=pathlib.Path, help="folder for the runs")
    parser.add_argument("--data-dir", help="where TFDS keeps prepared datasets")
    parser.add_argument("--passes", type=float, default=1, help="over the training images")
    arguments = parser.parse_args()
    variants = OPTIONS if arguments.preset == "cifar10" else FAMILIES
    base = CLASSIC if arguments.preset == "cifar10" else ""
    steps = round(arguments.passes * IMAGES[arguments.preset] / BATCH_SIZE)
    budget = f"--vqvae.batch-size {BATCH_SIZE} --vqvae.steps {steps}"
    budget = f"{budget} --vqvae.steps-per-epoch {steps} {WITHOUT_FINETUNING}"
    print("| | NMSE | perplexity | codes used | bits per image |")
    print("|---|---|---|---|---|")
    for name, flags in variants.items():
        folder = arguments.work / "".join(c if c.isalnum() else "-" for c in name)
        train(arguments, folder, with_last(f"{budget} {base} {flags}".split()))
        print(row(name, folder), flush=True)


def train(arguments: argparse.Namespace, folder: pathlib.Path, flags: list[str]) -> None:
    """Trains a variant, on images that all variants with the same image size share."""
    if arguments.data_dir:
        flags += ["--data.data-dir", arguments.data_dir]
    shared = arguments.work / ("images-32" if "--data.height" in flags else "images")
    run("prepare", arguments.preset, shared, flags)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "images").exists():
        (folder / "images").symlink_to((shared / "images").resolve())
        shutil.copy(shared / "config.json", folder)
    run("train-vqvae", arguments.preset, folder, flags)


def run(verb: str, preset: str, folder: pathlib.Path, flags: list[str]) -> None:
    """Runs one stage with the `vqbeam` command, unless it is finished."""
    if (folder / {"prepare": "images", "train-vqvae": "vqvae"}[verb] / "manifest.json").exists():
        return
    command = [sys.executable, "-m", "vqbeam", verb, preset, "--run-dir", str(folder.resolve())]
    subprocess.run(command + flags, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def with_last(flags: list[str]) -> list[str]:
    """Returns flags and values with only the last value of each flag."""
    pairs = dict(zip(flags[::2], flags[1::2], strict=True))
    return [word for pair in pairs.items() for word in pair]


def row(name: str, folder: pathlib.Path) -> str:
    """Returns the table row of a variant, from the metrics in its manifest."""
    measures = json.loads((folder / "vqvae" / "manifest.json").read_text())["measures"]
    per_level = [f"perplexity_{level}" for level in range(9) if f"perplexity_{level}" in measures]
    perplexities = ", ".join(f"{measures[key]:.0f}" for key in per_level or ["perplexity"])
    used = [measures[key.replace("perplexity", "codes_used")] for key in per_level]
    shares = ", ".join(f"{share:.1%}" for share in used or [measures["codes_used"]])
    return (
        f"| {name} | {measures['reconstruction']:.4f} | {perplexities} | {shares} "
        f"| {size_of_codes(folder):.0f} |"
    )


def size_of_codes(folder: pathlib.Path) -> float:
    """Returns the number of bits of the codes of an image."""
    from vqbeam.configs import from_dict
    from vqbeam.vqvae.layout import code_layout
    from vqbeam.vqvae.metrics import bits_per_image

    layout = code_layout(from_dict(json.loads((folder / "config.json").read_text())))
    return bits_per_image(layout.length, layout.num_codes)


if __name__ == "__main__":
    main()
