"""The command that measures a trained run."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vqbeam.pipelines.evaluation.distances import NEIGHBOURS
from vqbeam.pipelines.evaluation.features import classifier_accuracy
from vqbeam.pipelines.evaluation.reconstructions import evaluate_vqvae
from vqbeam.pipelines.evaluation.reference import FIGURES, ReferenceSet, SampleEvaluator
from vqbeam.pipelines.evaluation.sweep import sweep as sweep_settings
from vqbeam.pipelines.sampling.api import Run
from vqbeam.prior.training import STAGE as TRAIN_PRIOR
from vqbeam.vqvae.figures import reconstruction_figure, save_png
from vqbeam.vqvae.storage.files import write_json
from vqbeam.vqvae.storage.run_folder import RunFolder

_NEAREST = "nearest.png"
_NUM = 10_000
_NUM_OF_SWEEP = 2_000
_KINDS = ("real", "reconstructions", "samples")


def evaluate(
    run_dir: str,
    features: str = "classifier",
    stage: str = "all",
    num: int | None = None,
    seed: int | None = None,
    sweep: Mapping[str, Sequence[Any]] | None = None,
    store: bool = False,
) -> None:
    """Measures a run on its validation split, and prints and writes the metrics.

    Args:
        run_dir: Folder of the run.
        features: What the Fréchet distance compares: "classifier" or "inception".
        stage: "vqvae", "prior", or "all" for those that are trained.
        num: Number of samples, by default 10,000, or 2,000 in a sweep; fewer if a split of the run
            has fewer images.
        seed: Seed of the samples and of the choice of real images; by default the run's own.
        sweep: Values by setting. If given, only their combinations are measured; see
            `vqbeam.pipelines.evaluation.sweep`.
        store: Whether to make the best settings of the sweep the run's defaults.

    Raises:
        VqbeamError: The run lacks a stage, or the features are not available.
    """
    run = RunFolder(run_dir)
    seed = run.load_config().seed if seed is None else seed
    if sweep:
        num = num or _NUM_OF_SWEEP
        sweep_settings(run, sweep, features=features, num=num, seed=seed, store=store)
        return
    trained = run.manifest(TRAIN_PRIOR) is not None
    if stage != "prior":
        _print_vqvae(run, features)
    if stage == "prior" or (stage == "all" and trained):
        lines = prior_lines(measure_prior(run, features, num or _NUM, seed))
        print(f"prior of {run.root}, {lines[0]}")
        print("\n".join(f"  {line}" for line in lines[1:]))
        print(f"written to {run.evaluation / 'prior.json'}")


def _print_vqvae(run: RunFolder, features: str) -> None:
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


def measure_prior(run: RunFolder, features: str, num: int, seed: int) -> dict:
    """Returns the metrics of samples of a run, and writes them to `evaluation/prior.json`.

    Returns:
        `images`, the size of a set; for each of `real`, `reconstructions` and `samples` the metrics
        of `ReferenceSet.measure`; `left_out`, the reason for each metric that is None; `nearest`,
        the result of `ReferenceSet.nearest_training` for the samples; the prior's `nats_per_code`
        and `bits_per_dim` on the complete validation split; and the settings of the measurement:
        `features`, `neighbours`, `seed`, the sampler's `settings`, and the hashes of `models`.
    """
    likelihood, models = run.require(TRAIN_PRIOR)["measures"], run.measured_models("prior")
    settings = Run(run.root).default_settings()
    reference = ReferenceSet(run, num, features, seed)
    meter = SampleEvaluator(run, reference, settings.batch_size, seed)
    drawn = meter.samples(settings)
    measures = {
        "images": reference.num,
        "real": meter.real(),
        "reconstructions": meter.reconstructions(),
        "samples": reference.compare(drawn),
        "nearest": drawn.manifold and reference.nearest_training(drawn.manifold),
        "left_out": reference.left_out,
        **{name: likelihood[name] for name in ("nats_per_code", "bits_per_dim")},
        "features": features,
        "neighbours": NEIGHBOURS,
        "seed": seed,
        "settings": dataclasses.asdict(settings.sampler),
        "models": models,
    }
    run.evaluation.mkdir(parents=True, exist_ok=True)
    if drawn.manifold:
        rows, indices = zip(*measures["nearest"]["pairs"], strict=True)
        training = np.stack([reference.training_image(index) for index in indices])
        figure = reconstruction_figure(meter.sample_again(settings, rows), training)
        save_png(figure, run.evaluation / _NEAREST)
    write_json(run.evaluation / "prior.json", measures)
    return measures


def prior_lines(measures: dict) -> list[str]:
    """Returns the metrics of `measure_prior` as lines of text, the first of which is a heading."""
    table = [["", *_KINDS]]
    left_out: dict[str, list[str]] = {}
    for name, (title, form) in FIGURES.items():
        if name in measures["left_out"]:
            left_out.setdefault(measures["left_out"][name], []).append(title)
        else:
            table.append([title, *(form.format(measures[kind][name]) for kind in _KINDS)])
    notes = [f"left out: {', '.join(titles)} ({why})" for why, titles in left_out.items()]
    held_out = (
        f"held-out codes: {measures['nats_per_code']:.3f} nats per code, "
        f"{measures['bits_per_dim']:.4f} bits per dimension"
    )
    if len(table) == 1:
        return ["by the codes of its validation split", *notes, held_out]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    settings = ", ".join(f"{name} {value}" for name, value in measures["settings"].items())
    rows = [
        "  ".join([f"{row[0]:<{widths[0]}}", *map(str.rjust, row[1:], widths[1:])]) for row in table
    ]
    return [
        f"sets of {measures['images']:,} images by as many of the validation split",
        *rows,
        *_nearest_lines(measures["nearest"]),
        *notes,
        "real: training images, but for the label agreement the held-out ones",
        f"samples: {settings}, seed {measures['seed']}; labels as in the training split",
        f"features: {measures['features']}, {measures['neighbours']} neighbours",
        held_out,
    ]


def _nearest_lines(found: dict | None) -> list[str]:
    if not found:
        return []
    ratio = found["median"] / found["held_out"] if found["held_out"] else 1.0
    return [
        f"nearest training image: samples are {ratio:.2f} times as far from it as held-out images "
        f"(medians); the closest pairs: {_NEAREST}"
    ]


def vqvae_rows(measures: dict) -> list[tuple[str, str]]:
    """Returns the name of each metric of `evaluate_vqvae`, and its value with the unit."""
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
    """Returns the value of each level as text."""
    return ", ".join(f"{value:,.0f}" for value in np.atleast_1d(values))
