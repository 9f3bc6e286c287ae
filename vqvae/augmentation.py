"""Augmentation of training images: random in VQ-VAE training, fixed views in encoding."""

from collections.abc import Iterator, Sequence

import numpy as np
import tensorflow as tf
from keras import ops

# Maximum shift of a random crop, as a fraction of the side.
_SHIFT = 1 / 8


def random_changes(seed, kind: str, count: int, sides: Sequence[int]) -> dict[str, tf.Tensor]:
    """Returns random changes for a batch of images, as keyword arguments of `augment`.

    The function runs in tf.data.

    Args:
        seed: Integer tensor [2]; the changes depend on it alone.
        kind: "none"; "flip" for horizontal flips with probability 0.5; "crop" for shifts of up to
            1/8 of each side, with reflected borders; "flip_crop" for both.
        count: Number of images N.
        sides: Height and width of an image.

    Returns:
        A dictionary with `shifts`, int32 [N, 2], if images are shifted, and `mirrored`, bool [N],
        if some are flipped.
    """
    changes = {}
    if "crop" in kind:
        reach = [int(side * _SHIFT) for side in sides]
        numbers = tf.random.stateless_uniform([count, 2], seed)
        # All integers from −reach to reach are equally likely.
        shifts = tf.floor(numbers * [2.0 * most + 1 for most in reach])
        changes["shifts"] = tf.cast(shifts, tf.int32) - reach
    if "flip" in kind:
        numbers = tf.random.stateless_uniform([count], seed + tf.constant([1, 0], seed.dtype))
        changes["mirrored"] = numbers < 0.5
    return changes


def augment(images, shifts=None, mirrored=None):
    """Returns the images shifted and then mirrored.

    Args:
        images: Tensor [B, H, W, C].
        shifts: Pixels by which the content moves up and to the left, int32 [B, 2].
        mirrored: Whether to mirror each image horizontally, bool [B].

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
    # As a matrix with a row per pixel, all images take a single gather.
    first = ops.arange(batch_size)[:, None, None] * height
    places = (first + rows[:, :, None]) * width + columns[:, None, :]
    return ops.take(ops.reshape(images, (-1, channels)), places, axis=0)


def _reflected(places, side: int):
    """Returns the positions, with those outside [0, side) reflected at the borders."""
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
