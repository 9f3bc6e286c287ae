"""The command that keeps a part of images and samples the rest."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from vqbeam.pipelines.sampling.api import Run
from vqbeam.pipelines.sampling.input_images import (
    image_files,
    kept_cells,
    read_image,
    region_mask,
)
from vqbeam.pipelines.sampling.sample import remove_listed
from vqbeam.vqvae.figures import PROVENANCE, label_figure, picture, save_png
from vqbeam.vqvae.storage.files import write_bytes

_GRAY = 128
_LIST = "completions.jsonl"


def complete(
    run_dir: str,
    *,
    source: str,
    keep: str,
    num: int,
    output: str,
    candidates: int = 1,
    **options: Any,
) -> None:
    """Writes images of which a part is kept and the rest is sampled; see `Run.complete`.

    Args:
        run_dir: The run's folder.
        source: An image file, or a folder of images.
        keep: See `region_mask`.
        num: Number of completions of each image.
        output: A .png (each image, its kept part, and its completions side by side), or a folder
            (a PNG for each completion, and completions.jsonl).
        candidates: Number of candidates sampled for each completion.
        **options: `label`, `seed` and settings, as in `Run.complete`.

    Raises:
        VqbeamError: The run lacks a model, an image or the mask cannot be read, or a setting is
            out of range.
    """
    path = epath.Path(output).expanduser()
    run = Run(run_dir)
    files = image_files(epath.Path(source).expanduser())
    originals = np.stack([read_image(file, run.config) for file in files.values()])
    images = run.complete(originals, keep, num, candidates=candidates, **options)

    label, seed = options.pop("label", None), run.seed(options.pop("seed", None))
    settings = run.settings(**options).with_at_most(num * candidates * len(files))
    facts = run.provenance(settings, seed) | {"keep": keep, "num": num}
    facts |= {"label": run.completion_label(label), "candidates": candidates}
    if path.suffix == ".png":
        cells = kept_cells(region_mask(keep, run.config), run.vqvae.layout.grids[-1])
        kept = kept_part(originals, cells)
        _save_figure(originals, kept, images, path, facts | {"input": list(files)})
    else:
        _save_folder(images, path, [facts | {"input": name} for name in files])
    print(f"{num * len(files)} completions of {len(files)} images: {path}")


def kept_part(images: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """Returns the images with gray outside the cells."""
    rows, columns = (images.shape[1 + axis] // cells.shape[axis] for axis in (0, 1))
    pixels = np.kron(cells, np.ones((rows, columns), bool))
    return np.where(pixels[..., None], images, np.uint8(_GRAY))


def _save_figure(
    originals: np.ndarray, kept: np.ndarray, images: np.ndarray, path: epath.Path, facts: dict
) -> None:
    """Writes a row for each image: the image, its kept part, and its completions."""
    rows = np.concatenate([originals[:, None], kept[:, None], images], axis=1)
    headings = ["input", "kept", *map(str, range(1, images.shape[1] + 1))] * len(rows)
    figure = label_figure(rows.reshape(-1, *rows.shape[2:]), headings)
    save_png(figure, path, {PROVENANCE: json.dumps(facts)})


def _save_folder(images: np.ndarray, folder: epath.Path, facts: Sequence[dict]) -> None:
    """Writes completion k of image i as `i-k.png`, and then the list of all."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_listed(folder, _LIST)
    lines = []
    for row, of_image in enumerate(images):
        for column, image in enumerate(of_image):
            name = f"{row:05d}-{column + 1}.png"
            save_png(picture(image), folder / name, {PROVENANCE: json.dumps(facts[row])})
            lines.append(json.dumps({"file": name, **facts[row]}, ensure_ascii=False) + "\n")
    write_bytes(folder / _LIST, "".join(lines).encode())
