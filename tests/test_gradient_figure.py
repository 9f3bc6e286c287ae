import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from vqbeam.pipelines.gradients import draw_curves, draw_paths, gradient_figure
from vqbeam.vqvae.gradients import Audit

NORMS = {
    "reconstruction": {"encoder": 0.25, "codebook": 0.0, "decoder": 1.5},
    "codebook": {"encoder": 0.0, "codebook": 0.125, "decoder": 0.0},
    "commitment": {"encoder": 0.0625, "codebook": 0.0, "decoder": 0.0},
}


def audit_of(norms=None, moved_by="gradient", estimator="straight_through"):
    return Audit(estimator, moved_by, norms or NORMS)


def without_codebook():
    return {
        loss: {part: norm for part, norm in at.items() if part != "codebook"}
        for loss, at in NORMS.items()
        if loss != "codebook"
    }


def drawn(audit):
    axes = Figure().subplots()
    draw_paths(axes, audit)
    return axes


def texts(axes):
    return [text.get_text() for text in axes.texts if text.get_text()]


def crosses(axes):
    return [line for line in axes.lines if line.get_marker() == "x"]


def arrows(axes):
    """The arrows from a loss up to a box; those between boxes are black."""
    found = [text.arrow_patch for text in axes.texts if getattr(text, "arrow_patch", None)]
    return [arrow for arrow in found if to_rgb(arrow.get_edgecolor()) != (0, 0, 0)]


def test_open_paths_have_an_arrow_and_a_norm_and_closed_ones_a_cross():
    axes = drawn(audit_of())
    assert len(arrows(axes)) == 4
    assert len(crosses(axes)) == 5
    shown = texts(axes)
    assert [shown.count(norm) for norm in ("0.25", "1.5", "0.12", "0.062", "0")] == [1, 1, 1, 1, 5]
    assert all(loss in shown for loss in NORMS)
    assert axes.get_title(loc="left") == "estimator: straight_through"


def test_each_arrow_stands_under_the_box_of_its_part():
    axes = drawn(audit_of())
    boxes = [patch.get_bbox() for patch in axes.patches if hasattr(patch, "get_boxstyle")]
    assert [box.x0 for box in boxes] == sorted(box.x0 for box in boxes)
    of_losses = [text for text in axes.texts if getattr(text, "arrow_patch", None)]
    under = {"encoder": boxes[0], "codebook": boxes[1], "decoder": boxes[2]}
    places = [text.xy[0] for text in of_losses if text.arrow_patch in arrows(axes)]
    expected = [part for at in NORMS.values() for part, norm in at.items() if norm]
    for across, part in zip(places, expected, strict=True):
        assert under[part].x0 < across < under[part].x1


def test_each_loss_has_its_colour():
    axes = drawn(audit_of())
    colours = {text.get_text(): text.get_color() for text in axes.texts if text.get_text() in NORMS}
    assert len(set(colours.values())) == 3
    per_loss = [to_rgb(arrow.get_edgecolor()) for arrow in arrows(axes)]
    names = [loss for loss, at in NORMS.items() for norm in at.values() if norm]
    assert per_loss == [to_rgb(colours[name]) for name in names]


@pytest.mark.parametrize(
    "moved_by,text",
    [
        ("gradient", "quantizer\nand codebook"),
        ("moving average", "quantizer\n(codebook by\nmoving average)"),
        ("nothing", "quantizer\n(no codebook)"),
    ],
)
def test_what_moves_the_codebook(moved_by, text):
    norms = NORMS if moved_by == "gradient" else without_codebook()
    axes = drawn(audit_of(norms, moved_by))
    assert text in texts(axes)
    closed = 5 if moved_by == "gradient" else 1
    assert len(crosses(axes)) == closed


def test_without_an_estimator_to_name():
    axes = drawn(audit_of(without_codebook(), "nothing", estimator=None))
    assert axes.get_title(loc="left") == "estimator: that of rounding, without a codebook"


def test_curves():
    axes = Figure().subplots()
    curves = {"straight_through": [1.0, 0.5, 0.25], "none": [1.0, 0.875, 0.8125]}
    draw_curves(axes, curves)
    for line, (name, errors) in zip(axes.lines, curves.items(), strict=True):
        assert line.get_label() == name
        np.testing.assert_array_equal(line.get_xydata(), list(enumerate(errors)))
    assert texts(axes) == ["0.250", "0.812"]


def test_the_picture_holds_all_parts_and_is_always_the_same():
    one = gradient_figure([audit_of()])
    both = gradient_figure([audit_of(), audit_of(estimator="none")], {"none": [1.0, 0.5]})
    assert one.mode == both.mode == "RGB"
    assert one.width == both.width == 950
    assert both.height > 2 * one.height
    pixels = np.asarray(one)
    np.testing.assert_array_equal(pixels, np.asarray(gradient_figure([audit_of()])))
    reconstruction = np.round(np.array(to_rgb("#1f5fbf")) * 255)
    assert (pixels == reconstruction).all(axis=-1).sum() > 100
    assert (pixels[:, 0] == 255).all()
