"""The command that samples new images; its files hold the settings to sample them again."""

import dataclasses
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from vqbeam.configs import SampleConfig, VqbeamError
from vqbeam.pipelines.sampling.api import Run, Samples
from vqbeam.vqvae.figures import PROVENANCE, label_figure, picture, save_png
from vqbeam.vqvae.storage.files import check_regular, read_regular, sizes, write_bytes
from vqbeam.vqvae.storage.labels import labels_for, parse_label
from vqbeam.vqvae.storage.run_folder import RunFolder

STAGE = "sample"
# Pixels of the smallest image that a run can have.
_LEAST_PIXELS = 16
SAMPLES_LIST = "samples.jsonl"


def sample(
    run_dir: str,
    *,
    labels: Sequence[str] | None = None,
    seed: int | None = None,
    like: str | None = None,
    output: str,
    **settings: Any,
) -> None:
    """Samples new images from a run and writes them.

    Args:
        run_dir: The run's folder.
        labels: Labels to use in turn: names or numbers of classes, or the attributes of an image
            joined by commas. By default all classes, or each attribute alone.
        seed: Seed of the random numbers; image i of a seed is always the same image. By default
            the run's own.
        like: A .png or .npz written by this command, whose images are sampled again with the
            changes that the other arguments make.
        output: A .png (a labelled grid, or a single picture if `like` is one), a .npz (images,
            codes, labels), or a folder (a PNG for each image and samples.jsonl).
        **settings: Fields of SampleConfig; by default the run's own. The default of `num` gives
            each label as many images as it has among the run's own number.

    Raises:
        VqbeamError: The run has no trained prior, a setting is out of range, or `like` was sampled
            from another checkpoint or not written by this command.
    """
    run = Run(run_dir)
    path = epath.Path(output).expanduser()
    bare = False
    if like is None:
        num = settings.pop("num", None) or _usual_number(run, labels)
        samples = run.sample(num, labels, seed, **settings)
    else:
        source = epath.Path(like).expanduser()
        facts = read_provenance(source)
        check_checkpoint(facts, run, source)
        try:
            samples = _sample_again(run, facts, settings, labels, seed)
        except VqbeamError as error:
            raise VqbeamError(f"{source}: {error}") from error
        bare = "index" in facts and len(samples.images) == 1
    write_samples(samples, path, bare=bare)
    print(f"{len(samples.images)} new images: {path}")


def _usual_number(run: Run, labels: Sequence[str] | None) -> int:
    num, all_labels = run.default_settings().num, len(run.prior_labels.names)
    if labels is None or not all_labels:
        return num
    return len(labels) * max(1, num // all_labels)


def sample_stage(run_path: str) -> None:
    """Writes the images of `vqbeam run` to `DIR/samples`, with the run's own settings."""
    folder = RunFolder(run_path)
    if folder.is_done(STAGE):
        return
    folder.begin(STAGE)
    samples = Run(run_path).sample()
    path = folder.folder(STAGE) / "samples.png"
    write_samples(samples, path)
    folder.finish(STAGE, [path], settings=samples.settings)


def _sample_again(
    run: Run,
    facts: Mapping[str, Any],
    settings: Mapping[str, Any],
    labels: Sequence[str] | None,
    seed: int | None,
) -> Samples:
    """Returns the images described by the provenance `facts`, with the given changes."""
    changes = {name: value for name, value in settings.items() if value is not None}
    fields = [field.name for field in dataclasses.fields(SampleConfig)]
    stored = {name: facts[name] for name in fields if name in facts}
    listed = facts.get("images", [facts])
    num = changes.get("num", len(listed))
    run.check_count(num)
    rows = [parse_label(image.get("label"), run.prior_labels) for image in listed]
    rows = np.asarray(rows, np.int32)
    if labels is not None:
        rows = labels_for(labels, run.prior_labels, num)
    elif num != len(listed):
        # Repeats whole cycles of the labels, rather than the list, which may end within one.
        _, cycle = np.unique(rows, axis=0, return_index=True)
        rows = rows[np.sort(cycle)][np.arange(num) % len(cycle)]
    chosen = run.checked(SampleConfig(**stored | changes))
    seed = facts["seed"] if seed is None else seed
    return run.sample_rows(rows, seed, chosen, listed[0]["index"])


def write_samples(samples: Samples, path: epath.Path, *, bare: bool = False) -> None:
    """Writes samples as a PNG grid, an .npz of arrays, or a folder, by the ending of `path`.

    Args:
        samples: The images.
        path: A path that ends in .png or .npz, or a folder.
        bare: Whether a .png has only the first image, pixel for pixel, as in a folder.
    """
    facts = samples.settings | {"images": list(_each(samples))}
    if path.suffix == ".npz":
        arrays = io.BytesIO()
        own = {PROVENANCE: np.array(json.dumps(facts))}
        np.savez(arrays, images=samples.images, codes=samples.codes, labels=samples.labels, **own)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, arrays.getvalue())
    elif path.suffix != ".png":
        _write_folder(samples, path)
    elif bare:
        _write_picture(samples, 0, next(_each(samples)), path)
    else:
        figure = label_figure(samples.images, samples.names, fill=True)
        save_png(figure, path, {PROVENANCE: json.dumps(facts)})


