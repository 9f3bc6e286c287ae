"""The gradient audit: what each loss moves, and what the estimator is good for."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator

import keras
import numpy as np
from keras import ops

from vqbeam.configs import Config, VqbeamError
from vqbeam.vqvae.building import build_model
from vqbeam.vqvae.fitting.optimizers import build_optimizer
from vqbeam.vqvae.model import VQVAE
from vqbeam.vqvae.quantizers.simvq import SimVQ
from vqbeam.vqvae.quantizers.vector import VectorQuantizer


@dataclasses.dataclass(frozen=True)
class CodebookStep:
    """How many rows of the codebook a training step moves, over all levels.

    Attributes:
        rows: Rows in all.
        chosen: Rows that some vector of the batch has as its nearest.
        moved: Rows that the step moved: by plain SGD, or by the moving averages.
        restarted: Rows that were put onto vectors of the batch, since hardly any vector chose them.
        gradient: "sparse" where it holds the chosen rows alone, "dense" where it holds all rows,
            None where no gradient moves the codebook.
        adam: Rows that a step of Adam moved, after one on another batch; None without gradient.
        momentum: Those of them that only the other batch had chosen.
        linear: Whether the rows are a learned map of fixed ones (SimVQ).
    """

    rows: int
    chosen: int
    moved: int
    restarted: int
    gradient: str | None = None
    adam: int | None = None
    momentum: int | None = None
    linear: bool = False


def codebook_step(model: VQVAE, images, earlier) -> CodebookStep | None:
    """Returns how a training step on `images` moves the codebook, or None where there is none.

    Args:
        model: Built; its weights are restored.
        images: float32 in [−1, 1], [B, H, W, C].
        earlier: The batch of the step before it, where the optimizer is Adam.
    """
    books = codebooks(model)
    if not books:
        return None
    chosen = _chosen(model, images)
    with _restored(books):
        # The rate is large, so that no step is lost in rounding.
        moved, restarted = _step(model, images, keras.optimizers.SGD(1.0))
    by_gradient = bool(part_variables(model, "codebook"))
    if not by_gradient:
        # A moving average leaves what is not chosen: what moved all the same, a restart has moved.
        moved, restarted = moved & chosen, moved & ~chosen
    return CodebookStep(
        rows=chosen.size,
        chosen=int(chosen.sum()),
        moved=int(moved.sum()),
        restarted=int(restarted.sum()),
        **(_of_gradient(model, images, earlier) if by_gradient else {}),
    )


def _of_gradient(model, images, earlier) -> dict:
    """Returns the attributes of a `CodebookStep` that are there where a gradient is."""
    books = codebooks(model)
    with _restored(books):
        adam = keras.optimizers.Adam()
        before = _chosen(model, earlier)
        _step(model, earlier, adam)
        remembered = before & ~_chosen(model, images)
        moved, _ = _step(model, images, adam)
    return {
        "gradient": _kind(_codebook_gradients(model, images)),
        "adam": int(moved.sum()),
        "momentum": int((moved & remembered).sum()),
        "linear": isinstance(books[0], SimVQ),
    }


def _codebook_gradients(model, images):
    def total(*arguments):
        return {"loss": sum(losses_of(*arguments).values())}

    return loss_gradients(model, images, total)["loss"]["codebook"]


def _kind(gradients) -> str:
    # Only tf.IndexedSlices have indices: JAX holds the rows that are not chosen as zeros.
    return "sparse" if all(hasattr(gradient, "indices") for gradient in gradients) else "dense"


def _chosen(model, images) -> np.ndarray:
    """Returns which codes a batch chooses, bool [levels, K]."""
    layout = model.layout
    codes = ops.convert_to_numpy(model(images)["codes"]).reshape(-1, layout.length)
    of_levels = [codes[:, layout.level == level] for level in range(layout.levels)]
    return np.stack([np.isin(np.arange(layout.num_codes), of_level) for of_level in of_levels])


def _step(model, images, optimizer) -> tuple[np.ndarray, np.ndarray]:
    """Moves the codebook as a training step does, and no other weight.

    Returns:
        Which rows changed, and which of them a restart moved, as far as that is apart from the
        codebook; both bool [levels, K].
    """
    before = _places(model)
    variables = part_variables(model, "codebook")
    gradients = _codebook_gradients(model, images) if variables else []
    model.quantize_images(images, training=True)
    if variables:
        optimizer.apply(gradients, variables)
    return tuple((b != a).any(axis=-1) for b, a in zip(before, _places(model), strict=True))


def _places(model) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows of the codebook, and what restarts have added; both [levels, K, D]."""
    rows, added = [], []
    for quantizer in codebooks(model):
        linear = isinstance(quantizer, SimVQ)
        place = ops.convert_to_numpy(quantizer.vectors() if linear else quantizer.codebook)
        moves = getattr(quantizer, "moves", None)
        rows.append(place.copy())
        added.append(np.zeros_like(place) if moves is None else ops.convert_to_numpy(moves).copy())
    return np.stack(rows), np.stack(added)


