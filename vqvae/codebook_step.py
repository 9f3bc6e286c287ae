"""Which rows of the codebook a training step moves."""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator

import keras
import numpy as np
from keras import ops

from vqbeam.vqvae.gradient_flow import codebooks, loss_gradients, losses_of, part_variables
from vqbeam.vqvae.model import VQVAE
from vqbeam.vqvae.quantizers.simvq import LinearVectorQuantizer


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
        "linear": isinstance(books[0], LinearVectorQuantizer),
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
        linear = isinstance(quantizer, LinearVectorQuantizer)
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
