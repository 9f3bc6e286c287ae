import dataclasses
import json

import numpy as np
import pytest
from keras import ops

from vqbeam.vqvae.layout import CodeLayout, code_layout

FLAT = CodeLayout(11, ((3, 4),))
DEEP = CodeLayout(11, ((2, 3),), depth=4)
PYRAMID = CodeLayout(11, ((2, 3), (4, 6)))
LAYOUTS = [FLAT, DEEP, PYRAMID]


@pytest.mark.parametrize(
    ("layout", "shape", "length", "levels", "text"),
    [
        (FLAT, (3, 4), 12, 1, "3×4 grid, K = 11"),
        (DEEP, (2, 3, 4), 24, 4, "2×3 grid of 4 codes each, K = 11"),
        (PYRAMID, (30,), 30, 2, "2×3 and 4×6 grids, K = 11"),
    ],
)
def test_sizes(layout, shape, length, levels, text):
    assert layout.shape == shape
    assert layout.length == np.prod(shape) == length
    assert layout.levels == levels
    assert layout.describe() == text


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_code_has_a_level_and_a_place(layout):
    for values, dtype in ((layout.level, "int32"), (layout.rows, "float32")):
        assert values.shape == (layout.length,) and values.dtype == dtype
    assert layout.columns.shape == (layout.length,) and layout.columns.dtype == np.float32


def test_one_grid_is_in_raster_order():
    np.testing.assert_array_equal(FLAT.level, np.zeros(12))
    np.testing.assert_array_equal(FLAT.rows, np.arange(12) // 4)
    np.testing.assert_array_equal(FLAT.columns, np.arange(12) % 4)


def test_the_codes_of_a_position_lie_side_by_side():
    np.testing.assert_array_equal(DEEP.level, [0, 1, 2, 3] * 6)
    for place, expected in ((DEEP.rows, [0, 0, 0, 1, 1, 1]), (DEEP.columns, [0, 1, 2] * 2)):
        np.testing.assert_array_equal(place, np.repeat(expected, 4))


def test_a_coarse_cell_lies_amid_the_cells_that_it_covers():
    np.testing.assert_array_equal(PYRAMID.level, [0] * 6 + [1] * 24)
    np.testing.assert_array_equal(PYRAMID.rows[:6], [0.5, 0.5, 0.5, 2.5, 2.5, 2.5])
    np.testing.assert_array_equal(PYRAMID.columns[:6], [0.5, 2.5, 4.5] * 2)
    np.testing.assert_array_equal(PYRAMID.rows[6:], np.arange(24) // 6)
    np.testing.assert_array_equal(PYRAMID.columns[6:], np.arange(24) % 6)


@pytest.mark.parametrize(
    ("layout", "shapes"),
    [(FLAT, [(3, 4)]), (DEEP, [(2, 3, 4)]), (PYRAMID, [(2, 3), (4, 6)])],
)
def test_split_and_join_are_inverses(layout, shapes):
    codes = np.arange(5 * layout.length, dtype="int32").reshape(5, *layout.shape)
    parts = layout.split(codes)
    assert [tuple(part.shape) for part in parts] == [(5, *shape) for shape in shapes]
    flat = [ops.convert_to_numpy(part).reshape(5, -1) for part in parts]
    np.testing.assert_array_equal(np.concatenate(flat, axis=1), codes.reshape(5, -1))
    np.testing.assert_array_equal(ops.convert_to_numpy(layout.join(parts)), codes)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_survives_json(layout):
    fields = json.loads(json.dumps(dataclasses.asdict(layout)))
    assert CodeLayout(**fields) == layout
    assert CodeLayout.of(fields) == CodeLayout.of(layout) == layout
    assert hash(CodeLayout(**fields)) == hash(layout)


@pytest.mark.parametrize(("grids", "depth"), [(((2, 2), (4, 4)), 2), ((), 1)])
def test_what_no_model_makes_is_refused(grids, depth):
    with pytest.raises(ValueError, match=f"with {depth} codes at each position are not supported"):
        CodeLayout(11, grids, depth)


@pytest.mark.parametrize(
    ("changes", "layout"),
    [
        ({}, CodeLayout(12, ((2, 3),))),
        (dict(vqvae__quantizer="residual", vqvae__depth=3), CodeLayout(12, ((2, 3),), depth=3)),
        (dict(vqvae__grids=2, vqvae__downsampling=2), CodeLayout(12, ((2, 3), (4, 6)))),
    ],
)
def test_layout_of_a_config(tiny_config, changes, layout):
    assert code_layout(tiny_config(data__width=12, **changes)) == layout
