"""Variants of training images, whose codes the prior trains on beside those of the images."""

from collections.abc import Iterator

import numpy as np

# Ten-crop shifts by this share of a side.
_SHIFT = 0.05

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
    shift = direction * max(1, round(_SHIFT * side))
    places = np.abs(np.arange(side) + shift)
    return np.take(images, np.minimum(places, 2 * (side - 1) - places), axis=axis)
