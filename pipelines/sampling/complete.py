"""Images of which a part is kept, and the rest drawn anew."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from vqbeam.configs import SampleConfig
from vqbeam.pipelines.sampling.decoder import (
    Models,
    changed_defaults,
    draw_grids,
    fitted,
    learned_labels,
    provenance,
)
from vqbeam.pipelines.sampling.files import remove_listed
from vqbeam.pipelines.sampling.input_images import (
    image_files,
    kept_cells,
    kept_codes,
    read_image,
    region_mask,
)
from vqbeam.pipelines.sampling.labels import Label, parse_label
from vqbeam.pipelines.sampling.provenance import KEY
from vqbeam.prior.likelihood import code_scorer
from vqbeam.prior.transformer import CodePrior
from vqbeam.vqvae.figures import label_figure, picture, save_png
from vqbeam.vqvae.fitting.compilation import in_batches
from vqbeam.vqvae.storage.files import write_bytes
from vqbeam.vqvae.storage.labels import Labels
from vqbeam.vqvae.storage.run_folder import RunFolder

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
    label: str | None = None,
    seed: int | None = None,
    **settings: Any,
) -> None:
    """Keeps a part of images and draws the rest, several times for each image.

    The codes of what is kept are taken over, so it looks as the VQ-VAE reconstructs it. The others
    are drawn in the order of the sequence, each given those before it: what is kept has no
    influence on codes that come before it. With several candidates, those are taken under which
    the prior finds what is kept likeliest, so that it has some.

    Args:
        run_dir: The run's folder.
        source: An image file, or a folder of images.
        keep: See `region_mask`.
        num: Completions of each image.
        output: A .png (each image, what is kept of it, and its completions side by side), or a
            folder (a PNG for each completion, and completions.jsonl).
        candidates: How many are drawn for each completion that is taken.
        label: Name or number of the class; None for no class, or for the only one.
        seed: Of the random numbers; the run's own by default.
        **settings: Fields of SampleConfig; what is None is as the run says.

    Raises:
        VqbeamError: The run lacks a model, an image or the mask cannot be read, or a setting is
            out of range.
    """
    path = epath.Path(output).expanduser()
    run = RunFolder(run_dir)
    config = run.load_config()
    seed = config.seed if seed is None else seed
    mask, files = region_mask(keep, config), image_files(epath.Path(source).expanduser())
    chosen = fitted(changed_defaults(run, settings), num * candidates * len(files))
    originals = np.stack([read_image(file, config) for file in files.values()])

    models, number = Models(run), completed_label(label, learned_labels(run))
    images = draw_completions(models, chosen, seed, originals, mask, number, num, candidates)

    facts = provenance(run, chosen, seed) | {"keep": keep, "num": num, "label": number}
    facts["candidates"] = candidates
    if path.suffix == ".png":
        kept = _kept_part(originals, kept_cells(mask, models.vqvae.layout.grids[-1]))
        _save_figure(originals, kept, images, path, facts | {"input": list(files)})
    else:
        _save_folder(images, path, [facts | {"input": name} for name in files])
    print(f"{num * len(files)} completions of {len(files)} images: {path}")


def completed_label(label: Any, labels: Labels) -> Label:
    """Returns the label that `parse_label` says; for None, the only class where there is one."""
    if label is None and labels.kind == "classes" and len(labels.names) == 1:
        return 0
    return parse_label(label, labels)


def draw_completions(
    models: Models,
    settings: SampleConfig,
    seed: int,
    images: np.ndarray,
    mask: np.ndarray,
    label: Label,
    num: int,
    candidates: int,
) -> np.ndarray:
    """Returns the completions of images, uint8 [N, num, H, W, C]; see `complete`."""
    drawn = num * candidates
    codes = _completed(models, settings, seed, images, drawn, mask, label)
    if candidates > 1:
        counted = kept_codes(mask, models.vqvae.layout)
        codes = _likeliest(models.prior, codes, counted, label, drawn, num, settings.batch_size)
    decoded = in_batches(models.decode, codes, settings.batch_size)
    return decoded.reshape(len(images), num, *images.shape[1:])


def _completed(
    models: Models,
    settings: SampleConfig,
    seed: int,
    images: np.ndarray,
    num: int,
    mask: np.ndarray,
    label: Label,
) -> np.ndarray:
    """Returns codes, `num` times those of each image, of which those outside the mask are drawn."""
    known = np.repeat(in_batches(models.encode, images, settings.batch_size), num, axis=0)
    labels = np.repeat([label], len(known), axis=0)
    keep = kept_codes(mask, models.vqvae.layout)
    return draw_grids(models, settings, seed, labels, known=known, keep=keep)


def _likeliest(
    prior: CodePrior,
    codes: np.ndarray,
    keep: np.ndarray,
    label: Label,
    drawn: int,
    num: int,
    batch_size: int,
) -> np.ndarray:
    """Returns of every `drawn` completions the `num` under which the kept codes are likeliest."""
    score = code_scorer(prior, counted=keep)
    labels = np.repeat([label], batch_size, axis=0)
    scores = in_batches(lambda batch: score(batch, labels), codes, batch_size)
    best = np.argsort(-scores.reshape(-1, drawn), axis=1, kind="stable")[:, :num]
    return codes[(best + drawn * np.arange(len(best))[:, None]).ravel()]


def _kept_part(images: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """Returns images that are gray outside the cells."""
    rows, columns = (images.shape[1 + axis] // cells.shape[axis] for axis in (0, 1))
    pixels = np.kron(cells, np.ones((rows, columns), bool))
    return np.where(pixels[..., None], images, np.uint8(_GRAY))


def _save_figure(
    originals: np.ndarray, kept: np.ndarray, images: np.ndarray, path: epath.Path, facts: dict
) -> None:
    """Writes a row for each image: as it is, what is kept of it, and its completions."""
    rows = np.concatenate([originals[:, None], kept[:, None], images], axis=1)
    headings = ["input", "kept", *map(str, range(1, images.shape[1] + 1))] * len(rows)
    figure = label_figure(rows.reshape(-1, *rows.shape[2:]), headings)
    save_png(figure, path, {KEY: json.dumps(facts)})


def _save_folder(images: np.ndarray, folder: epath.Path, facts: Sequence[dict]) -> None:
    """Writes completion k of image i as `i-k.png`, and then a list of which is of which."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_listed(folder, _LIST)
    lines = []
    for row, of_image in enumerate(images):
        for column, image in enumerate(of_image):
            name = f"{row:05d}-{column + 1}.png"
            save_png(picture(image), folder / name, {KEY: json.dumps(facts[row])})
            lines.append(json.dumps({"file": name, **facts[row]}, ensure_ascii=False) + "\n")
    write_bytes(folder / _LIST, "".join(lines).encode())
