"""The gradient audit: what each loss moves, and what the estimator is good for."""

import dataclasses
from collections.abc import Callable, Iterable

import numpy as np
from keras import ops

from vqbeam.configs import Config, VqbeamError
from vqbeam.vqvae.building import build_model
from vqbeam.vqvae.codebook_step import CodebookStep, codebook_step
from vqbeam.vqvae.fitting.optimizers import build_optimizer
from vqbeam.vqvae.gradient_flow import codebooks, loss_gradients, part_variables
from vqbeam.vqvae.model import VQVAE


@dataclasses.dataclass(frozen=True)
class Audit:
    """What `audit` found.

    Attributes:
        estimator: That of the quantizer; None where it has none (fsq, lfq).
        moved_by: What moves the codebook: "gradient", "moving average", or "nothing".
        norms: By loss and part, the L2 norm of the gradient, exactly 0 where no path is open. The
            part "codebook" is there where a gradient may move it.
        step: How a training step moves the codebook; None where there is none.
    """

    estimator: str | None
    moved_by: str
    norms: dict[str, dict[str, float]]
    step: CodebookStep | None


def audit(model: VQVAE, images: np.ndarray, earlier: np.ndarray) -> Audit:
    """Measures where the gradients of a model go on a batch; the model stays as it is.

    Args:
        model: Built; its weights are restored after each step.
        images: float32 in [−1, 1], [B, H, W, C].
        earlier: Another such batch, for what Adam's momentum remembers.
    """
    found = loss_gradients(model, images)
    return Audit(
        estimator=estimator_of(model),
        moved_by=_moved_by(model),
        norms={loss: {part: _norm(g) for part, g in at.items()} for loss, at in found.items()},
        step=codebook_step(model, images, earlier),
    )


def estimator_of(model: VQVAE) -> str | None:
    """Returns the name of a model's estimator, or None where its quantizer has none."""
    books = codebooks(model)
    return books[0].estimator if books else None


def set_estimator(model: VQVAE, name: str) -> None:
    """Sets the estimator of a model that is not yet traced; "none" is for audits alone.

    Raises:
        VqbeamError: The model's quantizer has no estimator.
    """
    if not codebooks(model):
        raise VqbeamError(
            "the quantizer of this model rounds (fsq, lfq), and has no estimator to leave out; "
            "choose a model with --vqvae.quantizer vector, predictive, residual or simvq"
        )
    for quantizer in codebooks(model):
        quantizer.estimator = name


def training_errors(
    config: Config,
    batches: Iterable[np.ndarray],
    steps: int,
    *,
    estimator: str,
    data_variance: float,
    on_step: Callable[[], None] = lambda: None,
) -> list[float]:
    """Trains a fresh model and returns its reconstruction errors.

    Args:
        config: Of the model, its optimizer and its seed.
        batches: More than `steps` batches in [−1, 1], float32 [B, H, W, C].
        steps: Training steps.
        estimator: A name from `ESTIMATORS`.
        data_variance: Variance of the training pixels on [−1, 1].
        on_step: Called after each step.

    Returns:
        `steps` + 1 errors in units of the variance: number t is that of batch t after t steps, of
        which it was none.
    """
    model = build_model(config, data_variance=data_variance)
    set_estimator(model, estimator)
    model.compile(build_optimizer(config.vqvae))
    errors = []
    for batch, images in zip(range(steps + 1), batches, strict=False):
        if batch == 0:
            model.initialize_codebook(images, config.vqvae.codebook_init, config.seed)
        model.reset_metrics()
        work = model.train_on_batch if batch < steps else model.test_on_batch
        errors.append(float(work(images, return_dict=True)["reconstruction"]))
        on_step()
    return errors


def _norm(gradients) -> float:
    arrays = [ops.convert_to_numpy(g).astype("float64") for g in gradients if g is not None]
    return float(np.sqrt(sum(np.sum(np.square(array)) for array in arrays)))


def _moved_by(model) -> str:
    if not codebooks(model):
        return "nothing"
    return "gradient" if part_variables(model, "codebook") else "moving average"
