"""Images that a user brings to a trained run, shaped as the run's own."""

import numpy as np
from etils import epath

from vqbeam.configs import Config, VqbeamError
from vqbeam.pipelines.sources.folder import image_keys
from vqbeam.pipelines.sources.images import ImageError, decode_image


def image_files(path: epath.Path) -> dict[str, epath.Path]:
    """Returns the images of a folder, at any depth, or the one that `path` is, by name.

    Raises:
        VqbeamError: There is nothing at `path`, or no image.
    """
    if path.is_dir():
        files = {key: path / key for key in sorted(image_keys(path))}
        if not files:
            raise VqbeamError(f"the folder {path} holds no image; check --input")
        return files
    if not path.exists():
        raise VqbeamError(f"there is no file or folder {path}; check --input")
    return {path.name: path}


def read_image(path: epath.Path, config: Config) -> np.ndarray:
    """Returns an image as `vqbeam prepare` would: uint8 [H, W, C].

    Raises:
        VqbeamError: It cannot be used.
    """
    height, width, channels = config.image_shape
    shape = {"height": height, "width": width, "channels": channels}
    try:
        return decode_image(path.read_bytes(), **shape, fit=config.data.fit)
    except ImageError as error:
        raise VqbeamError(f"{path} cannot be used ({error}); give another image") from error
