"""Figures of many settings as a picture: how far, and how true against how varied."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image


def sweep_figure(
    values: Mapping[str, Sequence[Any]], results: Sequence[dict], best: int
) -> Image.Image:
    """Draws a line over the setting with the most values for each combination of the others.

    Args:
        values: By setting its values.
        results: Settings and figures of each combination.
        best: Which of them a star marks.
    """
    across = max(values, key=lambda name: len(values[name]))
    figure = Figure(figsize=(9.5, 4.2), layout="constrained", facecolor="white")
    canvas = FigureCanvasAgg(figure)
    distance, trade = figure.subplots(1, 2)
    lines: dict[str, list[dict]] = {}
    for result in results:
        others = [f"{name} {result['settings'][name]}" for name in values if name != across]
        lines.setdefault(", ".join(others), []).append(result)
    for name, line in lines.items():
        places = [result["settings"][across] for result in line]
        (drawn,) = distance.plot(places, [r["frechet"] for r in line], "o-", label=name)
        recalls, precisions = ([r[figure] for r in line] for figure in ("recall", "precision"))
        trade.plot(recalls, precisions, "o-", color=drawn.get_color())
        for place, recall, precision in zip(places, recalls, precisions, strict=True):
            style = {"textcoords": "offset points", "fontsize": 7, "color": "#555555"}
            trade.annotate(str(place), (recall, precision), (4, 4), **style)
    star = {"marker": "*", "ms": 15, "mfc": "none", "mec": "black", "ls": "none", "label": "best"}
    distance.plot([results[best]["settings"][across]], [results[best]["frechet"]], **star)
    trade.plot([results[best]["recall"]], [results[best]["precision"]], **star)
    distance.set(xlabel=across, ylabel="Fréchet distance (less is better)")
    trade.set(xlabel="recall (share of 1)", ylabel="precision (share of 1)")
    trade.margins(x=0.1, y=0.08)  # for the numbers beside the points
    trade.set_title(f"numbers: {across}", loc="right", fontsize=8)
    distance.legend(frameon=False, fontsize=8)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
