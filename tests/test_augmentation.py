import numpy as np
import pytest
import tensorflow as tf

from vqbeam.vqvae.augmentation import augment, random_changes

SHAPE = (16, 24, 3)


def images(count, shape=SHAPE):
    return np.random.default_rng(0).integers(0, 256, (count, *shape), np.uint8)


def varied(batch, kind):
    changes = random_changes(tf.constant([0, 1]), kind, len(batch), batch.shape[1:3])
    changes = {name: values.numpy() for name, values in changes.items()}
    found = np.asarray(augment(batch, **changes))
    assert found.shape == batch.shape and found.dtype == batch.dtype
    return found


def shifts_of(image, reach):
    """All that an image can be shifted to, by shift, with its border mirrored."""
    rows, columns = reach
    padded = np.pad(image, [(rows, rows), (columns, columns), (0, 0)], mode="reflect")
    height, width, _ = image.shape
    return {
        (i - rows, j - columns): padded[i : i + height, j : j + width]
        for i in range(2 * rows + 1)
        for j in range(2 * columns + 1)
    }


def test_none_changes_nothing():
    np.testing.assert_array_equal(varied(images(5), "none"), images(5))


def test_flip_mirrors_about_half():
    batch = images(200)
    found = varied(batch, "flip")
    mirrored = (found == batch[:, :, ::-1]).all((1, 2, 3))
    kept = (found == batch).all((1, 2, 3))
    assert (mirrored ^ kept).all()
    assert 70 < mirrored.sum() < 130


@pytest.mark.backend
def test_crop_shifts_by_up_to_an_eighth():
    batch = images(300)
    seen = []
    for image, found in zip(batch, varied(batch, "crop"), strict=True):
        places = [k for k, shifted in shifts_of(image, (2, 3)).items() if (shifted == found).all()]
        assert len(places) == 1
        seen += places
    rows, columns = np.array(seen).T
    # Every shift of either side comes up, independent of the other.
    assert set(rows) == set(range(-2, 3)) and set(columns) == set(range(-3, 4))
    assert abs(np.corrcoef(rows, columns)[0, 1]) < 0.2
    assert np.bincount(rows + 2).min() > 30


@pytest.mark.backend
def test_flip_crop_does_both():
    batch = images(60)
    flips = 0
    for image, found in zip(batch, varied(batch, "flip_crop"), strict=True):
        ways = [
            any((shifted == seen).all() for shifted in shifts_of(image, (2, 3)).values())
            for seen in (found, found[:, ::-1])
        ]
        assert sum(ways) == 1
        flips += ways[1]
    assert 15 < flips < 45


def test_an_image_too_small_to_shift_stays():
    batch = images(20, (7, 4, 1))
    np.testing.assert_array_equal(varied(batch, "crop"), batch)
