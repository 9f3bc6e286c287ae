"""Checks of paths, absolute paths, and Beam's runner."""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence

from vqbeam.configs import DataConfig, VqbeamError

SUPPORTED_PATHS = "paths are those of this machine, or begin with gs://"
_BUCKET = "gs://"
# The prefix of a run on the Hugging Face hub.
HUB = "hf://"
# Endings that mark a path as that of a file, never of a folder.
_FILES = {
    ".bmp",
    ".csv",
    ".gif",
    ".jpeg",
    ".jpg",
    ".json",
    ".jsonl",
    ".npy",
    ".npz",
    ".parquet",
    ".pdf",
}
_FILES |= {".png", ".svg", ".tfrecord", ".tif", ".tiff", ".txt", ".webp", ".zip"}


def is_supported(path: str) -> bool:
    """Returns whether a path is local or begins with gs://."""
    scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", path)
    return scheme is None or path.startswith(_BUCKET)


def absolute(path: str) -> str:
    """Returns the absolute path; a URL is returned unchanged."""
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))


def check_shared(places: Mapping[str, str]) -> None:
    """Checks that workers on other machines can read and write paths.

    Args:
        places: The paths, by the flag that sets each.

    Raises:
        VqbeamError: A path is local.
    """
    for flag, place in places.items():
        if "://" not in place:
            raise VqbeamError(
                f"the workers of Dataflow cannot reach {place}; give a gs:// path by {flag}"
            )


def check_output(output: str, endings: Sequence[str]) -> None:
    """Checks the ending of an output path.

    Args:
        output: The path.
        endings: The allowed endings, such as ".png"; "" stands for a folder.

    Raises:
        VqbeamError: The path has another ending.
    """
    ending = os.path.splitext(output)[1]
    # A folder may have a dot in its name, such as runs/v1.2.
    if ending not in endings and ("" not in endings or ending.lower() in _FILES):
        files = " or ".join(ending for ending in endings if ending)
        folder = ", or a folder" if "" in endings else ""
        raise VqbeamError(f"--output is {output!r}; give a name that ends in {files}{folder}")
    if ending in endings and ending and os.path.isdir(output):
        raise VqbeamError(f"--output is {output!r}, which is a folder; give the name of a file")


def source_paths(data: DataConfig) -> dict[str, str]:
    """Returns the path that the images are read from, by the flag that sets it."""
    if data.path:
        return {"--data.source": data.path}
    if data.source.startswith("hf:"):
        return {"--data.source": "the downloads of Hugging Face on this machine"}
    return {"--data.data-dir": data.data_dir or "the datasets of TFDS on this machine"}


def with_absolute_paths(data: DataConfig) -> DataConfig:
    """Returns the section with absolute paths.

    Raises:
        VqbeamError: A path is neither local nor begins with gs://.
    """
    places = source_paths(data) | (
        {"--data.manual-dir": data.manual_dir} if data.manual_dir else {}
    )
    for flag, place in places.items():
        if not is_supported(place):
            raise VqbeamError(f"{flag} is {place}; {SUPPORTED_PATHS}")
    source = data.source
    if data.path:
        source = source.removesuffix(data.path) + absolute(data.path)
    return dataclasses.replace(
        data,
        source=source,
        data_dir=data.data_dir and absolute(data.data_dir),
        manual_dir=data.manual_dir and absolute(data.manual_dir),
    )


def is_dataflow(beam_args: Sequence[str]) -> bool:
    """Returns whether Beam's arguments choose Dataflow, whose workers are other machines."""
    return "dataflow" in _runner(beam_args)


def runs_here(beam_args: Sequence[str]) -> bool:
    """Returns whether Beam's arguments choose a runner in this process or on this machine."""
    return _runner(beam_args) in ("", "direct", "fnapi", "bundlebaseddirect")


def with_runner(beam_args: Sequence[str]) -> list[str]:
    """Returns Beam's arguments, with a runner added if there is none: Beam may download its own."""
    return list(beam_args) if _runner(beam_args) else ["--runner=FnApiRunner", *beam_args]


def _runner(beam_args: Sequence[str]) -> str:
    """Returns the runner that Beam's arguments choose, such as "direct"; "" if there is none."""
    chosen = [word.removeprefix("--runner=") for word in beam_args if word.startswith("--runner=")]
    # Beam accepts names in any case, and without "Runner".
    return chosen[-1].lower().removesuffix("runner") if chosen else ""
