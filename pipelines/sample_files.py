"""New images as files, each of which says what its images were drawn with."""

import io
import json
from collections.abc import Iterator

import numpy as np
from etils import epath

from pipelines.provenance import KEY
from pipelines.samples import Samples
from vqvae.figures import label_figure, picture, save_png
from vqvae.files import matching, write_bytes

SAMPLES_LIST = "samples.jsonl"


def write_samples(samples: Samples, path: epath.Path, *, bare: bool = False) -> None:
    """Writes samples as a PNG grid, an .npz of arrays, or a folder, by the ending of `path`.

    Args:
        samples: The images.
        path: Ends in .png or .npz, or is that of a folder.
        bare: Whether a .png is the first image alone, pixel for pixel, as in a folder.
    """
    facts = samples.settings | {"images": list(_each(samples))}
    if path.suffix == ".npz":
        arrays = io.BytesIO()
        own = {KEY: np.array(json.dumps(facts))}
        np.savez(arrays, images=samples.images, codes=samples.codes, labels=samples.labels, **own)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, arrays.getvalue())
    elif path.suffix != ".png":
        _write_folder(samples, path)
    elif bare:
        _write_picture(samples, 0, next(_each(samples)), path)
    else:
        figure = label_figure(samples.images, samples.names, fill=True)
        save_png(figure, path, {KEY: json.dumps(facts)})


def _write_folder(samples: Samples, folder: epath.Path) -> None:
    """Writes a PNG for each image and then their list: with it the folder is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / SAMPLES_LIST).exists():  # those of before would be taken for these
        (folder / SAMPLES_LIST).unlink()
        for picture_of_before in matching(folder, "[0-9]*.png"):
            picture_of_before.unlink()
    lines = []
    for row, own in enumerate(_each(samples)):
        name = f"{own['index']:05d}.png"
        _write_picture(samples, row, own, folder / name)
        line = {"file": name, **own, **samples.settings}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_bytes(folder / SAMPLES_LIST, "".join(lines).encode())


def _write_picture(samples: Samples, row: int, own: dict, path: epath.Path) -> None:
    save_png(picture(samples.images[row]), path, {KEY: json.dumps(samples.settings | own)})


def _each(samples: Samples) -> Iterator[dict]:
    """Yields what each image has of its own: its index and, where there are classes, its label."""
    for row, label in enumerate(samples.labels.tolist()):
        own = {"index": samples.first + row}
        yield own | ({"label": label, "name": samples.names[row]} if samples.names else {})
