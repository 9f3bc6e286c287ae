"""How good a run is, in figures."""

import numpy as np

from vqvae.classifier import classifier_accuracy
from vqvae.evaluation import evaluate_vqvae
from vqvae.run_folder import RunFolder


def evaluate(run_dir: str, features: str = "classifier") -> None:
    """Measures a run on its whole validation split, and prints a table of what it found.

    Args:
        run_dir: Folder of the run.
        features: What the Fréchet distance compares: "classifier" or "inception".

    Raises:
        VqbeamError: The run lacks a stage, or the features cannot be had.
    """
    run = RunFolder(run_dir)
    measures = evaluate_vqvae(run, features)
    rows = vqvae_rows(measures)
    if features == "classifier" and measures["frechet"] is not None:
        share = classifier_accuracy(run)
        rows.append(("classifier", f"names the class of {share:.1%} of the originals"))
    width = max(len(name) for name, _ in rows)
    print(f"VQ-VAE of {run.root}, {measures['images']:,} images of the validation split")
    for name, value in rows:
        print(f"  {name:<{width}}  {value}")
    print(f"written to {run.evaluation / 'vqvae.json'}")


def vqvae_rows(measures: dict) -> list[tuple[str, str]]:
    """Returns name and value, with its unit, of each figure that `evaluate_vqvae` returns."""
    codes = f"of {measures['num_codes']:,}"
    return [
        ("MSE", f"{measures['mse']:.1f} of 255²"),
        ("NMSE", f"{measures['nmse']:.4f} of the training pixels' variance"),
        ("PSNR", f"{measures['psnr']:.2f} dB"),
        ("SSIM", f"{measures['ssim']:.4f} of 1"),
        _frechet_row(measures),
        ("perplexity", f"{_listed(measures['perplexity'])} {codes}"),
        ("codes used", f"{_listed(measures['codes_used'])} {codes}"),
        ("size of the codes", f"{measures['bits_per_image']:,.0f} bits an image"),
        ("compression", f"{measures['compression_ratio']:.1f} to 1, of 8 bits a number"),
    ]


def _frechet_row(measures: dict) -> tuple[str, str]:
    name = f"Fréchet distance ({measures['features']} features)"
    if measures["frechet"] is None:
        return name, f"left out: {measures['frechet_left_out']}"
    return name, (
        f"{measures['frechet']:.3f}, of {measures['feature_dim']} numbers over "
        f"{measures['images']:,} reconstructions and their originals"
    )


def _listed(values) -> str:
    """Returns the figure of each level, or the only one."""
    return ", ".join(f"{value:,.0f}" for value in np.atleast_1d(values))