@contextlib.contextmanager
def _restored(layers: Iterable[keras.Layer]) -> Iterator[None]:
    """Gives the variables of layers back their values at the end of the block."""
    variables = [variable for layer in layers for variable in layer.variables]
    values = [ops.convert_to_numpy(variable).copy() for variable in variables]
    try:
        yield
    finally:
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)


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


# The layers of a model that belong to each part; a model has those that its kind has.
_LAYERS = {
    "encoder": ("encoder", "top_encoder", "bottom_projection"),
    "predictions": ("top_quantizer", "quantizer"),
    "codebook": ("top_quantizer", "quantizer"),
    "decoder": ("top_decoder", "decoder"),
    "discriminator": ("discriminator",),
}


def losses_of(model: VQVAE, result: dict, images) -> dict:
    """Returns each part of the loss, a scalar by name, of what `model(images)` returned."""
    error = ops.mean(ops.square(images - result["reconstruction"]))
    return {"reconstruction": error / model.data_variance, **result["losses"]}


def loss_gradients(model: VQVAE, images, losses: Callable = losses_of) -> dict:
    """Returns by loss and part the gradient at each trainable variable of the part.

    A gradient is a tensor; on TensorFlow it is None where there is no path, and IndexedSlices
    where it holds some rows alone.

    Args:
        model: Built.
        images: float32 in [−1, 1], [B, H, W, C].
        losses: Returns the scalars by name, as `losses_of` does.
    """
    parts = {part: variables for part in _LAYERS if (variables := part_variables(model, part))}
    if keras.backend.backend() == "jax":
        return _gradients_of_jax(model, images, losses, parts)
    return _gradients_of_tensorflow(model, images, losses, parts)


def part_variables(model: VQVAE, part: str) -> list[keras.Variable]:
    """Returns the trainable variables of a part.

    Args:
        model: Built.
        part: "encoder", "predictions" (of a predictive quantizer), "codebook", "decoder" or
            "discriminator".
    """
    layers = [getattr(model, name) for name in _LAYERS[part] if hasattr(model, name)]
    if part == "predictions":
        layers = [p for quantizer in layers for p in getattr(quantizer, "predictions", [])]
    elif codebooks(model) and part == "codebook":
        layers = codebooks(model)
    return [variable for layer in layers for variable in layer.trainable_variables]


def codebooks(model: VQVAE) -> list[VectorQuantizer]:
    """Returns the quantizers that have a codebook, one for each level of the model's codes."""
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
    for name in sorted(found, key=list(model.trackers).index):  # JAX sorts by the alphabet
        # The vector-Jacobian product with a 1 at this loss and 0 at all others.
        (of_all,) = pull_back({other: ops.cast(other == name, "float32") for other in found})
        at = dict(zip(map(id, model.trainable_variables), of_all, strict=True))
        gradients[name] = {part: [at[id(v)] for v in vs] for part, vs in parts.items()}
    return gradients
