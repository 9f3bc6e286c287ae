"""Variations of the training images, the same for the same seed and step."""

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
