"""The gradient audit: which losses train which parts, and the effect of the estimator."""

import dataclasses
from collections.abc import Callable, Iterable

import keras
import numpy as np
from keras import ops

from vqbeam.configs import Config, VqbeamError
from vqbeam.vqvae.building import build_model
from vqbeam.vqvae.fitting.optimizers import build_optimizer
from vqbeam.vqvae.model import VQVAE
from vqbeam.vqvae.quantizers.vector import VectorQuantizer


@dataclasses.dataclass(frozen=True)
class Audit:
    """The result of `audit`.

    Attributes:
        estimator: Name of the gradient estimator; None if the quantizer has none (fsq, lfq).
        moved_by: How the codebook is trained: "gradient", "moving average" or "nothing".
        norms: L2 norm of the gradient by loss and part; exactly 0 if there is no path. The part
            "codebook" is present only if it is trained by gradient.
    """

    estimator: str | None
    moved_by: str
    norms: dict[str, dict[str, float]]


def audit(model: VQVAE, images: np.ndarray) -> Audit:
    """Returns the gradient norms of a model on a batch by loss and part; see `Audit`.

    Args:
        model: A built model.
        images: float32 [B, H, W, C] in [−1, 1].
    """
    found = loss_gradients(model, images)
    return Audit(
        estimator=estimator_of(model),
        moved_by=_moved_by(model),
        norms={loss: {part: _norm(g) for part, g in at.items()} for loss, at in found.items()},
    )


def estimator_of(model: VQVAE) -> str | None:
    """Returns the name of a model's gradient estimator, or None if its quantizer has none."""
    books = codebooks(model)
    return books[0].estimator if books else None


def set_estimator(model: VQVAE, name: str) -> None:
    """Sets the gradient estimator of a model, before it is traced. "none" is for audits only.

    Raises:
        VqbeamError: The model's quantizer has no gradient estimator.
    """
    if not codebooks(model):
        raise VqbeamError(
            "this quantizer rounds, and has no gradient estimator to leave out; choose one with a "
            "codebook, such as --vqvae.quantizer vector"
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
    """Trains a new model and returns its reconstruction error at each step.

    Args:
        config: Config of the model, its optimizer and its seed.
        batches: At least `steps` + 1 batches, float32 [B, H, W, C] in [−1, 1].
        steps: Number of training steps.
        estimator: A name from `ESTIMATORS`.
        data_variance: Variance of the training pixels, scaled to [−1, 1].
        on_step: Called after each step and after the last measurement.

    Returns:
        `steps` + 1 errors in units of the variance; error t is measured on batch t after t steps,
        before training on that batch.

    Raises:
        VqbeamError: The model's quantizer has no gradient estimator.
    """
    model = build_model(config, data_variance=data_variance)
    set_estimator(model, estimator)
    model.compile(build_optimizer(config.vqvae))
    errors = []
    for step, images in zip(range(steps + 1), batches, strict=False):
        if step == 0:
            model.initialize_codebook(images, config.vqvae.codebook_init, config.seed)
        model.reset_metrics()
        work = model.train_on_batch if step < steps else model.test_on_batch
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


# Attribute names of the layers in each part; a model need not have all of them.
_LAYERS = {
    "encoder": ("encoder", "top_encoder", "bottom_projection"),
    "predictions": ("top_quantizer", "quantizer"),
    "codebook": ("top_quantizer", "quantizer"),
    "decoder": ("top_decoder", "decoder"),
}


def losses_of(model: VQVAE, result: dict, images) -> dict:
    """Returns the scalar loss terms by name for `result`, the output of `model(images)`."""
    error = ops.mean(ops.square(images - result["reconstruction"]))
    return {"reconstruction": error / model.data_variance, **result["losses"]}


def loss_gradients(model: VQVAE, images, losses: Callable = losses_of) -> dict:
    """Returns, by loss and part, the list of gradients for the part's trainable variables.

    Gradients are tensors. On TensorFlow, a gradient is None if there is no path, and IndexedSlices
    if it has only some rows.

    Args:
        model: A built model.
        images: float32 [B, H, W, C] in [−1, 1].
        losses: Function with the signature of `losses_of`.
    """
    parts = {part: variables for part in _LAYERS if (variables := part_variables(model, part))}
    if keras.backend.backend() == "jax":
        return _gradients_of_jax(model, images, losses, parts)
    return _gradients_of_tensorflow(model, images, losses, parts)


def part_variables(model: VQVAE, part: str) -> list[keras.Variable]:
    """Returns the trainable variables of a part.

    Args:
        model: A built model.
        part: "encoder", "predictions" (of a predictive quantizer), "codebook" or "decoder".
    """
    layers = [getattr(model, name) for name in _LAYERS[part] if hasattr(model, name)]
    if part == "predictions":
        layers = [p for quantizer in layers for p in getattr(quantizer, "predictions", [])]
    elif codebooks(model) and part == "codebook":
        layers = codebooks(model)
    return [variable for layer in layers for variable in layer.trainable_variables]


def codebooks(model: VQVAE) -> list[VectorQuantizer]:
    """Returns the quantizers that have a codebook, one per level of the model's codes."""
    outer = [getattr(model, name) for name in _LAYERS["codebook"] if hasattr(model, name)]
    inner = [q for quantizer in outer for q in getattr(quantizer, "quantizers", [quantizer])]
    return [quantizer for quantizer in inner if isinstance(quantizer, VectorQuantizer)]


def _gradients_of_tensorflow(model, images, losses, parts):
    import tensorflow as tf

    with tf.GradientTape(persistent=True) as tape:
        found = losses(model, model(images), images)
    sources = {part: [v.value for v in variables] for part, variables in parts.items()}
    return {name: tape.gradient(loss, sources) for name, loss in found.items()}


def _gradients_of_jax(model, images, losses, parts):
    import jax

    fixed = [variable.value for variable in model.non_trainable_variables]

    def of_weights(weights):
        result, _ = model.stateless_call(weights, fixed, images)
        return losses(model, result, images)

    found, pull_back = jax.vjp(of_weights, [v.value for v in model.trainable_variables])
    gradients = {}
    for name in sorted(found, key=list(model.trackers).index):  # JAX sorts keys alphabetically
        # The vector-Jacobian product with 1 for this loss and 0 for all others.
        (of_all,) = pull_back({other: ops.cast(other == name, "float32") for other in found})
        at = dict(zip(map(id, model.trainable_variables), of_all, strict=True))
        gradients[name] = {part: [at[id(v)] for v in vs] for part, vs in parts.items()}
    return gradients
