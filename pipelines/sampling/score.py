"""How likely a run finds images of one's own, and how well it can give them back."""

import json
import math
import sys

import numpy as np
from etils import epath

from vqbeam.configs import Config, VqbeamError
from vqbeam.pipelines.sampling.decoder import Models
from vqbeam.pipelines.sampling.input_images import image_files, read_image
from vqbeam.pipelines.sampling.labels import Label, label_name, parse_label
from vqbeam.prior.training import bits_per_dim
from vqbeam.vqvae.fitting.compilation import in_batches
from vqbeam.vqvae.fitting.progress import progress_bar
from vqbeam.vqvae.storage.files import write_bytes
from vqbeam.vqvae.storage.labels import Labels
from vqbeam.vqvae.storage.run_folder import RunFolder


def score(
    run_dir: str, input: str, label: str | None = None, output: str | None = None, sort=False
) -> None:
    """Writes a line of JSON for each image, and reports those that cannot be read.

    `log_likelihood` is log p(codes | label) of the image's codes under the prior, in nats;
    `nats_per_code` and `bits_per_dim`, which is what they say, count downwards: more is less
    likely. They are of the codes alone. The decoder is deterministic and gives pixels no
    probability: how far they are from the decoded codes is in `mse`, of 255².

    Args:
        run_dir: Folder of a run with both models.
        input: An image file, or a folder with images at any depth.
        label: Class or attributes that the prior is told; None for none.
        output: The file for the lines; None for standard output.
        sort: Whether the least likely come first; they come by name otherwise.

    Raises:
        VqbeamError: The run lacks a model or the label, there is no image, or none can be read.
    """
    run = RunFolder(run_dir)
    config = run.load_config()
    labels = Labels.of(run.require("train-prior"))
    row = parse_label(label, labels)
    files = image_files(epath.Path(input).expanduser())
    lines = _scored(run, config, files, row)
    broken = sum("error" in line for line in lines)
    if broken == len(lines):
        raise VqbeamError(f"none of the images in {input} can be read ({lines[0]['error']})")
    if sort:
        lines.sort(key=lambda line: -line.get("bits_per_dim", -math.inf))
    name = None if label is None else label_name(row, labels)
    lines = [line if "error" in line else line | {"label": name} for line in lines]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    if output is None:
        sys.stdout.write(text)
    else:
        path = epath.Path(output).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, text.encode())
        print(f"{len(lines) - broken} images scored: {path}")
    if broken:
        print(f"{broken} of {len(lines)} images could not be read", file=sys.stderr)


def _scored(
    run: RunFolder, config: Config, files: dict[str, epath.Path], label: Label
) -> list[dict]:
    """Returns for each file its figures, or the error that kept it from being read."""
    measure = _measures(Models(run), config)
    size, lines, named = config.encode.batch_size, [], list(files.items())
    with progress_bar("score", len(files)) as bar:
        for first in range(0, len(named), size):
            batch = [_read(name, path, config) for name, path in named[first : first + size]]
            images = [line.pop("image") for line in batch if "image" in line]
            figures = iter(measure(np.stack(images), label) if images else [])
            lines += [line if "error" in line else line | next(figures) for line in batch]
            bar.update(len(batch))
    return lines


def _read(name: str, path: epath.Path, config: Config) -> dict:
    try:
        return {"file": name, "image": read_image(path, config)}
    except VqbeamError as error:
        return {"file": name, "error": str(error)}


def log_likelihoods(
    models: Models, codes: np.ndarray, labels: np.ndarray, batch_size: int
) -> np.ndarray:
    """Returns log p(codes | label) in nats, float32 [N].

    Args:
        models: Those of the run.
        codes: int32 [N, *layout.shape].
        labels: int32 [N]; −1 for none; or of attributes [N, A].
        batch_size: Images scored at once.
    """

    def nats(rows):
        return models.score(codes[rows], labels[rows])

    return in_batches(nats, np.arange(len(codes)), batch_size)


def _measures(models: Models, config: Config):
    """Returns a function from images uint8 [B, H, W, C] and a label to the figures of each."""
    size, layout = config.encode.batch_size, models.prior.layout

    def measure(images: np.ndarray, label: Label) -> list[dict]:
        codes = in_batches(models.encode, images, size)
        copies = in_batches(models.decode, codes, size)
        errors = np.square(images.astype(np.float64) - copies).mean(axis=(1, 2, 3))
        labels = np.asarray([label] * len(codes), np.int32)
        scores = log_likelihoods(models, codes, labels, size)
        return [
            {
                "log_likelihood": float(nats),
                "nats_per_code": float(-nats / layout.length),
                "bits_per_dim": bits_per_dim(float(-nats / layout.length), layout, config),
                "mse": float(error),
            }
            for nats, error in zip(scores, errors, strict=True)
        ]

    return measure
