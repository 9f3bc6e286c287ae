"""New images from a trained run: codes drawn from the prior, decoded, and written."""

import dataclasses
import io
import json
from collections.abc import Sequence

import keras
import numpy as np
from etils import epath

from configs import SampleConfig, VqbeamError
from pipelines.images import encode_png
from prior.sampler import Sampler
from prior.training import load_prior
from vqvae.compilation import compile_function
from vqvae.figures import label_figure, save_png
from vqvae.progress import progress_bar
from vqvae.run_folder import RunFolder, write_bytes
from vqvae.training import load_vqvae

STAGE = "sample"


@dataclasses.dataclass(frozen=True)
class Samples:
    """New images and what they were drawn with.

    Attributes:
        images: uint8 [N, H, W, C].
        codes: int32 [N, *layout.shape].
        labels: int32 [N]; −1 for none.
        names: The label's name of each image; None where the run has no classes.
        settings: Seed and sampler settings, as in the run's SampleConfig.
    """

    images: np.ndarray
    codes: np.ndarray
    labels: np.ndarray
    names: list[str] | None
    settings: dict


def sample(
    run_dir: str,
    *,
    num: int | None = None,
    labels: Sequence[str] | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    guidance: float | None = None,
    seed: int | None = None,
    batch_size: int | None = None,
    output: str | None = None,
) -> None:
    """Draws new images from a run and writes them; what is None is as the run's config says.

    Args:
        run_dir: The run's folder.
        num: Images in all.
        labels: Names or numbers of the classes to draw, in turn; all of them by default.
        temperature: See SampleConfig, here and below.
        top_k: The number of codes.
        top_p: The probability.
        guidance: The scale.
        seed: Of the random numbers; image i of a seed is always the same image.
        batch_size: Images drawn at once.
        output: A .png (one labelled grid), a .npz (images, codes, labels), or a folder (a PNG for
            each image and samples.jsonl). samples.png by default.

    Raises:
        VqbeamError: The run has no trained prior, or a setting is out of range.
    """
    run = RunFolder(run_dir)
    config = run.load_config()
    given = {
        "num": num,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "guidance": guidance,
        "batch_size": batch_size,
    }
    path = epath.Path(output or "samples.png").expanduser()
    _check_ending(path)
    changes = {name: value for name, value in given.items() if value is not None}
    settings = dataclasses.replace(_default_settings(run), **changes)
    samples = draw_samples(run, settings, config.seed if seed is None else seed, labels)
    write_samples(samples, path)
    print(f"{len(samples.images)} new images: {path}")


def sample_stage(run_path: str) -> None:
    """Draws the images of `vqbeam run`, as the run's config says, into `DIR/samples`."""
    run = RunFolder(run_path)
    if run.is_done(STAGE):
        return
    run.begin(STAGE)
    config = run.load_config()
    samples = draw_samples(run, _default_settings(run), config.seed, None)
    path = run.folder(STAGE) / "samples.png"
    write_samples(samples, path)
    run.finish(STAGE, [path], settings=samples.settings)


def _default_settings(run: RunFolder) -> SampleConfig:
    """Returns the run's settings, without guidance where there are no classes to guide towards."""
    settings = run.load_config().sample
    has_classes = bool(run.require("train-prior")["label_names"])
    return settings if has_classes else dataclasses.replace(settings, guidance=1.0)


def draw_samples(
    run: RunFolder, settings: SampleConfig, seed: int, labels: Sequence[str] | None
) -> Samples:
    """Draws codes from the prior of a run and decodes them."""
    prior = load_prior(run)
    names = tuple(run.require("train-prior")["label_names"])
    numbers = _label_numbers(labels, names, settings.num)
    if not names and settings.guidance != 1:
        raise VqbeamError(f"guidance is {settings.guidance}, but {run.root} has no classes; use 1")
    batch_size = min(settings.batch_size, settings.num)
    with progress_bar(STAGE, settings.num) as bar:
        codes = Sampler(prior, batch_size)(
            numbers,
            seed,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            guidance=settings.guidance,
            on_batch=lambda drawn: bar.update(drawn - bar.n),
        )
    images = _decode(run, codes, batch_size)
    used = dataclasses.asdict(settings) | {"seed": seed}
    used.pop("batch_size")
    label_names = [names[number] for number in numbers] if names else None
    return Samples(images, codes, numbers, label_names, used)


def write_samples(samples: Samples, path: epath.Path) -> None:
    """Writes samples as a PNG grid, an .npz of arrays, or a folder, by the ending of `path`."""
    if path.suffix == ".png":
        text = {"vqbeam": json.dumps(samples.settings | {"labels": samples.labels.tolist()})}
        save_png(label_figure(samples.images, samples.names), path, text)
    elif path.suffix == ".npz":
        arrays = io.BytesIO()
        np.savez(arrays, images=samples.images, codes=samples.codes, labels=samples.labels)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, arrays.getvalue())
    else:
        _write_folder(samples, path)


def _check_ending(path: epath.Path) -> None:
    if path.suffix not in (".png", ".npz", ""):
        raise VqbeamError(f"cannot write samples as {path.suffix}; use .png, .npz or a folder")


def _write_folder(samples: Samples, folder: epath.Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index, image in enumerate(samples.images):
        name = f"{index:05d}.png"
        write_bytes(folder / name, encode_png(image))
        line = {"file": name, "index": index, **samples.settings}
        if samples.names:
            line |= {"label": int(samples.labels[index]), "name": samples.names[index]}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_bytes(folder / "samples.jsonl", "".join(lines).encode())


def _label_numbers(labels: Sequence[str] | None, names: Sequence[str], num: int) -> np.ndarray:
    """Returns the label of each of `num` images: those asked for, in turn."""
    if labels is None:
        chosen = range(len(names)) if names else [-1]
    elif not names:
        raise VqbeamError(f"label {labels[0]!r} was asked for, but the run has no classes")
    else:
        chosen = [_label_number(label, names) for label in labels]
    return np.resize(np.asarray(chosen, np.int32), num)


def _label_number(label: str, names: Sequence[str]) -> int:
    if label in names:
        return names.index(label)
    lowered = [name.lower() for name in names]
    if label.lower() in lowered:
        return lowered.index(label.lower())
    if label.isdecimal() and int(label) < len(names):
        return int(label)
    shown = ", ".join(names[:30]) + (", …" if len(names) > 30 else "")
    raise VqbeamError(f"the run has no label {label!r}; it has {shown}")


def _decode(run: RunFolder, codes: np.ndarray, batch_size: int) -> np.ndarray:
    model = load_vqvae(run)
    decode = compile_function(model.decode, model.variables, jit=False)
    images = []
    for first in range(0, len(codes), batch_size):
        batch = codes[first : first + batch_size]
        padded = np.pad(batch, ((0, batch_size - len(batch)), *[(0, 0)] * (batch.ndim - 1)))
        images.append(keras.ops.convert_to_numpy(decode(padded))[: len(batch)])
    return np.concatenate(images)
