"""The command that shows which losses reach which parameters, on real images."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import LogLocator, NullFormatter
from PIL import Image

from vqbeam.configs import Config, VqbeamError
from vqbeam.pipelines.paths import with_runner
from vqbeam.pipelines.sources import Source, Unit, open_source
from vqbeam.pipelines.sources.images import ImageError
from vqbeam.vqvae.building import build_model
from vqbeam.vqvae.figures import save_png
from vqbeam.vqvae.fitting.fit import set_seed
from vqbeam.vqvae.fitting.progress import ProgressBar
from vqbeam.vqvae.gradients import (
    Audit,
    audit,
    estimator_of,
    set_estimator,
    training_errors,
)
from vqbeam.vqvae.model import VQVAE
from vqbeam.vqvae.storage.records import damaged_records
from vqbeam.vqvae.storage.run_folder import RunFolder
from vqbeam.vqvae.training import load_vqvae, scale_batch, training_images

_PARTS = ("encoder", "predictions", "codebook", "decoder")


class _Subject(NamedTuple):
    """A model and the batches that it is trained on.

    Attributes:
        title: The user's name for it.
        config: The config of the model.
        model: The trained model of a run, or an untrained one of a preset.
        batches: Function that returns endless batches, float32 [B, H, W, C] in [−1, 1].
    """

    title: str
    config: Config
    model: VQVAE
    batches: Callable[[], Iterator[np.ndarray]]


def gradients(
    *, config: Config | None, run_dir: str | None, output: str, straight_through: bool, steps: int
) -> None:
    """Prints and plots the gradient of each loss at each part of a model.

    Args:
        config: The config of an untrained model, or None for a run.
        run_dir: The folder of a trained run, or None for a config.
        output: The .png file to write.
        straight_through: False to train the model with and without its gradient estimator, and
            compare both.
        steps: Training steps of each of these two models.

    Raises:
        VqbeamError: The run lacks a stage, the source cannot be read, or there is no estimator to
            leave out.
    """
    path = epath.Path(output).expanduser()
    with _readable(run_dir):
        subject = _of_preset(config) if run_dir is None else _of_run(RunFolder(run_dir))
        images = next(subject.batches())
        audits = [audit(subject.model, images)]
        curves = {}
        if not straight_through:
            own = estimator_of(subject.model)
            set_estimator(subject.model, "none")
            audits.append(audit(subject.model, images))
            curves = _trained(subject, [own, "none"], steps)
    print(f"{subject.title}: L2 norms of the gradients on {len(images)} training images")
    for line in audit_lines(audits, curves):
        print(line)
    save_png(gradient_figure(audits, curves), path)
    print(f"figure: {path}")


def audit_lines(audits: Sequence[Audit], curves: dict[str, list[float]]) -> Iterator[str]:
    """Yields lines with the table of each audit and the results of training."""
    for found in audits:
        yield f"estimator: {_name(found)}"
        yield from _table(found)
    for name, errors in curves.items():
        yield (
            f"after {len(errors) - 1} training steps, estimator {name}: reconstruction error "
            f"{errors[-1]:.4f} of the variance"
        )


def _name(found: Audit) -> str:
    return found.estimator or "that of rounding, without a codebook"


def _table(found: Audit) -> Iterator[str]:
    """Yields the lines of a table with a row for each loss."""
    known = {part for norms in found.norms.values() for part in norms}
    columns = [part for part in _PARTS if part in known or part == "codebook"]
    rows = [["", *columns]]
    for loss, norms in found.norms.items():
        rows.append([loss, *(_cell(norms.get(part), found) for part in columns)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *rest in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(rest, widths[1:], strict=True)]
        yield "  ".join(["", f"{first:<{widths[0]}}", *cells])


def _cell(norm: float | None, found: Audit) -> str:
    if norm is None:
        return "none" if found.moved_by == "nothing" else found.moved_by
    return f"{norm:.3e}" if norm else "0"


def _trained(subject: _Subject, estimators: list[str], steps: int) -> dict[str, list[float]]:
    """Returns the errors of a model trained with and without the estimator on the same batches."""
    curves, size = {}, subject.config.vqvae.batch_size
    with contextlib.closing(ProgressBar("gradients", 2 * (steps + 1) * size)) as bar:
        for estimator in estimators:
            curves[estimator] = training_errors(
                subject.config,
                subject.batches(),
                steps,
                estimator=estimator,
                data_variance=subject.model.data_variance,
                on_step=lambda: bar.update(size),
            )
    return curves


def _of_run(run: RunFolder) -> _Subject:
    config = run.load_config()
    model = load_vqvae(run)
    run.require("prepare")

    def batches():
        set_seed(config.seed)  # the order of a shuffle buffer depends on it
        return training_images(run).inputs()

    return _Subject(f"run {run.root}", config, model, batches)


def _of_preset(config: Config) -> _Subject:
    source = open_source(config.data)
    source.download(with_runner([]))
    units = [unit for unit in source.plan() if unit.shard.split == "train"]

    def batches():
        images = _endless_images(source, units)
        while True:
            batch = itertools.islice(images, config.vqvae.batch_size)
            yield scale_batch(np.stack(list(batch))).numpy()

    first = next(batches())
    # The variance of one batch, since the other images have not been read.
    model = build_model(config, data_variance=float(first.var()) or 1.0)
    model.initialize_codebook(first, config.vqvae.codebook_init, config.seed)
    return _Subject(f"preset {config.name}, before its first step", config, model, batches)


def _endless_images(source: Source, units: Sequence[Unit]) -> Iterator[np.ndarray]:
    """Yields the images of units, uint8 [H, W, C], in an endless loop; skips damaged ones."""
    while True:
        found = False
        for raw in itertools.chain.from_iterable(source.read(unit) for unit in units):
            with contextlib.suppress(ImageError):
                yield source.decode(raw)
                found = True
        if not found:
            raise VqbeamError(
                f"{source.data.source} has no training image that can be decoded; check it"
            )


def _readable(run_dir: str | None):
    """Returns a context in which damaged records of a run raise a VqbeamError."""
    if run_dir is None:
        return contextlib.nullcontext()
    return damaged_records(RunFolder(run_dir).folder("prepare"))


_COLOURS = {
    "reconstruction": "#1f5fbf",
    "codebook": "#2a8a3e",
    "commitment": "#d1495b",
    "entropy": "#8a5fb0",
}
_CLOSED = "#b5b5b5"
_BOX_WIDTH, _BOX_GAP = 2.3, 0.9
_LANE = 0.85


def gradient_figure(
    audits: Sequence[Audit], curves: Mapping[str, Sequence[float]] | None = None
) -> Image.Image:
    """Returns a figure with a diagram of each audit, and training curves below them.

    The boxes are in the order in which an image passes through them. Each loss has a line of its
    own below them, with an arrow up to each part that its gradient reaches, labelled with the norm,
    and a cross at each part that it does not reach.

    Args:
        audits: The audits, at least one.
        curves: The reconstruction errors after 0, 1, 2, ... training steps, by name.
    """
    heights = [2.2 + _LANE * len(found.norms) for found in audits] + ([3.2] if curves else [])
    figure = Figure(figsize=(9.5, sum(heights)), layout="constrained", facecolor="white")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    for place, found in zip(axes, audits, strict=False):
        draw_paths(place, found)
    if curves:
        draw_curves(axes[-1], curves)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def draw_paths(axes: Axes, audit: Audit) -> None:
    """Draws the parts of a model as boxes, and the paths of the losses to them."""
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
    axes.set_title(f"estimator: {_name(audit)}", loc="left")
    axes.set_xlim(-2.3, max(lefts.values()) + _BOX_WIDTH + 0.6)
    axes.set_ylim(-_LANE * (len(audit.norms) + 0.2), 1.2)
    axes.set_axis_off()


def draw_curves(axes: Axes, curves: Mapping[str, Sequence[float]]) -> None:
    """Draws reconstruction errors over training steps, each curve labelled with its last error."""
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
    """Returns the text of each box by part, in the order of the boxes."""
    codebook = {
        "gradient": "quantizer\nand codebook",
        "moving average": "quantizer\n(codebook by\nmoving average)",
        "nothing": "quantizer\n(no codebook)",
    }[audit.moved_by]
    texts = {"encoder": "encoder", "predictions": "predictions", "codebook": codebook}
    texts |= {"decoder": "decoder"}
    return {part: text for part, text in texts.items() if part in {*_reachable(audit), "codebook"}}


def _reachable(audit: Audit) -> set[str]:
    return {part for norms in audit.norms.values() for part in norms}


def _draw_box(axes, left, text, *, closed):
    face = "#eeeeee" if closed else "#fff7e0"
    box = FancyBboxPatch((left, 0), _BOX_WIDTH, 1, boxstyle="round,pad=0.02", fc=face, ec="black")
    axes.add_patch(box)
    axes.text(left + _BOX_WIDTH / 2, 0.5, text, ha="center", va="center", fontsize=9)


def _draw_path(axes, across, height, norm, colour):
    """Draws an arrow up to a box, labelled with the norm, or a crossed stub for a norm of 0."""
    if norm:
        arrow = {"arrowstyle": "-|>", "color": colour, "lw": 1.6, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", (across, -0.05), (across, height), arrowprops=arrow)
        # Arrows of the losses below may pass here, so the number is drawn in front of them.
        style = {"fontsize": 8, "zorder": 5, "bbox": {"fc": "white", "ec": "none", "pad": 0.5}}
        axes.text(across + 0.08, height + 0.2, f"{norm:.2g}", color=colour, **style)
        return
    top = height + 0.3
    axes.plot([across] * 2, [height, top], color=_CLOSED, lw=1.6)
    axes.plot([across], [top], marker="x", color=_CLOSED, ms=8, mew=2)
    axes.text(across + 0.12, height + 0.2, "0", color="#808080", fontsize=8)
