"""The command that interpolates between two classes."""

import json
from typing import Any

import numpy as np
from etils import epath

from vqbeam.configs import VqbeamError
from vqbeam.pipelines.sampling.api import Run
from vqbeam.vqvae.figures import PROVENANCE, label_figure, save_png
from vqbeam.vqvae.fitting.devices import in_batches
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
    """Writes rows of images, each with the same random numbers, from one class to another.

    The logits of column i are those of classifier-free guidance, u + s·(c - u), where c is
    replaced by (1 - w)·c + w·c' of the two classes and w = i / (steps - 1).

    Args:
        run_dir: The run's folder.
        start: Name or number of the class of the first column.
        end: Name or number of the class of the last column.
        steps: Columns, 2 or more.
        num: Rows.
        output: The .png file to write.
        **settings: `seed` and fields of SampleConfig; None for the run's own.

    Raises:
        VqbeamError: The run lacks a model or has no classes, the two classes are the same or not
            known, or a setting is out of range.
    """
    path = epath.Path(output).expanduser()
    run = Run(run_dir)
    labels = run.prior_labels
    if not labels.names:
        raise VqbeamError(f"{run.path} has no classes to interpolate; it was trained without")
    first, last = parse_label(start, labels), parse_label(end, labels)
    names = [label_name(label, labels) for label in (first, last)]
    if first == last:
        raise VqbeamError(f"--from and --to are both {names[0]}; give two classes")
    seed = run.seed(settings.pop("seed", None))
    chosen = run.settings(**settings).with_at_most(num * steps)

    weights = np.tile(np.linspace(0, 1, steps), num)
    codes = run.sample_codes(
        np.repeat([first], len(weights), axis=0),
        seed,
        chosen,
        towards=(np.repeat([last], len(weights), axis=0), weights),
        indices=np.repeat(np.arange(num), steps),
    )
    images = in_batches(run.decoder, codes, chosen.batch_size)
    headings = [names[0], *(f"{weight:.1%}" for weight in weights[1 : steps - 1]), names[1]]
    facts = run.provenance(chosen, seed) | {"num": num, "from": names[0], "to": names[1]}
    save_png(label_figure(images, headings * num), path, {PROVENANCE: json.dumps(facts)})
    print(f"{num} rows from {names[0]} to {names[1]} in {steps} columns: {path}")
