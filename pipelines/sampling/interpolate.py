"""The command that interpolates between two classes."""

import json
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from vqbeam.pipelines.sampling.api import Run
from vqbeam.vqvae.figures import PROVENANCE, label_figure, save_png
from vqbeam.vqvae.storage.labels import label_name, parse_label


def interpolate(
    run_dir: str,
    *,
    start: str,
    end: str,
    steps: int,
    num: int,
    output: str,
    **settings: Any,
) -> None:
    """Writes rows of images from one class to another; see `Run.interpolate`.

    Args:
        run_dir: The run's folder.
        start: Name or number of the class of the first column.
        end: Name or number of the class of the last column.
        steps: Number of columns, at least 2.
        num: Number of rows.
        output: The .png file to write.
        **settings: `seed` and fields of SampleConfig; None for the run's own.

    Raises:
        VqbeamError: The run lacks a model or has no classes, the two classes are equal or unknown,
            or a setting is out of range.
    """
    path = epath.Path(output).expanduser()
    run = Run(run_dir)
    images = run.interpolate(start, end, num, steps=steps, **settings)
    labels = run.prior_labels
    names = [label_name(parse_label(name, labels), labels) for name in (start, end)]
    seed = run.seed(settings.pop("seed", None))
    chosen = run.settings(**settings).with_at_most(num * steps)
    facts = run.provenance(chosen, seed) | {"num": num, "from": names[0], "to": names[1]}
    save_png(row_figure(images, *names), path, {PROVENANCE: json.dumps(facts)})
    print(f"{num} rows from {names[0]} to {names[1]} in {steps} columns: {path}")


def row_figure(images: np.ndarray, start: str, end: str) -> Image.Image:
    """Returns a figure of images [num, steps, H, W, C], each column under its weight."""
    num, steps = images.shape[:2]
    weights = np.linspace(0, 1, steps)[1:-1]
    headings = [start, *(f"{weight:.1%}" for weight in weights), end]
    return label_figure(images.reshape(-1, *images.shape[2:]), headings * num)
