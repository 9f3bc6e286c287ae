"""Network, quantizer and training of stage 1."""

import dataclasses
import math
import re

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
class VQVAEConfig(Section):
    """Network, quantizer and training of stage 1."""

    prefix = "vqvae"

    quantizer: str = field(
        "vector: nearest of a codebook; predictive: of what its neighbours cannot predict; "
        "residual: several codes in turn; fsq: rounded numbers; lfq: signs; simvq: a learned map "
        "of a fixed codebook",
        "vector",
        choices=("vector", "predictive", "residual", "fsq", "lfq", "simvq"),
    )
    num_codes: int = field("codebook size K, of each level", 512, minimum=2, maximum=2**20)
    code_dim: int = field("length D of a codebook vector (not fsq, lfq)", 64, minimum=1)
    depth: int = field("codes at each position (residual)", 1, minimum=1, maximum=64)
    grids: int = field(
        "1, or 2 for VQ-VAE-2: a top grid of half the sides as well", 1, minimum=1, maximum=2
    )
    fsq_levels: str = field("values of each channel, such as 8,8,8 for K = 512 (fsq)", "8,8,8")
    downsampling: int = field("image side over grid side, a power of two", 4, minimum=2)
    width: int = field("channels of the encoder and decoder", 128, minimum=4)
    residual_layers: int = field("residual blocks in each of encoder and decoder", 2, minimum=0)
    residual_width: int = field("channels inside a residual block", 32, minimum=1)
    commitment: float = field("weight β of the commitment loss (all but fsq)", 0.25, minimum=0)
    entropy: float = field(
        "weight of the entropy loss, for sure and diverse codes (all but fsq)", 0.0, minimum=0
    )
    lookup: str = field(
        "nearest by distance or by angle (vector, simvq)", "l2", choices=("l2", "cosine")
    )
    estimator: str = field(
        "how the gradient passes the quantizer (not fsq, lfq)",
        "straight_through",
        choices=("straight_through", "rotation", "diveq"),
    )
    codebook_update: str = field(
        "what moves the codebook: moving averages or the codebook loss "
        "(vector, predictive, residual)",
        "ema",
        choices=("ema", "gradient"),
    )
    codebook_init: str = field(
        "where the codebook begins: anywhere, at encoder outputs, or at their cluster centres",
        "random",
        choices=("random", "data", "kmeans"),
    )
    ema_decay: float = field("decay of the moving averages", 0.99, minimum=0, maximum=0.99999)
    restart_below: float = field(
        "move codes used less than this share of the mean onto data; 0 for never "
        "(vector, predictive, residual)",
        0.03,
        minimum=0,
        maximum=0.9,
    )
    balance: float = field(
        "how strongly codes in much use are avoided; 0 takes the nearest "
        "(vector, predictive, residual)",
        0.0,
        minimum=0,
        maximum=10,
    )
    batch_size: int = field("images in a training batch, over all devices", 64, minimum=1)
    steps: int = field("training steps in all", 10_000, minimum=1)
    steps_per_epoch: int = field("steps between checkpoints", 500, minimum=1)
    optimizer: str = field(
        "muon makes the steps of convolutions orthogonal: fewer of them, each a little slower",
        "adam",
        choices=("adam", "muon"),
    )
    learning_rate: float = field("peak learning rate", 3e-4, minimum=0)
    schedule: str = schedule_field()
    warmup_steps: int = field("steps of linear warm-up", 0, minimum=0)
    clip_norm: float = field("clip the gradient to this norm; 0 for never", 0.0, minimum=0)
    weight_ema: float = weight_ema_field()
    augment: str = field(
        "vary the training images: mirrored, shifted, or both",
        "none",
        choices=("none", "flip", "crop", "flip_crop"),
    )
    adversarial: float = field(
        "weight of a patch discriminator's loss, for sharper pictures", 0.0, minimum=0
    )
    adversarial_start: int = field("step at which that loss sets in", 0, minimum=0)
    dtype: str = dtype_field("networks")

    @property
    def fsq_sizes(self) -> tuple[int, ...]:
        """`fsq_levels` as numbers."""
        return tuple(int(size) for size in self.fsq_levels.split(","))

    def __post_init__(self):
        super().__post_init__()
        check_epochs(self.prefix, self.steps, self.steps_per_epoch)
        if self.downsampling & (self.downsampling - 1):
            raise VqbeamError(
                f"vqvae.downsampling is {self.downsampling}; it must be a power of two"
            )
        self._check_quantizer()

    def _check_quantizer(self):
        if self.quantizer == "residual" and (self.grids > 1 or self.lookup == "cosine"):
            raise VqbeamError("vqvae.quantizer is residual; use vqvae.grids 1, vqvae.lookup l2")
        if self.quantizer == "predictive" and self.lookup == "cosine":
            raise VqbeamError("vqvae.quantizer is predictive; use vqvae.lookup l2")
        if self.quantizer == "residual" and self.depth < 2:
            raise VqbeamError("vqvae.quantizer is residual; set vqvae.depth to 2 or more")
        if self.quantizer != "residual" and self.depth > 1:
            raise VqbeamError(f"vqvae.depth is {self.depth}; set vqvae.quantizer to residual")
        if self.quantizer == "lfq" and self.num_codes & (self.num_codes - 1):
            raise VqbeamError(f"vqvae.num_codes is {self.num_codes}; lfq takes a power of two")
        if self.quantizer == "fsq":
            self._check_fsq()

    def _check_fsq(self):
        codes = fsq_codes(self.fsq_levels)
        if codes is None or min(self.fsq_sizes) < 2:
            raise VqbeamError(
                f"vqvae.fsq_levels is {self.fsq_levels!r}; give numbers from 2 up, such as 8,8,8"
            )
        if codes != self.num_codes:
            raise VqbeamError(
                f"vqvae.fsq_levels {self.fsq_levels} make {codes} codes, vqvae.num_codes is "
                f"{self.num_codes}; set it to {codes}"
            )


def fsq_codes(levels: str) -> int | None:
    """Returns how many codes levels such as "8,8,8" make, or None where they are none."""
    if not re.fullmatch(r"\d+(,\d+)*", levels):
        return None
    return math.prod(map(int, levels.split(",")))
