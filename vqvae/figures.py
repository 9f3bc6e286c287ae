"""Image grids: originals above reconstructions, and samples by label."""

import io
import math
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from vqbeam.vqvae.storage.files import write_bytes

# Name of the text chunk in a PNG, and of the array in an .npz, that record how images were sampled.
PROVENANCE = "vqbeam"
_MARGIN = 4
_SMALLEST_TILE = 64
_MOST_COLUMNS = 13


def reconstruction_figure(originals: np.ndarray, reconstructions: np.ndarray) -> Image.Image:
    """Returns a figure with each original above its reconstruction; both uint8 [N, H, W, C]."""
    columns = min(len(originals), 16)
    rows = []
    for first in range(0, len(originals), columns):
        rows += [originals[first : first + columns], reconstructions[first : first + columns]]
    return _grid(rows, headings=None)


def label_figure(
    images: np.ndarray, headings: Sequence[str] | None, *, fill: bool = False
) -> Image.Image:
    """Returns a figure with one column of images per label, headed by the label.

    Args:
        images: uint8 [N, H, W, C].
        headings: The label of each image; None for a plain grid.
        fill: Whether to use several columns per label if there are few labels.
    """
    if headings is None:
        columns = math.ceil(math.sqrt(len(images)))
        return _grid([images[i : i + columns] for i in range(0, len(images), columns)], None)
    by_label: dict[str, list[np.ndarray]] = {}
    for image, heading in zip(images, headings, strict=True):
        by_label.setdefault(heading, []).append(image)
    each = _columns_of_a_label(by_label) if fill else 1
    columns = [(name, of[i::each]) for name, of in by_label.items() for i in range(each)]
    # Use as few bands as possible with at most _MOST_COLUMNS columns, and make them equally wide.
    bands = math.ceil(len(columns) / _MOST_COLUMNS)
    width = math.ceil(len(columns) / bands)
    return _stack([_band(columns[i : i + width]) for i in range(0, len(columns), width)])


def _columns_of_a_label(by_label: Mapping[str, list[np.ndarray]]) -> int:
    """Returns the number of columns per label that makes the figure roughly square."""
    depth = max(map(len, by_label.values()))
    square = math.ceil(math.sqrt(depth / len(by_label)))
    return max(1, min(_MOST_COLUMNS // len(by_label), square))


def enlarged(image: np.ndarray, side: int = 512) -> Image.Image:
    """Returns an image [H, W, C] with each pixel as a square, at most `side` pixels large."""
    scale = max(1, side // max(image.shape[:2]))
    size = image.shape[1] * scale, image.shape[0] * scale
    return picture(image).resize(size, Image.Resampling.NEAREST)


def code_figure(
    image: np.ndarray, codes: np.ndarray, marked: tuple[int, int] | None = None
) -> Image.Image:
    """Returns an enlarged image with its grid of codes drawn over it.

    Args:
        image: uint8 [H, W, C].
        codes: int [rows, columns]; the numbers are left out where cells are too small for them.
        marked: Row and column of a cell to draw a frame around.
    """
    figure = enlarged(image).convert("RGB")
    draw = ImageDraw.Draw(figure, "RGBA")
    height, width = figure.height // codes.shape[0], figure.width // codes.shape[1]
    for (row, column), code in np.ndenumerate(codes):
        left, top = column * width, row * height
        draw.rectangle([left, top, left + width, top + height], outline=(255, 255, 255, 160))
        draw.rectangle(
            [left - 1, top - 1, left + width - 1, top + height - 1], outline=(0, 0, 0, 90)
        )
        if width >= 24:
            centre, font = (left + width / 2, top + height / 2), ImageFont.load_default(width / 4)
            draw.text(centre, str(code), "white", font, "mm", stroke_width=1, stroke_fill="black")
    if marked is not None:
        left, top = marked[1] * width, marked[0] * height
        corners = [left, top, left + width - 1, top + height - 1]
        draw.rectangle(corners, outline="#ff5a00", width=4)
    return figure


def picture(image: np.ndarray) -> Image.Image:
    """Returns a uint8 array [H, W, C] with 1 or 3 channels as a Pillow image."""
    return Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)


def save_png(figure: Image.Image, path: epath.Path, text: Mapping[str, str] | None = None) -> None:
    """Writes a figure as a PNG file atomically, with `text` in its text chunks."""
    info = PngImagePlugin.PngInfo()
    for name, value in (text or {}).items():
        info.add_itxt(name, value)
    buffer = io.BytesIO()
    figure.save(buffer, "PNG", pnginfo=info)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, buffer.getvalue())


def _band(columns: Sequence[tuple[str, list[np.ndarray]]]) -> Image.Image:
    depth = max(len(images) for _, images in columns)
    blank = np.full_like(columns[0][1][0], 255)
    rows = [
        np.stack([images[row] if row < len(images) else blank for _, images in columns])
        for row in range(depth)
    ]
    return _grid(rows, headings=[name for name, _ in columns])


def _grid(rows: Sequence[np.ndarray], headings: Sequence[str] | None) -> Image.Image:
    height, width = rows[0].shape[1:3]
    scale = max(1, math.ceil(_SMALLEST_TILE / width))
    tile_size = width * scale, height * scale
    step_x, step_y = width * scale + _MARGIN, height * scale + _MARGIN
    top = _MARGIN + (16 if headings else 0)
    size = (step_x * max(map(len, rows)) + _MARGIN, top + step_y * len(rows))
    figure = Image.new("RGB", size, "white")
    for row, images in enumerate(rows):
        for column, image in enumerate(images):
            tile = picture(image).resize(tile_size, Image.Resampling.NEAREST)
            figure.paste(tile, (_MARGIN + column * step_x, top + row * step_y))
    if headings:
        _write_headings(figure, headings, step_x)
    return figure


def _write_headings(figure: Image.Image, headings: Sequence[str], step_x: int) -> None:
    draw = ImageDraw.Draw(figure)
    for column, heading in enumerate(headings):
        size = 14
        while size > 7 and draw.textlength(heading, ImageFont.load_default(size)) > step_x - 2:
            size -= 1
        centre = (_MARGIN + column * step_x + (step_x - _MARGIN) / 2, _MARGIN + 7)
        draw.text(centre, heading, "black", ImageFont.load_default(size), anchor="mm")


def _stack(bands: Sequence[Image.Image]) -> Image.Image:
    figure = Image.new(
        "RGB", (max(b.width for b in bands), sum(b.height for b in bands) + _MARGIN), "white"
    )
    top = 0
    for band in bands:
        figure.paste(band, (0, top))
        top += band.height
    return figure
