"""Images on the way from one class to another."""

import json
from typing import Any

import numpy as np
from etils import epath

from vqbeam.configs import VqbeamError
from vqbeam.pipelines.sampling.decoder import (
    Models,
    changed_defaults,
    draw_grids,
    fitted,
    learned_labels,
    provenance,
)
from vqbeam.pipelines.sampling.labels import label_name, parse_label
from vqbeam.pipelines.sampling.provenance import KEY
from vqbeam.vqvae.figures import label_figure, save_png
from vqbeam.vqvae.fitting.compilation import in_batches
from vqbeam.vqvae.storage.run_folder import RunFolder


def interpolate(
    run_dir: str,
    *,
    start: str,
    end: str,
    steps: int,
    num: int,
    output: str,
    seed: int | None = None,
    **settings: Any,
) -> None:
    """Draws rows of images, each with one set of random numbers, from one class to another.

    The logits of column i are those of classifier-free guidance, u + s·(c - u), where in place of
    c stand (1 - w)·c + w·c' of the two classes and w = i / (steps - 1).

    Args:
        run_dir: The run's folder.
        start: Name or number of the class of the first column.
        end: Likewise, of the last.
        steps: Columns, 2 or more.
        num: Rows.
        output: The .png file to write.
        seed: Of the random numbers; the run's own by default.
        **settings: Fields of SampleConfig; what is None is as the run says.

    Raises:
        VqbeamError: The run lacks a model or has no classes, the two classes are the same or not
            known, or a setting is out of range.
    """
    path = epath.Path(output).expanduser()
    run = RunFolder(run_dir)
    config, labels = run.load_config(), learned_labels(run)
    if not labels.names:
        raise VqbeamError(f"{run.root} has no classes to go between; it was trained without")
    first, last = parse_label(start, labels), parse_label(end, labels)
    names = [label_name(label, labels) for label in (first, last)]
    if first == last:
        raise VqbeamError(f"--from and --to are both {names[0]}; give two classes")
    chosen = fitted(changed_defaults(run, settings), num * steps)
    seed = config.seed if seed is None else seed

    shares = np.tile(np.linspace(0, 1, steps), num)
    models = Models(run)
    codes = draw_grids(
        models,
        chosen,
        seed,
        np.repeat([first], len(shares), axis=0),
        towards=(np.repeat([last], len(shares), axis=0), shares),
        indices=np.repeat(np.arange(num), steps),
    )
    images = in_batches(models.decode, codes, chosen.batch_size)
    headings = [names[0], *(f"{share:.1%}" for share in shares[1 : steps - 1]), names[1]]
    facts = provenance(run, chosen, seed) | {"num": num, "from": names[0], "to": names[1]}
    save_png(label_figure(images, headings * num), path, {KEY: json.dumps(facts)})
    print(f"{num} rows from {names[0]} to {names[1]} in {steps} columns: {path}")
