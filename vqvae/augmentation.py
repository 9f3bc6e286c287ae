"""Augmentation of training images: random in VQ-VAE training, fixed views in encoding."""

from collections.abc import Iterator

import numpy as np
import tensorflow as tf

# Maximum shift of a random crop, as a fraction of the side.
_SHIFT = 1 / 8


def augment(images, kind: str, seed: int, step):
    """Returns a randomly augmented batch of images, for use in tf.data.

    Args:
        images: Tensor [B, H, W, C].
        kind: "none"; "flip" for horizontal flips with probability 0.5; "crop" for shifts of up to
            1/8 of each side, with reflected borders; "flip_crop" for both.
        seed: Random seed.
        step: Training step, an integer tensor. Results depend only on the seed and the step.

    Returns:
        A tensor with the shape and dtype of `images`.
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
    """Returns the source index of each pixel along a randomly shifted side, int32 [B, side]."""
    reach = tf.cast(tf.cast(side, tf.float32) * _SHIFT, tf.int32)
    shifts = tf.random.stateless_uniform([count, 1], seeds, -reach, reach + 1, dtype=tf.int32)
    places = tf.abs(tf.range(side)[None] + shifts)
    return tf.minimum(places, 2 * (side - 1) - places)


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
