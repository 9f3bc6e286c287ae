"""The command that measures the likelihood and the reconstruction error of images."""

import json
import math
import sys

import numpy as np
from etils import epath

from vqbeam.configs import Config, VqbeamError
from vqbeam.pipelines.sampling.api import Run
from vqbeam.pipelines.sampling.input_images import image_files, read_image
from vqbeam.prior.training import bits_per_dim
from vqbeam.vqvae.fitting.progress import ProgressBar
from vqbeam.vqvae.storage.files import write_bytes
from vqbeam.vqvae.storage.labels import Label, label_name, parse_label


def score(
    run_dir: str,
    input: str,
    label: str | None = None,
    output: str | None = None,
    precision: str | None = None,
    sort: bool = False,
) -> None:
    """Writes a line of JSON for each image, and reports those that cannot be read.

    `log_likelihood` is log p(codes | label) under the prior, in nats. `nats_per_code` and
    `bits_per_dim` are its negative per code and per value of the image (H·W·C values), so higher
    means less likely. They measure the codes alone: the decoder is deterministic and assigns no
    probability to pixels. `mse` is the squared error of the reconstruction, on pixels in [0, 255].

    Args:
        run_dir: Folder of a run with both models.
        input: An image file, or a folder with images at any depth.
        label: Class or attributes that the prior is conditioned on; None for none.
        output: The file for the lines; None for standard output.
        precision: "exact" or "fast", which each line states; by default the run's own.
        sort: Whether to list the least likely images first instead of sorting by name.

    Raises:
        VqbeamError: The run lacks a model or the label, there is no image, or none can be read.
    """
    run = Run(run_dir)
    labels = run.prior_labels
    row = parse_label(label, labels)
    precision = run.settings(precision=precision).precision
    lines = _scored(run, image_files(epath.Path(input).expanduser()), row, precision)
    broken = sum("error" in line for line in lines)
    if broken == len(lines):
        raise VqbeamError(f"none of the images in {input} can be read ({lines[0]['error']})")
    if sort:
        lines.sort(key=lambda line: -line.get("bits_per_dim", -math.inf))
    name = None if label is None else label_name(row, labels)
    asked = {"label": name, "precision": precision}
    lines = [line if "error" in line else line | asked for line in lines]
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


def _scored(run: Run, files: dict[str, epath.Path], label: Label, precision: str) -> list[dict]:
    """Returns the metrics of each file, or the error if it could not be read."""
    size, lines, named = run.config.encode.batch_size, [], list(files.items())
    with ProgressBar("score", len(files)) as bar:
        for first in range(0, len(named), size):
            batch = [_read(name, path, run.config) for name, path in named[first : first + size]]
            images = [line.pop("image") for line in batch if "image" in line]
            metrics = iter(_metrics(run, np.stack(images), label, precision) if images else [])
            lines += [line if "error" in line else line | next(metrics) for line in batch]
            bar.update(len(batch))
    return lines


def _read(name: str, path: epath.Path, config: Config) -> dict:
    try:
        return {"file": name, "image": read_image(path, config)}
    except (VqbeamError, OSError) as error:
        return {"file": name, "error": str(error)}


def _metrics(run: Run, images: np.ndarray, label: Label, precision: str) -> list[dict]:
    """Returns the metrics of images, uint8 [B, H, W, C], that all have the same label."""
    layout, codes = run.prior.layout, run.encode(images)
    errors = np.square(images.astype(np.float64) - run.decode(codes)).mean(axis=(1, 2, 3))
    rows = np.asarray([label] * len(codes), np.int32)
    scores = run.code_log_likelihood(codes, rows, precision)
    return [
        {
            "log_likelihood": float(nats),
            "nats_per_code": float(-nats / layout.length),
            "bits_per_dim": bits_per_dim(float(-nats / layout.length), layout, run.config),
            "mse": float(error),
        }
        for nats, error in zip(scores, errors, strict=True)
    ]
