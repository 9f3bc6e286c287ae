"""A grid search over sampler settings, by the Fréchet distance of the samples."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from vqbeam.configs import SampleConfig, VqbeamError
from vqbeam.pipelines.evaluation.distances import NEIGHBOURS
from vqbeam.pipelines.evaluation.reference import (
    FIGURES,
    ReferenceSet,
    SampleEvaluator,
    set_size,
)
from vqbeam.pipelines.sampling.api import Run
from vqbeam.prior.training import STAGE as TRAIN_PRIOR
from vqbeam.vqvae.figures import save_png
from vqbeam.vqvae.storage.files import read_json, write_json
from vqbeam.vqvae.storage.run_folder import RunFolder
from vqbeam.vqvae.training import STAGE as TRAIN_VQVAE

# With fewer images, differences between settings are mostly chance.
_FEW = 500


def sweep(
    run: RunFolder,
    values: Mapping[str, Sequence[Any]],
    *,
    features: str,
    num: int,
    seed: int,
    store: bool,
) -> None:
    """Measures all combinations of settings; prints, plots and writes the metrics.

    `evaluation/sweep.json` is written after each combination. Combinations that it already has are
    not measured again, unless the models or the settings of the measurement have changed.

    Args:
        run: A run with both models trained.
        values: The values to try by field of `SampleConfig`; other fields are as in the run.
        features: See `vqbeam.pipelines.evaluation.features.feature_extractor`.
        num: Samples for each combination; fewer if a split of the run has fewer images.
        seed: Seed of the samples and of the choice of real images.
        store: Whether to make the best settings the run's defaults.

    Raises:
        VqbeamError: A setting is out of range, a model is missing, or the Fréchet distance cannot
            be measured.
    """
    run.require(TRAIN_PRIOR)
    num = set_size(run.require("prepare"), num)
    trained = Run(run.root)
    combinations = itertools.product(*values.values())
    changes = [dict(zip(values, combination, strict=True)) for combination in combinations]
    grid = [trained.settings(**change) for change in changes]
    results = _measured(run, grid, list(values), features=features, num=num, seed=seed)
    best = min(range(len(grid)), key=lambda index: results[index]["frechet"])
    print(f"{num:,} images at each setting (--num), seed {seed}, {features} features")
    print("\n".join(sweep_lines(list(values), results, best)))
    picture = run.evaluation / "sweep.png"
    save_png(sweep_figure(values, results, best), picture)
    print(f"written to {run.evaluation / 'sweep.json'} and {picture}")
    if store:
        stored = trained.store_default_settings(grid[best])
        print(
            f"the best settings are now the defaults of {run.root}; to undo this, delete {stored}"
        )
        if num < _FEW:
            print(f"{num} images are too few to tell settings apart reliably; use --num 2000")


def sweep_lines(names: Sequence[str], results: Sequence[dict], best: int) -> list[str]:
    """Returns a table of settings and metrics, in which a star marks the best row."""
    # The others are in sweep.json; with them, the table would be wider than a terminal.
    told = {name: FIGURES[name] for name in ("frechet", "precision", "recall", "agreement")}
    figures = {name: form for name, form in told.items() if results[0][name] is not None}
    rows = [[*names, *(title for title, _ in figures.values())]]
    for result in results:
        settings = [str(result["settings"][name]) for name in names]
        rows.append(settings + [form.format(result[name]) for name, (_, form) in figures.items()])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        ("* " if index == best else "  ") + "  ".join(map(str.rjust, row, widths))
        for index, row in enumerate(rows, start=-1)
    ]


def _measured(
    run: RunFolder,
    grid: Sequence[SampleConfig],
    changed: Sequence[str],
    *,
    features: str,
    num: int,
    seed: int,
) -> list[dict]:
    """Returns the metrics of each combination of settings, measured now or earlier.

    Args:
        run: The run.
        grid: The combinations.
        changed: Names of the settings that are swept, for the titles of the bars.
        features: See `sweep`.
        num: See `sweep`.
        seed: See `sweep`.
    """
    identity = {
        "images": num,
        "features": features,
        "neighbours": NEIGHBOURS,
        "metrics": [*FIGURES],
        "seed": seed,
        "models": [run.result_hash(TRAIN_VQVAE), run.result_hash(TRAIN_PRIOR)],
        "data": run.result_hash("prepare"),
    }
    path = run.evaluation / "sweep.json"
    results = _earlier(path, identity)
    wanted = [dataclasses.asdict(settings.sampler) for settings in grid]
    known = [result["settings"] for result in results]
    if any(settings not in known for settings in wanted):
        reference = ReferenceSet(run, num, features, seed)
        if "frechet" in reference.left_out:
            reason = reference.left_out["frechet"]
            raise VqbeamError(
                f"settings are compared by the Fréchet distance, which cannot be measured: {reason}"
            )
        meter = SampleEvaluator(run, reference, grid[0].batch_size, seed)
        for settings, named in zip(grid, wanted, strict=True):
            if named not in known:
                title = ", ".join(f"{name} {named[name]}" for name in changed)
                drawn = meter.samples(settings, title)
                results.append({"settings": named, **reference.compare(drawn)})
                known.append(named)
                run.evaluation.mkdir(parents=True, exist_ok=True)
                write_json(path, {**identity, "results": results})
    return [results[known.index(settings)] for settings in wanted]


def _earlier(path, identity: dict) -> list[dict]:
    found = read_json(path) if path.exists() else {}
    is_of_this = all(found.get(name) == value for name, value in identity.items())
    return found.get("results", []) if is_of_this else []


def sweep_figure(
    values: Mapping[str, Sequence[Any]], results: Sequence[dict], best: int
) -> Image.Image:
    """Returns a plot of the metrics over the setting with the most values.

    Args:
        values: The values of each setting.
        results: Settings and metrics of each combination.
        best: The index of the best combination, which a star marks.
    """
    across = max(values, key=lambda name: len(values[name]))
    figure = Figure(figsize=(9.5, 4.2), layout="constrained", facecolor="white")
    canvas = FigureCanvasAgg(figure)
    distance, trade = figure.subplots(1, 2)
    lines: dict[str, list[dict]] = {}
    for result in results:
        others = [f"{name} {result['settings'][name]}" for name in values if name != across]
        lines.setdefault(", ".join(others), []).append(result)
    for name, line in lines.items():
        places = [result["settings"][across] for result in line]
        (drawn,) = distance.plot(places, [r["frechet"] for r in line], "o-", label=name)
        recalls, precisions = ([r[figure] for r in line] for figure in ("recall", "precision"))
        trade.plot(recalls, precisions, "o-", color=drawn.get_color())
        for place, recall, precision in zip(places, recalls, precisions, strict=True):
            style = {"textcoords": "offset points", "fontsize": 7, "color": "#555555"}
            trade.annotate(str(place), (recall, precision), (4, 4), **style)
    star = {"marker": "*", "ms": 15, "mfc": "none", "mec": "black", "ls": "none", "label": "best"}
    distance.plot([results[best]["settings"][across]], [results[best]["frechet"]], **star)
    trade.plot([results[best]["recall"]], [results[best]["precision"]], **star)
    distance.set(xlabel=across, ylabel="Fréchet distance (less is better)")
    trade.set(xlabel="recall (share of 1)", ylabel="precision (share of 1)")
    trade.margins(x=0.1, y=0.08)  # for the numbers beside the points
    trade.set_title(f"numbers: {across}", loc="right", fontsize=8)
    distance.legend(frameon=False, fontsize=8)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