def _write_folder(samples: Samples, folder: epath.Path) -> None:
    """Writes a PNG for each image, and finally their list, which marks the folder as complete."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_listed(folder, SAMPLES_LIST)
    lines = []
    for row, own in enumerate(_each(samples)):
        name = f"{own['index']:05d}.png"
        _write_picture(samples, row, own, folder / name)
        line = {"file": name, **own, **samples.settings}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_bytes(folder / SAMPLES_LIST, "".join(lines).encode())


def size_of_samples(folder: epath.Path) -> int | None:
    """Returns the size of a folder's list and its pictures in bytes; None if a file is missing."""
    listing = folder / SAMPLES_LIST
    try:
        found = sizes([listing, *(folder / name for name in _listed(listing))])
    except (VqbeamError, OSError):  # the list is damaged or missing
        return None
    return sum(found) if all(found) else None


def remove_listed(folder: epath.Path, name: str) -> None:
    """Removes the pictures that a list in a folder names, so that none is mistaken for a new one.

    The list is renamed first and removed last. So a folder with a list is always complete, and if
    the removal is interrupted, the next call finishes it.
    """
    listing, old = folder / name, folder / f".{name}.old"
    if listing.exists():
        listing.replace(old)
    if old.exists():
        for picture_of_before in _listed(old):
            if epath.Path(picture_of_before).name == picture_of_before:  # not outside the folder
                (folder / picture_of_before).unlink(missing_ok=True)
        old.unlink()


def _listed(path: epath.Path) -> list[str]:
    try:
        names = [json.loads(line)["file"] for line in read_regular(path).decode().splitlines()]
        return [os.fspath(epath.Path(name)) for name in names]  # TypeError if not a string
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise VqbeamError(
            f"{path} does not list pictures, one a line, as vqbeam does; delete it, or give "
            "another --output"
        ) from error


def _write_picture(samples: Samples, row: int, own: dict, path: epath.Path) -> None:
    save_png(picture(samples.images[row]), path, {PROVENANCE: json.dumps(samples.settings | own)})


def _each(samples: Samples) -> Iterator[dict]:
    """Yields, for each image, its index and, if the run has labels, its label."""
    for row, label in enumerate(samples.labels.tolist()):
        own = {"index": samples.first + row}
        yield own | ({"label": label, "name": samples.names[row]} if samples.names else {})


def read_provenance(path: epath.Path) -> dict[str, Any]:
    """Returns the settings that the images in a file were sampled with.

    Args:
        path: A .png or .npz file.

    Raises:
        VqbeamError: The file is missing, `vqbeam sample` did not write it, or it was changed.
    """
    if not path.exists():
        raise VqbeamError(f"there is no file {path}; --like takes a .png or .npz of vqbeam sample")
    try:
        text, pixels = _text(path)
        facts = json.loads(text)
        is_right = _is_provenance(facts, pixels)
    except Exception:  # Pillow and zipfile raise many types of exceptions
        is_right = False
    if not is_right:
        raise VqbeamError(
            f"{path} does not hold the settings of its images; give a .png or .npz of vqbeam "
            "sample, as it was written"
        )
    return facts


def _is_provenance(facts: Any, pixels: int) -> bool:
    """Returns whether JSON from an untrusted file has the structure of `Run.provenance`.

    Settings and labels are checked where they are used. Other JSON may also raise a KeyError or
    TypeError.
    """
    listed = facts.get("images", [facts])
    # Otherwise a small file could list millions of images to sample.
    is_list = isinstance(listed, list) and 0 < len(listed) <= max(1, pixels // _LEAST_PIXELS)
    texts = all(isinstance(facts[name], str) for name in ("preset", "checkpoint"))
    numbers = is_list and _natural(facts["seed"]) and _natural(listed[0]["index"])
    return (
        texts
        and numbers
        and listed[0]["index"] < 2**62
        and all(image["index"] - i == listed[0]["index"] for i, image in enumerate(listed))
    )


def _natural(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def check_checkpoint(facts: dict[str, Any], run: Run, path: epath.Path) -> None:
    """Raises a VqbeamError if images are not from the models of a run."""
    if facts["checkpoint"] != run.checkpoint:
        raise VqbeamError(
            f"{path} was sampled from checkpoint {facts['checkpoint']} (preset "
            f"{facts['preset']}), but {run.path} holds checkpoint {run.checkpoint} (preset "
            f"{run.config.name}), which would give another picture; give the run it is from"
        )


def _text(path: epath.Path) -> tuple[str, int]:
    """Returns the provenance text in a file and its number of pixels; may raise any exception."""
    check_regular(path)
    with path.open("rb") as file:
        if file.read(2) == b"PK":
            file.seek(0)
            with np.load(file) as arrays:
                return str(arrays[PROVENANCE]), arrays["images"].size
        file.seek(0)
        with Image.open(file, formats=("PNG",)) as image:
            return image.text[PROVENANCE], image.width * image.height
