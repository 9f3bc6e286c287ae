"""Augmentation of training images: random in VQ-VAE training, fixed views in encoding."""

from collections.abc import Iterator, Sequence

import numpy as np
from keras import ops

# Maximum shift of a random crop, as a fraction of the side.
_SHIFT = 1 / 8


def random_changes(
    generator: np.random.Generator, kind: str, batch_size: int, sides: Sequence[int]
) -> dict[str, np.ndarray]:
    """Returns random changes for a batch of images, the arguments of `augment`.

    Args:
        generator: Source of the random numbers.
        kind: "none"; "flip" for horizontal flips with probability 0.5; "crop" for shifts of up to
            1/8 of each side, with reflected borders; "flip_crop" for both.
        batch_size: Number of images B.
        sides: Height and width of an image.

    Returns:
        A dictionary with `shifts`, int32 [B, 2], if images are shifted, and `mirrored`, bool [B],
        if some are flipped.
    """
    changes = {}
    if "crop" in kind:
        reach = (np.array(sides) * _SHIFT).astype(int)
        shifts = generator.integers(-reach, reach, (batch_size, 2), endpoint=True)
        changes["shifts"] = shifts.astype(np.int32)
    if "flip" in kind:
        changes["mirrored"] = generator.random(batch_size) < 0.5
    return changes


def augment(images, shifts=None, mirrored=None):
    """Returns changed images.

    Args:
        images: Tensor [B, H, W, C].
        shifts: Pixels by which the content moves up and to the left, int32 [B, 2].
        mirrored: Whether to mirror an image horizontally after that, bool [B].

    Returns:
        A tensor with the shape and dtype of `images`.
    """
    if shifts is None and mirrored is None:
        return images
    batch_size, height, width, channels = ops.shape(images)
    rows, columns = ops.arange(height)[None], ops.arange(width)[None]
    if mirrored is not None:
        columns = ops.where(mirrored[:, None], width - 1 - columns, columns)
    if shifts is not None:
        rows = _reflected(rows + shifts[:, :1], height)
        columns = _reflected(columns + shifts[:, 1:], width)
    # One gather of pixels from all images, as rows of a matrix.
    first = ops.arange(batch_size)[:, None, None] * height
    places = (first + rows[:, :, None]) * width + columns[:, None, :]
    return ops.take(ops.reshape(images, (-1, channels)), places, axis=0)


def _reflected(places, side: int):
    """Returns places outside of [0, side) mirrored at the borders."""
    places = ops.abs(places)
    return ops.minimum(places, 2 * (side - 1) - places)


# Shift of ten-crop views, as a fraction of the side.
_TEN_CROP_SHIFT = 0.05

_CORNERS = {
    "": (0, 0),
    "#top-left": (-1, -1),
    "#top-right": (-1, 1),
    "#bottom-left": (1, -1),
    "#bottom-right": (1, 1),
}


def variant_count(kind: str) -> int:
    """Returns the number of views that `variants` yields."""
    return {"none": 1, "flip": 2, "ten_crop": 10}[kind]


def variants(images: np.ndarray, kind: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yields augmented views of a batch of images, starting with the images themselves.

    Args:
        images: uint8 [B, H, W, C].
        kind: "none"; "flip" adds horizontal flips; "ten_crop" pads each side by 1/20 of its length
            (at least one pixel) with reflection, crops the four corners and the centre (the
            original image), and adds the horizontal flip of each.

    Yields:
        The suffix for record keys, such as "#top-left#flip", and the view, uint8 [B, H, W, C].
    """
    crops = _CORNERS if kind == "ten_crop" else {"": (0, 0)}
    for name, (down, right) in crops.items():
        crop = _shifted(_shifted(images, down, axis=1), right, axis=2)
        yield name, crop
        if kind != "none":
            yield f"{name}#flip", crop[:, :, ::-1]


def _shifted(images: np.ndarray, direction: int, axis: int) -> np.ndarray:
    side = images.shape[axis]
    shift = direction * max(1, round(_TEN_CROP_SHIFT * side))
    places = np.abs(np.arange(side) + shift)
    return np.take(images, np.minimum(places, 2 * (side - 1) - places), axis=axis)
