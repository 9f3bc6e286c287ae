"""The prior of stage 2: a causal transformer over the codes of an image.

In any layout, the codes are one sequence of T tokens. The inputs of the transformer are
`[class, code 0, ..., code T-2]`, and it predicts `code 0, ..., code T-1`: the output at position p
predicts code p.
"""

import dataclasses
from typing import Any

import keras
import keras_nlp
import numpy as np
from keras import ops

from vqbeam.configs import VqbeamError
from vqbeam.prior.block import Block
from vqbeam.vqvae.fitting.program import AccumulatingModel
from vqbeam.vqvae.layout import CodeLayout


@keras.saving.register_keras_serializable("vqbeam")
class CodePrior(AccumulatingModel):
    """An autoregressive transformer over an image's codes, conditioned on its label.

    Compile it with an optimizer only: the model has its own loss, the mean cross-entropy in nats
    per code. The head is initialized to zero, so an untrained model has a loss of exactly log K.

    Example:
        >>> layout = CodeLayout(512, grids=((8, 8),))
        >>> prior = CodePrior(layout, num_labels=10, layers=6, width=256, heads=8)
        >>> prior.compile(keras.optimizers.AdamW(1e-3))
        >>> prior.fit(dataset)  # of {"codes": [B, 8, 8], "labels": [B]}

    An image has one class, or any number of attributes. The first token is the embedding of the
    class, or the sum of a shared embedding and one for each attribute that is on.

    Args:
        layout: The `CodeLayout` of an image's codes.
        num_labels: Number of classes or attributes; 0 for an unconditional model.
        layers: Number of transformer blocks.
        width: Width of the residual stream.
        heads: Number of attention heads; `width / heads` must be a multiple of 4.
        kv_heads: Number of key/value heads, a divisor of `heads`; 0 for the same number as `heads`.
        dropout: Dropout rate in the blocks.
        conditioning: "classes" or "attributes".
        qk_norm: Whether queries and keys are normalized; see `Block`.
        zero_init: Whether untrained blocks return their input; see `Block`.

    Attributes:
        null_label: Label for unconditional sampling: `num_labels` for "no class", or −1 in place
            of each attribute for "no attributes given".
    """

    def __init__(
        self,
        layout: CodeLayout,
        num_labels: int,
        layers: int,
        width: int,
        heads: int,
        kv_heads: int = 0,
        dropout: float = 0.0,
        conditioning: str = "classes",
        qk_norm: bool = False,
        zero_init: bool = False,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.conditioning = conditioning
        self.layout = layout = CodeLayout.of(layout)
        self.num_labels, self.width, self.heads, self.dropout = num_labels, width, heads, dropout
        self.kv_heads = kv_heads or heads
        self.qk_norm, self.zero_init = qk_norm, zero_init
        policy = self.dtype_policy
        # One more row for the null label; with attributes, another that all images share.
        rows = num_labels + (2 if conditioning == "attributes" else 1)
        self.label_embedding = keras.layers.Embedding(rows, width, dtype=policy)
        # A row for each code of each level: equal codes of different levels are unrelated.
        self.code_embedding = keras.layers.Embedding(
            layout.levels * layout.num_codes, width, dtype=policy
        )
        # Rotary positions are relative, but image content also depends on the absolute position.
        # Each input predicts the next code, so one table encodes the positions and levels of both.
        self.position_embedding = keras_nlp.layers.PositionEmbedding(
            layout.length, initializer="uniform", dtype=policy
        )
        self.blocks = [
            Block(layout, width, heads, kv_heads, dropout, qk_norm, zero_init, dtype=policy)
            for _ in range(layers)
        ]
        self.output_norm = keras.layers.RMSNormalization(dtype=policy)
        # Models in bfloat16 are copies for sampling and scoring, which need float32 logits.
        # Training in mixed_bfloat16 uses the faster product.
        self.head = LevelHead(layout, dtype="float32" if policy.name == "bfloat16" else policy)
        self.cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        self._build_layers()

    def _build_layers(self):
        # Built in the constructor, so that a newly created model can load weights.
        sequence = (None, self.layout.length, self.width)
        self.label_embedding.build((None,))
        self.code_embedding.build((None, None))
        for layer in (self.position_embedding, *self.blocks, self.output_norm, self.head):
            layer.build(sequence)
        self.built = True

    @property
    def null_label(self) -> int:
        """Label for "no class", or the value of every attribute for "no attributes given"."""
        return -1 if self.conditioning == "attributes" else self.num_labels

    def with_dtype(self, dtype: str) -> "CodePrior":
        """Returns a copy of the model and its weights with another Keras dtype policy."""
        copy = CodePrior.from_config(self.get_config() | {"dtype": dtype})
        copy.set_weights(self.get_weights())
        return copy

    def call(self, inputs: dict[str, Any], training: bool = False):
        """Returns the logits of all codes, each given the label and the previous codes.

        Args:
            inputs: Dictionary with `codes`, integers [B, *layout.shape] in [0, K), and `labels`:
                classes, integers [B] in [0, `null_label`], where −1 also means `null_label`; or
                attributes [B, A] of zeros and ones, with rows of −1 if unknown.
            training: Whether to apply dropout.

        Returns:
            A float32 tensor [B, T, K].
        """
        codes = ops.reshape(inputs["codes"], (-1, self.layout.length))
        x = ops.concatenate(
            [self.embed_labels(inputs["labels"]), self.embed_codes(codes[:, :-1])], axis=1
        )
        x = x + self.position_embedding(x)
        for block in self.blocks:
            x = block(x, training=training)
        return self._logits(x)

    def step(self, x, caches: list, position):
        """Returns the logits at one position, using cached keys and values of earlier positions.

        Args:
            x: Tensor [B, 1, width]: `embed_labels` at position 0, then `embed_codes` of the
                previous code.
            caches: From `empty_caches` or the previous step.
            position: int32 scalar, the position to predict.

        Returns:
            Logits, a float32 tensor [B, K], and the updated caches.
        """
        x = x + self.position_embedding(x, start_index=position)
        updated = []
        for block, (keys, values) in zip(self.blocks, caches, strict=True):
            x, keys, values = block.step(x, keys, values, position)
            updated.append((keys, values))
        return self._logits(x, position)[:, 0], updated

    def empty_caches(self, batch_size: int, length: int) -> list:
        """Returns zero-initialized caches for each block; see `Block.step`."""
        return [block.empty_caches(batch_size, length) for block in self.blocks]

    def embed_labels(self, labels):
        """Returns the class tokens [B, 1, width] for classes [B] or attributes [B, A]."""
        if self.conditioning == "attributes":
            return self._embed_attributes(labels)
        labels = ops.where(labels < 0, self.null_label, labels)
        return self.label_embedding(labels[:, None])

    def _embed_attributes(self, attributes):
        unknown = ops.any(attributes < 0, axis=1, keepdims=True)
        on = (attributes > 0) & ~unknown
        rows = ops.concatenate([on, unknown, ~unknown], axis=1)
        table = ops.cast(self.label_embedding.embeddings, self.compute_dtype)
        return ops.matmul(ops.cast(rows, self.compute_dtype), table)[:, None]

    def embed_codes(self, codes, first=0):
        """Returns the embeddings [B, N, width] of consecutive codes [B, N].

        Args:
            codes: Integers in [0, K). Each level has its own embeddings.
            first: int32 scalar, position of the first code in the sequence.
        """
        rows = self.layout.level * self.layout.num_codes
        return self.code_embedding(ops.add(codes, ops.slice(rows, (first,), (codes.shape[1],))))

    def _logits(self, x, position=None):
        return ops.cast(self.head(self.output_norm(x), position=position), "float32")

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """Returns the mean cross-entropy in nats per code."""
        return self.cross_entropy(ops.reshape(x["codes"], (-1, self.layout.length)), y_pred)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        own = {
            "layout": dataclasses.asdict(self.layout),
            "num_labels": self.num_labels,
            "layers": len(self.blocks),
            "width": self.width,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "dropout": self.dropout,
            "conditioning": self.conditioning,
            "qk_norm": self.qk_norm,
            "zero_init": self.zero_init,
        }
        return super().get_config() | own


@keras.saving.register_keras_serializable("vqbeam")
class LevelHead(keras.layers.Layer):
    """A linear output layer with a separate matrix [width, K] for each level of codes.

    The matrices are initialized to zero, so an untrained model has a loss of exactly log K.

    Args:
        layout: The `CodeLayout` of an image's codes.
    """

    def __init__(self, layout: CodeLayout, **kwargs: Any):
        super().__init__(**kwargs)
        self.layout = CodeLayout.of(layout)

    def build(self, input_shape: tuple[int | None, ...]):
        """Creates the weights for inputs [B, N, width]."""
        shape = (self.layout.levels, input_shape[-1], self.layout.num_codes)
        self.kernel = self.add_weight(shape=shape, initializer="zeros", name="kernel")

    def call(self, x, position=None):
        """Returns the logits of a complete sequence or of one position.

        Args:
            x: Tensor [B, T, width], or [B, 1, width] for one position.
            position: int32 scalar in [0, T), the position of x; None for a complete sequence.

        Returns:
            A tensor [B, T, K], or [B, 1, K] for one position.
        """
        if self.layout.levels == 1:
            return ops.matmul(x, ops.unstack(self.kernel.value)[0])
        if position is not None:
            return self._at(x, position)
        return self._by_depth(x) if self.layout.depth > 1 else self._by_grid(x)

    def _at(self, x, position):
        level = ops.take(self.layout.level, position)
        return ops.matmul(x, ops.take(self.kernel, level, axis=0))

    def _by_depth(self, x):
        layout, (_, width, num_codes) = self.layout, self.kernel.shape
        x = ops.reshape(x, (-1, layout.length // layout.depth, layout.depth, width))
        logits = ops.einsum("bpdw,dwk->bpdk", x, self.kernel)
        return ops.reshape(logits, (-1, layout.length, num_codes))

    def _by_grid(self, x):
        bounds = np.flatnonzero(np.diff(self.layout.level)) + 1
        parts = ops.split(x, bounds.tolist(), axis=1)
        matrices = ops.unstack(self.kernel.value)
        return ops.concatenate(
            [ops.matmul(part, matrix) for part, matrix in zip(parts, matrices, strict=True)],
            axis=1,
        )

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return super().get_config() | {"layout": dataclasses.asdict(self.layout)}


def check_labels(model: CodePrior, labels: np.ndarray) -> None:
    """Raises a VqbeamError if classes [N] or attributes [N, A] are not valid for the prior."""
    count = model.num_labels
    if model.conditioning == "attributes":
        if labels.shape[1:] != (count,) or not np.isin(labels, (-1, 0, 1)).all():
            raise VqbeamError(
                f"labels of shape {labels.shape} do not match the prior's {count} "
                "attributes; give each image a 0 or 1 for each of them, or −1 for none"
            )
        return
    wrong = labels[(labels < -1) | (labels > model.null_label)]
    if wrong.size:
        raise VqbeamError(
            f"label {wrong[0]} is out of range; the prior knows labels 0 to {count - 1}"
            if count
            else f"label {wrong[0]} is given, but the prior was trained without classes; use -1"
        )
