"""The gradient of each loss at each part of a model, alike on TensorFlow and JAX."""

from collections.abc import Callable

import keras
from keras import ops

from vqbeam.vqvae.model import VQVAE
from vqbeam.vqvae.quantizers.vector import VectorQuantizer

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
