"""Where the gradients of a preset or of a run go, on real images."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from vqbeam.configs import Config, VqbeamError
from vqbeam.pipelines.cli.beam_flags import with_runner
from vqbeam.pipelines.cli.verbs import VERBS
from vqbeam.pipelines.gradient_figure import gradient_figure
from vqbeam.pipelines.places import check_output
from vqbeam.pipelines.sources import Unit, decode, plan, read_unit
from vqbeam.pipelines.sources.images import ImageError
from vqbeam.pipelines.sources.tfds import prepare_source
from vqbeam.vqvae.building import build_model
from vqbeam.vqvae.codebook_step import CodebookStep
from vqbeam.vqvae.figures import save_png
from vqbeam.vqvae.fitting.fit import set_seed
from vqbeam.vqvae.fitting.progress import progress_bar
from vqbeam.vqvae.gradients import Audit, audit, estimator_of, set_estimator, training_errors
from vqbeam.vqvae.model import VQVAE
from vqbeam.vqvae.storage.records import damaged_records
from vqbeam.vqvae.storage.run_folder import RunFolder
from vqbeam.vqvae.training import load_vqvae, scale_batch, training_images

_PARTS = ("encoder", "predictions", "codebook", "decoder", "discriminator")


class _Subject(NamedTuple):
    """What is audited: a model, and the batches that it is trained on.

    Attributes:
        title: What the user calls it.
        config: Of the model.
        model: Trained where it is a run's, else as it is before the first step.
        batches: Returns endless batches in [−1, 1], float32 [B, H, W, C], from the first one on.
    """

    title: str
    config: Config
    model: VQVAE
    batches: Callable[[], Iterator[np.ndarray]]


def gradients(
    *, config: Config | None, run_dir: str | None, output: str, straight_through: bool, steps: int
) -> None:
    """Prints where the gradient of each loss goes, and draws it.

    Args:
        config: Of a fresh model, audited on images from their source; or None.
        run_dir: The folder of a trained run; or None.
        output: The .png file to write.
        straight_through: False to set the model without an estimator beside it, and to train both.
        steps: Training steps of each, where both are trained.

    Raises:
        VqbeamError: `output` does not end in .png, the run lacks a stage, the source cannot be
            read, or there is no estimator to leave out.
    """
    check_output(output, VERBS["gradients"].outputs)
    path = epath.Path(output).expanduser()
    with _readable(run_dir):
        subject = _of_preset(config) if run_dir is None else _of_run(RunFolder(run_dir))
        images, earlier = itertools.islice(subject.batches(), 2)
        audits = [audit(subject.model, images, earlier)]
        curves = {}
        if not straight_through:
            own = estimator_of(subject.model)
            set_estimator(subject.model, "none")
            audits.append(audit(subject.model, images, earlier))
            curves = _trained(subject, [own, "none"], steps)
    print(f"{subject.title}: L2 norms of the gradients on {len(images)} training images")
    for line in audit_lines(audits, curves):
        print(line)
    save_png(gradient_figure(audits, curves), path)
    print(f"drawn in {path}")


def audit_lines(audits: Sequence[Audit], curves: dict[str, list[float]]) -> Iterator[str]:
    """Yields the table of each audit, how a step moves the codebook, and how training ended."""
    for found in audits:
        yield f"estimator: {found.estimator or 'that of rounding'}"
        yield from _table(found)
    yield from step_lines(audits[0].step)
    for name, errors in curves.items():
        yield (
            f"after {len(errors) - 1} training steps, estimator {name}: reconstruction error "
            f"{errors[-1]:.4f} of the variance"
        )


def step_lines(step: CodebookStep | None) -> Iterator[str]:
    """Yields which rows of the codebook a training step moves."""
    if step is None:
        yield "there is no codebook: the codes are numbers that are rounded"
        return
    of = f"of {step.rows:,} rows"
    if step.linear:
        yield f"a step of the codebook touches {step.moved:,} {of}: one matrix makes them all"
        yield f"  ({step.gradient} gradient; {step.chosen:,} were chosen in the batch)"
        return
    way = f"{step.gradient} gradient" if step.gradient else "moving averages, no gradient"
    who = "those chosen in the batch"
    if step.moved < step.chosen:
        still = step.chosen - step.moved
        who = f"of {step.chosen:,} chosen, {still:,} are at the mean of their vectors already"
    yield f"a step of the codebook touches {step.moved:,} {of}: {who} ({way})"
    if step.adam is not None:
        yield (
            f"a step of Adam after one on another batch touches {step.adam:,} {of}: momentum also "
            f"moves the {step.momentum:,} that only that batch had chosen"
        )
    if step.restarted:
        yield f"restarts put {step.restarted:,} {of} that nothing chose onto vectors of the batch"


def _table(found: Audit) -> Iterator[str]:
    """Yields a line for each loss; a column is as wide as what stands in it."""
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
    """Trains a fresh model with each estimator, both on the same batches."""
    curves, size = {}, subject.config.vqvae.batch_size
    with contextlib.closing(progress_bar("gradients", 2 * (steps + 1) * size)) as bar:
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
        # As in training: the order of the images depends on TensorFlow's own seed as well.
        set_seed(config.seed)
        return training_images(run).map(scale_batch).as_numpy_iterator()

    return _Subject(f"run {run.root}", config, model, batches)


def _of_preset(config: Config) -> _Subject:
    prepare_source(config.data, with_runner([]))
    units = [unit for unit in plan(config.data) if unit.shard.split == "train"]

    def batches():
        images = _endless_images(config, units)
        while True:
            batch = itertools.islice(images, config.vqvae.batch_size)
            yield scale_batch(np.stack(list(batch))).numpy()

    first = next(batches())
    # The variance of one batch stands for that of all images, which no one has read.
    model = build_model(config, data_variance=float(first.var()) or 1.0)
    model.initialize_codebook(first, config.vqvae.codebook_init, config.seed)
    return _Subject(f"preset {config.name}, before its first step", config, model, batches)


def _endless_images(config: Config, units: Sequence[Unit]) -> Iterator[np.ndarray]:
    """Yields the images of units over and over, uint8 [H, W, C]; what is damaged is left out."""
    while True:
        found = False
        for raw in itertools.chain.from_iterable(read_unit(config.data, unit) for unit in units):
            with contextlib.suppress(ImageError):
                yield decode(raw, config.data)
                found = True
        if not found:
            raise VqbeamError(
                f"{config.data.source} has no training image that can be decoded; check it"
            )


def _readable(run_dir: str | None):
    """Returns a context in which damaged records of a run end in one line."""
    if run_dir is None:
        return contextlib.nullcontext()
    return damaged_records(RunFolder(run_dir).folder("prepare"))
