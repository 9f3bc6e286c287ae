"""The user's own images, cropped and resized like those of a run, and masks of their parts."""

import io
import json

import numpy as np
from etils import epath
from PIL import Image

from vqbeam.configs import Config, VqbeamError
from vqbeam.pipelines.sources.folder import image_keys
from vqbeam.pipelines.sources.images import ImageError, decode_image
from vqbeam.pipelines.sources.listing import check_text
from vqbeam.vqvae.figures import PROVENANCE
from vqbeam.vqvae.layout import CodeLayout
from vqbeam.vqvae.storage.files import read_regular


def image_files(path: epath.Path) -> dict[str, epath.Path]:
    """Returns the paths of images by name: all in a folder, at any depth, or a single one.

    Raises:
        VqbeamError: There is no such file or folder, or no image in it, or a name is not UTF-8.
    """
    if path.is_dir():
        files = {key: path / key for key in sorted(image_keys(path))}
        if not files:
            raise VqbeamError(f"the folder {path} holds no image; check --input")
        return files
    if not path.exists():
        raise VqbeamError(f"there is no file or folder {path}; check --input")
    return {check_text(path.name): path}


def read_image(path: epath.Path, config: Config) -> np.ndarray:
    """Returns an image as `vqbeam prepare` would store it, uint8 [H, W, C].

    Raises:
        VqbeamError: The image cannot be decoded, or is a grid of samples.
    """
    data = read_regular(path)
    try:
        image = decode_image(data, **config.data.form)
    except ImageError as error:
        raise VqbeamError(f"{path} cannot be used ({error}); give another image") from error
    if _is_grid(data):
        raise VqbeamError(
            f"{path} is a grid of many samples; give a single image, such as those that vqbeam "
            "sample writes into a folder"
        )
    return image


def _is_grid(data: bytes) -> bool:
    """Returns whether the provenance in a decodable image names several images."""
    with Image.open(io.BytesIO(data)) as image:
        text = getattr(image, "text", {}).get(PROVENANCE, "{}")
    try:
        return "images" in json.loads(text)
    except (ValueError, TypeError, RecursionError):
        return False


HALVES = ("top-half", "bottom-half", "left-half", "right-half")


def region_mask(region: str, config: Config) -> np.ndarray:
    """Returns the mask of a region.

    Args:
        region: One of `HALVES`, or the path of an image whose white and opaque pixels form the
            region. It is cropped, or padded with black, and resized like the run's images.
        config: The run's config.

    Returns:
        float32 [H, W] in [0, 1], 1 inside the region.

    Raises:
        VqbeamError: There is no such file, or it cannot be decoded.
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
        form = config.data.form | {"channels": 1}
        # Transparent pixels become black, so they are not kept.
        mask = decode_image(read_regular(path), **form, background="black")
    except ImageError as error:
        raise VqbeamError(f"the mask {path} cannot be read ({error}); give another") from error
    return mask[..., 0].astype(np.float32) / 255


def kept_cells(mask: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Returns which cells of a grid have at least half of their area in a region.

    Args:
        mask: From `region_mask`.
        grid: Rows and columns, which divide the height and width of the mask.

    Returns:
        bool [rows, columns].
    """
    (height, width), (rows, columns) = mask.shape, grid
    cells = mask.reshape(rows, height // rows, columns, width // columns)
    return cells.mean(axis=(1, 3)) >= 0.5


def unpainted_cells(painted: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Returns the cells of a grid on which nothing is painted, bool [rows, columns].

    Args:
        painted: Bool, of any height and width. Paint on less than a tenth of a cell is ignored.
        grid: Rows and columns.
    """
    shares = Image.fromarray(painted.astype(np.float32)).resize(grid[::-1], Image.Resampling.BOX)
    return np.asarray(shares) < 0.1


def kept_codes(mask: np.ndarray, layout: CodeLayout) -> np.ndarray:
    """Returns which codes of all levels lie in kept cells, bool [*layout.shape]."""
    cells = [kept_cells(mask, grid).ravel() for grid in layout.grids]
    return np.repeat(np.concatenate(cells), layout.depth).reshape(layout.shape)
