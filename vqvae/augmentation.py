"""Variations of the training images, the same for the same seed and step."""

from collections.abc import Iterator

import numpy as np
import tensorflow as tf

# A crop shifts by up to this share of a side.
_SHIFT = 1 / 8


def augment(images, kind: str, seed: int, step):
    """Varies a batch of images inside tf.data.

    Args:
        images: Tensor [B, H, W, C].
        kind: "none"; "flip" mirrors each image left to right at evens; "crop" shifts each by up
            to an eighth of its sides, what comes in at the border being mirrored; "flip_crop"
            does both.
        seed: Of the random numbers.
        step: Training step, an integer tensor; the same step varies its batch in the same way.

    Returns:
        A tensor of the shape and dtype of `images`.
    """
    seeds = tf.stack([tf.cast(seed, tf.int64), tf.cast(step, tf.int64)])
    if "crop" in kind:
        images = _shift(images, seeds)
    if "flip" in kind:
        mirrored = tf.random.stateless_uniform([tf.shape(images)[0], 1, 1, 1], seeds) < 0.5
        images = tf.where(mirrored, tf.reverse(images, [2]), images)
    return images


def _shift(images, seeds):
    count, height, width, _ = tf.unstack(tf.shape(images))
    rows = _shifted_places(height, count, seeds + [1, 0])
    columns = _shifted_places(width, count, seeds + [2, 0])
    images = tf.gather(images, rows, axis=1, batch_dims=1)
    return tf.gather(images, columns, axis=2, batch_dims=1)


def _shifted_places(side, count, seeds):
    """Returns for each image where the pixels along a side come from, int32 [B, side]."""
    reach = tf.cast(tf.cast(side, tf.float32) * _SHIFT, tf.int32)
    shifts = tf.random.stateless_uniform([count, 1], seeds, -reach, reach + 1, dtype=tf.int32)
    places = tf.abs(tf.range(side)[None] + shifts)
    return tf.minimum(places, 2 * (side - 1) - places)


# Ten-crop shifts by this share of a side.
_TEN_CROP_SHIFT = 0.05

_CORNERS = {
    "": (0, 0),
    "#top-left": (-1, -1),
    "#top-right": (-1, 1),
    "#bottom-left": (1, -1),
    "#bottom-right": (1, 1),
}


def variant_count(kind: str) -> int:
    """Returns how many variants `variants` yields."""
    return {"none": 1, "flip": 2, "ten_crop": 10}[kind]


def variants(images: np.ndarray, kind: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the variants of a batch of images, the images themselves first.

    Args:
        images: uint8 [B, H, W, C].
        kind: "none"; "flip" adds their mirror images; "ten_crop" pads each side by a twentieth, at
            least by a pixel, in which the border is mirrored, and crops the four corners and the
            centre, which is the image itself; each of the five mirrored as well.

    Yields:
        What tells the variant in a key, such as "#top-left#flip", and uint8 [B, H, W, C].
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
