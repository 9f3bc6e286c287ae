"""The charts of a report: what they show, and the positions of their lines, bars and labels."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

# In chart units, which the page scales.
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 440, 220, 46, 10, 12, 28
_MOST_BARS = 128


@dataclasses.dataclass(frozen=True)
class Chart:
    """A chart as the template draws it, in chart units.

    Attributes:
        title: What it shows.
        ticks: Height and label of each horizontal line.
        labels: Position and text of each label on the horizontal axis.
        names: The series.
        lines: The path of each series; empty for bars.
        marks: For each position on the horizontal axis: `left`, `width`, `x`, the heights `ys` by
            series, and `tip`, the text to show there.
        rows: The table behind the chart; the first row is its head.
        bars: Whether bars are drawn.
        even: The height of a dashed line, or None.
    """

    title: str
    ticks: list[tuple[float, str]]
    labels: list[tuple[float, str]]
    names: list[str]
    lines: list[str]
    marks: list[dict[str, Any]]
    rows: list[list[str]]
    bars: bool = False
    even: float | None = None
    width: int = _WIDTH
    height: int = _HEIGHT
    left: int = _LEFT
    right: int = _WIDTH - _RIGHT
    bottom: int = _HEIGHT - _BOTTOM


def line_chart(
    title: str,
    series: dict[str, str],
    history: list[dict[str, float]],
    together: list[dict[str, float]],
    steps: tuple[int, int],
) -> list[Chart]:
    """Returns a list with a chart of some metrics by epoch, or an empty list without epochs.

    Args:
        title: What it shows.
        series: The keys of the metrics, by their names in the chart.
        history: Metrics of each epoch.
        together: The metrics of all runs, which determine the axis.
        steps: Steps of an epoch, and the total number of steps.
    """
    series = {name: key for name, key in series.items() if history and key in history[0]}
    if not series:
        return []
    place, ticks = _axis(
        [epoch[key] for epoch in together for key in series.values() if key in epoch]
    )
    wide = (_WIDTH - _LEFT - _RIGHT) / len(history)
    xs = [_LEFT + (index + 0.5) * wide for index in range(len(history))]
    ys = {name: [place(epoch[key]) for epoch in history] for name, key in series.items()}
    rows = [
        [f"{n}", *(f"{epoch[key]:.4g}" for key in series.values())]
        for n, epoch in enumerate(history, 1)
    ]
    marks = [
        {
            "left": x - wide / 2,
            "width": wide,
            "x": x,
            "ys": [of[index] for of in ys.values()],
            "tip": f"epoch {index + 1}, {min((index + 1) * steps[0], steps[1]):,} steps: "
            + ", ".join(f"{v} {name}" for name, v in zip(series, rows[index][1:], strict=True)),
        }
        for index, x in enumerate(xs)
    ]
    return [
        Chart(
            title=title,
            ticks=ticks,
            labels=[(xs[i], f"epoch {i + 1}") for i in sorted({0, len(xs) - 1})],
            names=list(series),
            lines=[
                "M" + " L".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, of, strict=True))
                for of in ys.values()
            ],
            marks=marks,
            rows=[["epoch", *series], *rows],
        )
    ]


def bar_chart(title: str, counts: np.ndarray) -> Chart:
    """Returns a chart of the shares of codes, most used first, in at most 128 bars.

    Args:
        title: What it shows.
        counts: Number of occurrences of each code, int64 [K].
    """
    shares = np.sort(counts / counts.sum())[::-1]
    together = math.ceil(len(shares) / _MOST_BARS)
    bars = [shares[first : first + together] for first in range(0, len(shares), together)]
    means = [float(bar.mean()) for bar in bars]
    place, ticks = _axis([0.0, *means], form="{:.2%}")
    width = (_WIDTH - _LEFT - _RIGHT) / len(bars)
    rows, marks = [], []
    for index, (bar, mean) in enumerate(zip(bars, means, strict=True)):
        first = index * together + 1
        last = first + len(bar) - 1
        rows.append([f"{first}–{last}" if last > first else f"{first}", f"{mean:.3%}"])
        left = _LEFT + index * width
        each = " each on average" if last > first else ""
        marks.append(
            {
                "left": left,
                "width": width,
                "x": left + width / 2,
                "ys": [place(mean)],
                "tip": f"codes {rows[-1][0]} by use: {rows[-1][1]} of all codes{each}",
            }
        )
    return Chart(
        title=title,
        ticks=ticks,
        labels=[(_LEFT + 24, "most used"), (_WIDTH - _RIGHT - 24, "least used")],
        names=["share of all codes"],
        lines=[],
        marks=marks,
        rows=[["codes by use", "share of all codes"], *rows],
        bars=True,
        even=place(1 / len(shares)),
    )


def _axis(
    values: Sequence[float], form: str = "{:.6g}"
) -> tuple[Callable[[float], float], list[tuple[float, str]]]:
    """Returns the function from a value to its height in a chart, and the ticks."""
    finite = [value for value in values if math.isfinite(value)]
    ends = (min(finite, default=0.0), max(finite, default=1.0))
    found = MaxNLocator(4).tick_values(*ends) if ends[0] < ends[1] else [ends[0], ends[0] + 1]
    low, high = float(found[0]), float(found[-1])

    def place(value: float) -> float:
        share = (min(max(value, low), high) - low) / (high - low) if math.isfinite(value) else 1.0
        return round(_HEIGHT - _BOTTOM - share * (_HEIGHT - _BOTTOM - _TOP), 1)

    return place, [(place(value), form.format(value)) for value in map(float, found)]
