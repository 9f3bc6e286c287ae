import numpy as np
import pytest

from vqbeam.vqvae.augmentation import variant_count, variants

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 40, 24, 2), np.uint8)
FLIP = IMAGES[:, :, ::-1]


@pytest.mark.parametrize("kind", ["none", "flip", "ten_crop"])
def test_the_image_comes_first_and_each_has_a_name(kind):
    found = dict(variants(IMAGES, kind))
    assert len(list(variants(IMAGES, kind))) == len(found) == variant_count(kind)
    assert next(iter(found)) == ""
    np.testing.assert_array_equal(found[""], IMAGES)
    assert all(v.shape == IMAGES.shape and v.dtype == np.uint8 for v in found.values())
    if kind != "none":
        np.testing.assert_array_equal(found["#flip"], FLIP)


def test_ten_crop_in_numpy():
    found = dict(variants(IMAGES, "ten_crop"))
    # A twentieth of 40 is 2, and of 24, rounded, 1.
    padded = np.pad(IMAGES, ((0, 0), (2, 2), (1, 1), (0, 0)), mode="reflect")
    for row, top in (("top", 0), ("bottom", 4)):
        for column, left in (("left", 0), ("right", 2)):
            crop = padded[:, top : top + 40, left : left + 24]
            np.testing.assert_array_equal(found[f"#{row}-{column}"], crop)
            np.testing.assert_array_equal(found[f"#{row}-{column}#flip"], crop[:, :, ::-1])


def test_a_side_of_few_pixels_is_shifted_by_one():
    image = np.arange(4, dtype="uint8").reshape(1, 2, 2, 1)
    found = dict(variants(image, "ten_crop"))
    assert found["#top-left"].ravel().tolist() == [3, 2, 1, 0]
