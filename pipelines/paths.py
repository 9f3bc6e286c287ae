"""Where the work is done and where the files lie: the runner, and paths that every worker knows."""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence

from vqbeam.configs import DataConfig, VqbeamError

SUPPORTED_PATHS = "paths are those of this machine, or begin with gs://"
_BUCKET = "gs://"
_FOLDER = "folder:"
# Endings by which a file is meant, and never a folder.
_FILES = {".bmp", ".csv", ".gif", ".jpeg", ".jpg", ".json", ".jsonl", ".npy", ".npz", ".pdf"}
_FILES |= {".png", ".svg", ".tfrecord", ".tif", ".tiff", ".txt", ".webp", ".zip"}


def is_supported(path: str) -> bool:
    """Tells whether a path is one of this machine or of a bucket, and not `s3://` or `gs:/x`."""
    scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", path)
    return scheme is None or path.startswith(_BUCKET)


def absolute(path: str) -> str:
    """Returns a path that names the same place from everywhere; a URL does so already."""
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))


def check_shared(places: Mapping[str, str]) -> None:
    """Checks the paths that workers on other machines are to read and write.

    Args:
        places: The path behind each flag.

    Raises:
        VqbeamError: One of them is of this machine alone.
    """
    for flag, place in places.items():
        if "://" not in place:
            raise VqbeamError(
                f"the workers of Dataflow cannot reach {place}; give a gs:// path by {flag}"
            )


def check_output(output: str, endings: Sequence[str]) -> None:
    """Checks the name of a file that is to be written.

    Args:
        output: The path.
        endings: Those that it may have, such as ".png"; "" stands for a folder.

    Raises:
        VqbeamError: It has another.
    """
    ending = os.path.splitext(output)[1]
    # A folder may have a dot in its name, such as runs/v1.2.
    if ending not in endings and ("" not in endings or ending.lower() in _FILES):
        files = " or ".join(ending for ending in endings if ending)
        folder = ", or a folder" if "" in endings else ""
        raise VqbeamError(f"--output is {output!r}; give a name that ends in {files}{folder}")


def source_paths(data: DataConfig) -> dict[str, str]:
    """Returns the path that a section reads its images from, behind the flag that sets it."""
    if data.source.startswith(_FOLDER):
        return {"--data.source": data.source.removeprefix(_FOLDER)}
    return {"--data.data-dir": data.data_dir or "the datasets of TFDS on this machine"}


def with_absolute_paths(data: DataConfig) -> DataConfig:
    """Returns the section with the paths in it absolute.

    Raises:
        VqbeamError: One is neither of this machine nor of a bucket.
    """
    places = source_paths(data) | (
        {"--data.manual-dir": data.manual_dir} if data.manual_dir else {}
    )
    for flag, place in places.items():
        if not is_supported(place):
            raise VqbeamError(f"{flag} is {place}; {SUPPORTED_PATHS}")
    source = data.source
    if source.startswith(_FOLDER):
        source = _FOLDER + absolute(source.removeprefix(_FOLDER))
    return dataclasses.replace(
        data,
        source=source,
        data_dir=data.data_dir and absolute(data.data_dir),
        manual_dir=data.manual_dir and absolute(data.manual_dir),
    )


def is_dataflow(beam_args: Sequence[str]) -> bool:
    """Tells whether Beam's words ask for Google's Dataflow, whose workers are other machines."""
    runners = [word for word in beam_args if word.startswith("--runner=")]
    return bool(runners) and "dataflow" in runners[-1].lower()


def with_runner(beam_args: Sequence[str]) -> list[str]:
    """Returns Beam's words with a runner; Beam's own default may download one."""
    if any(word.startswith("--runner=") for word in beam_args):
        return list(beam_args)
    return ["--runner=FnApiRunner", *beam_args]
