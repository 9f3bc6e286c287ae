"""The gradient audit as a picture: which paths are open, and how strong the gradients are."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import LogLocator, NullFormatter
from PIL import Image

from vqbeam.vqvae.gradients import Audit

_COLOURS = {
    "reconstruction": "#1f5fbf",
    "codebook": "#2a8a3e",
    "commitment": "#d1495b",
    "entropy": "#8a5fb0",
    "discriminator": "#8c6d1f",
    "adversarial": "#d97706",
}
_CLOSED = "#b5b5b5"
_BOX_WIDTH, _BOX_GAP = 2.3, 0.9
_LANE = 0.85


def gradient_figure(
    audits: Sequence[Audit], curves: Mapping[str, Sequence[float]] | None = None
) -> Image.Image:
    """Draws a diagram of each audit, one below the other, and curves of training below them.

    The boxes stand in the order in which an image passes them. Each loss has a line of its own
    under them, with an arrow up to each part that its gradient reaches, and the gradient's norm
    beside it; where no path is open, a cross.

    Args:
        audits: At least one.
        curves: By name the reconstruction errors after 0, 1, 2, ... training steps.
    """
    heights = [2.2 + _LANE * len(audit.norms) for audit in audits] + ([3.2] if curves else [])
    figure = Figure(figsize=(9.5, sum(heights)), layout="constrained", facecolor="white")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    for place, audit in zip(axes, audits, strict=False):
        draw_paths(place, audit)
    if curves:
        draw_curves(axes[-1], curves)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def draw_paths(axes: Axes, audit: Audit) -> None:
    """Draws the boxes of an audit and the path of each loss to each of them."""
    parts = _parts(audit)
    lefts = {part: i * (_BOX_WIDTH + _BOX_GAP) for i, part in enumerate(parts)}
    for part, left in lefts.items():
        _draw_box(axes, left, parts[part], closed=part not in _reachable(audit))
        if left:
            arrow = {"arrowstyle": "-|>", "color": "black"}
            axes.annotate("", (left, 0.5), (left - _BOX_GAP, 0.5), arrowprops=arrow)
    slots = len(audit.norms) + 1
    for lane, (loss, norms) in enumerate(audit.norms.items()):
        height = -_LANE * (lane + 0.7)
        colour = _COLOURS.get(loss, "black")
        axes.text(-0.35, height, loss, color=colour, ha="right", va="center", weight="bold")
        axes.plot([-0.25, max(lefts.values()) + _BOX_WIDTH], [height] * 2, color=colour, lw=0.7)
        for part, norm in norms.items():
            across = lefts[part] + _BOX_WIDTH * (lane + 1) / slots - 0.15
            _draw_path(axes, across, height, norm, colour)
    axes.set_title(f"estimator: {audit.estimator or 'that of rounding'}", loc="left")
    axes.set_xlim(-2.3, max(lefts.values()) + _BOX_WIDTH + 0.6)
    axes.set_ylim(-_LANE * (len(audit.norms) + 0.2), 1.2)
    axes.set_axis_off()


def draw_curves(axes: Axes, curves: Mapping[str, Sequence[float]]) -> None:
    """Draws reconstruction errors over training steps, the last one written at its end."""
    for name, errors in curves.items():
        (line,) = axes.plot(range(len(errors)), errors, label=name, lw=1.2)
        end = (len(errors) - 1, errors[-1])
        style = {"textcoords": "offset points", "va": "center", "color": line.get_color()}
        axes.annotate(f"{errors[-1]:.3f}", end, (4, 0), **style)
    axes.set_xlabel("training step")
    axes.set_ylabel("reconstruction error\n(share of the variance)")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.08)
    axes.legend(frameon=False)


def _parts(audit: Audit) -> dict[str, str]:
    """Returns what is written in each box, by part, in the order of the boxes."""
    codebook = {
        "gradient": "quantizer\nand codebook",
        "moving average": "quantizer\n(codebook by\nmoving average)",
        "nothing": "quantizer\n(no codebook)",
    }[audit.moved_by]
    texts = {"encoder": "encoder", "predictions": "predictions", "codebook": codebook}
    texts |= {"decoder": "decoder", "discriminator": "discriminator"}
    return {part: text for part, text in texts.items() if part in {*_reachable(audit), "codebook"}}


def _reachable(audit: Audit) -> set[str]:
    return {part for norms in audit.norms.values() for part in norms}


def _draw_box(axes, left, text, *, closed):
    face = "#eeeeee" if closed else "#fff7e0"
    box = FancyBboxPatch((left, 0), _BOX_WIDTH, 1, boxstyle="round,pad=0.02", fc=face, ec="black")
    axes.add_patch(box)
    axes.text(left + _BOX_WIDTH / 2, 0.5, text, ha="center", va="center", fontsize=9)


def _draw_path(axes, across, height, norm, colour):
    """Draws an arrow up to a box, with the norm beside it, or a crossed stub where it is 0."""
    if norm:
        arrow = {"arrowstyle": "-|>", "color": colour, "lw": 1.6, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", (across, -0.05), (across, height), arrowprops=arrow)
        # Arrows of the losses below may pass here: the number stands before them.
        style = {"fontsize": 8, "zorder": 5, "bbox": {"fc": "white", "ec": "none", "pad": 0.5}}
        axes.text(across + 0.08, height + 0.2, f"{norm:.2g}", color=colour, **style)
        return
    top = height + 0.3
    axes.plot([across] * 2, [height, top], color=_CLOSED, lw=1.6)
    axes.plot([across], [top], marker="x", color=_CLOSED, ms=8, mew=2)
    axes.text(across + 0.12, height + 0.2, "0", color="#808080", fontsize=8)
