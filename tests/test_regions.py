import numpy as np
import pytest
from PIL import Image

from vqbeam.configs import VqbeamError
from vqbeam.pipelines.sampling.input_images import HALVES, kept_cells, kept_codes, region_mask
from vqbeam.vqvae.layout import CodeLayout


@pytest.fixture
def config(tiny_config):
    return tiny_config()


def test_halves(config):
    masks = {half: region_mask(half, config) for half in HALVES}
    for mask in masks.values():
        assert mask.shape == (8, 8) and mask.dtype == np.float32 and mask.sum() == 32
    assert masks["top-half"][:4].all() and masks["left-half"][:, :4].all()
    np.testing.assert_array_equal(masks["bottom-half"], 1 - masks["top-half"])
    np.testing.assert_array_equal(masks["right-half"], 1 - masks["left-half"])


def test_a_mask_is_brought_to_the_size_of_the_images(config, tmp_path):
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:8, 8:] = 255
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    mask = region_mask(str(tmp_path / "mask.png"), config)
    assert mask.shape == (8, 8) and mask.max() <= 1
    np.testing.assert_array_equal(kept_cells(mask, (2, 2)), [[False, True], [False, False]])


def test_where_a_mask_is_transparent_nothing_is_kept(config, tmp_path):
    pixels = np.full((16, 16, 4), 255, np.uint8)
    pixels[:8, 8:, 3] = 0
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    mask = region_mask(str(tmp_path / "mask.png"), config)
    np.testing.assert_array_equal(kept_cells(mask, (2, 2)), [[True, False], [True, True]])


def test_what_is_no_mask(config, tmp_path):
    with pytest.raises(VqbeamError, match="keep is 'middle'; give top-half, .* or an image file"):
        region_mask("middle", config)
    (tmp_path / "mask.png").write_bytes(b"no image")
    with pytest.raises(VqbeamError, match="the mask .*mask.png cannot be read .*; give another"):
        region_mask(str(tmp_path / "mask.png"), config)


def test_a_cell_is_kept_where_half_of_it_is():
    mask = np.zeros((4, 6), np.float32)
    mask[0, :3] = 1  # 2 of 4 pixels, 1 of 4
    mask[2:, 4:] = 0.49
    np.testing.assert_array_equal(kept_cells(mask, (2, 3)), [[True, False, False], [False] * 3])


@pytest.mark.parametrize(
    "layout",
    [
        CodeLayout(9, ((4, 4),)),
        CodeLayout(9, ((4, 4),), depth=3),
        CodeLayout(9, ((2, 2), (4, 4))),
    ],
    ids=CodeLayout.describe,
)
def test_codes_of_every_level_are_kept_with_their_cells(layout, config):
    for half, places in (("top-half", layout.rows), ("right-half", 3 - layout.columns)):
        keep = kept_codes(region_mask(half, config), layout)
        assert keep.shape == layout.shape and keep.dtype == bool
        np.testing.assert_array_equal(keep.ravel(), places < 1.5)
