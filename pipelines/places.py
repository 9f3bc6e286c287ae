"""Paths as every worker understands them, in whatever folder it was started."""

import dataclasses
import os

from configs import DataConfig

_FOLDER = "folder:"


def absolute(path: str) -> str:
    """Returns a path that names the same place from everywhere; a URL does so already."""
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))


def located(data: DataConfig) -> DataConfig:
    """Returns the section with the paths in it absolute."""
    source, data_dir = data.source, data.data_dir
    if source.startswith(_FOLDER):
        source = _FOLDER + absolute(source.removeprefix(_FOLDER))
    data_dir = absolute(data_dir) if data_dir else data_dir
    return dataclasses.replace(data, source=source, data_dir=data_dir)
