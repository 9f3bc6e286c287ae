"""Transformer and training of stage 2."""

import dataclasses

from vqbeam.configs.errors import VqbeamError
from vqbeam.configs.fields import (
    Section,
    check_epochs,
    dtype_field,
    field,
    schedule_field,
    weight_ema_field,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PriorConfig(Section):
    """Transformer and training of stage 2."""

    prefix = "prior"

    layers: int = field("transformer blocks", 6, minimum=1)
    width: int = field("width of the residual stream", 256, minimum=4)
    heads: int = field("attention heads", 8, minimum=1)
    kv_heads: int = field(
        "heads of keys and values, which heads share: fewer make sampling lighter; "
        "0 for as many as heads",
        0,
        minimum=0,
    )
    dropout: float = field("dropout rate in the blocks", 0.1, minimum=0, maximum=0.9)
    label_dropout: float = field(
        "share of examples trained without their label, for guidance", 0.1, minimum=0, maximum=0.9
    )
    batch_size: int = field("code grids in a training batch, over all devices", 64, minimum=1)
    grad_accumulation: int = field(
        "parts in which a batch is computed, one after the other, to save memory; "
        "a step is a whole batch",
        1,
        minimum=1,
    )
    steps: int = field("training steps in all", 10_000, minimum=1)
    steps_per_epoch: int = field("steps between checkpoints", 500, minimum=1)
    early_stopping: int = field(
        "end after this many epochs without a better validation loss, and keep the best weights; "
        "0 for neither",
        0,
        minimum=0,
    )
    learning_rate: float = field("peak learning rate of AdamW", 1e-3, minimum=0)
    schedule: str = schedule_field()
    warmup_steps: int = field("steps of linear warm-up", 200, minimum=0)
    weight_decay: float = field("decoupled weight decay", 0.05, minimum=0)
    clip_norm: float = field("clip the gradient to this norm; 0 for never", 1.0, minimum=0)
    weight_ema: float = weight_ema_field()
    pictures: int = field(
        "images drawn for TensorBoard after each epoch; 0 for none", 16, minimum=0, maximum=16
    )
    dtype: str = dtype_field("transformer")

    def __post_init__(self):
        super().__post_init__()
        check_epochs(self.prefix, self.steps, self.steps_per_epoch)
        if self.width % self.heads or (self.width // self.heads) % 4:
            raise VqbeamError(
                f"prior.width is {self.width} and prior.heads is {self.heads}; the width of a "
                "head must be a whole multiple of 4, for 2-D rotary positions"
            )
        if self.kv_heads and self.heads % self.kv_heads:
            raise VqbeamError(
                f"prior.heads is {self.heads}, which prior.kv_heads ({self.kv_heads}) does not "
                "divide; 0 takes as many"
            )
        if self.batch_size % self.grad_accumulation:
            raise VqbeamError(
                f"prior.batch_size is {self.batch_size}, which prior.grad_accumulation "
                f"({self.grad_accumulation}) does not divide"
            )
