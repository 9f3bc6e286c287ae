"""Images that a user brings to a trained run, shaped as the run's own."""

import numpy as np
from etils import epath

from vqbeam.configs import Config, VqbeamError
from vqbeam.pipelines.sources.folder import image_keys
from vqbeam.pipelines.sources.images import ImageError, decode_image
from vqbeam.vqvae.layout import CodeLayout


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


HALVES = ("top-half", "bottom-half", "left-half", "right-half")


def region_mask(region: str, config: Config) -> np.ndarray:
    """Returns how far each pixel belongs to a region.

    Args:
        region: One of `HALVES`, or the path of an image: what is white belongs to it. The image
            is cropped, or padded with black, and resized as the run's images were.
        config: The run's.

    Returns:
        float32 [H, W] in [0, 1].

    Raises:
        VqbeamError: There is no such file, or it is no image.
    """
    height, width, _ = config.image_shape
    if region in HALVES:
        rows, columns = np.indices((height, width)) + 0.5
        top, left = rows < height / 2, columns < width / 2
        masks = dict(zip(HALVES, (top, ~top, left, ~left), strict=True))
        return masks[region].astype(np.float32)
    path = epath.Path(region).expanduser()
    if not path.exists():
        raise VqbeamError(f"keep is {region!r}; give {', '.join(HALVES)} or an image file")
    try:
        shape = {"height": height, "width": width, "channels": 1}
        mask = decode_image(path.read_bytes(), **shape, fit=config.data.fit)
    except ImageError as error:
        raise VqbeamError(f"the mask {path} cannot be read ({error}); give another") from error
    return mask[..., 0].astype(np.float32) / 255


def kept_cells(mask: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Returns the cells of a grid of which at least half is in the region.

    Args:
        mask: From `region_mask`.
        grid: Rows and columns, which divide those of the mask.

    Returns:
        bool [rows, columns].
    """
    (height, width), (rows, columns) = mask.shape, grid
    cells = mask.reshape(rows, height // rows, columns, width // columns)
    return cells.mean(axis=(1, 3)) >= 0.5


def kept_codes(mask: np.ndarray, layout: CodeLayout) -> np.ndarray:
    """Returns the codes, of all levels, whose cells are kept: bool [*layout.shape]."""
    cells = [kept_cells(mask, grid).ravel() for grid in layout.grids]
    return np.repeat(np.concatenate(cells), layout.depth).reshape(layout.shape)
