"""What a run is: one frozen, validated dataclass per stage.

Each field carries its help text and its range, so that the command line, the checks and the
documentation have one source.
"""

import dataclasses
from typing import Any

from configs.errors import VqbeamError


def _field(
    help: str,
    default: Any = dataclasses.MISSING,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: tuple[str, ...] | None = None,
) -> Any:
    metadata = {"help": help, "minimum": minimum, "maximum": maximum, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


class _Section:
    """Checks each field of a config section against the range in its metadata."""

    prefix = ""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            _check(f"{self.prefix}.{field.name}", getattr(self, field.name), field.metadata)


def _check_epochs(prefix: str, steps: int, steps_per_epoch: int) -> None:
    if steps > steps_per_epoch and steps % steps_per_epoch:
        raise VqbeamError(
            f"{prefix}.steps is {steps}; make it a whole multiple of {prefix}.steps_per_epoch "
            f"({steps_per_epoch})"
        )


def _check(name: str, value: Any, limits: Any) -> None:
    if value is None:
        return
    choices, minimum, maximum = limits["choices"], limits["minimum"], limits["maximum"]
    if choices is not None and value not in choices:
        raise VqbeamError(f"{name} is {value!r}; choose one of {', '.join(choices)}")
    if minimum is not None and value < minimum:
        raise VqbeamError(f"{name} is {value}; it must be at least {minimum}")
    if maximum is not None and value > maximum:
        raise VqbeamError(f"{name} is {value}; it must be at most {maximum}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(_Section):
    """Where the images come from and the shape that they are brought to."""

    prefix = "data"

    source: str = _field("tfds:NAME[/CONFIG][:VERSION], folder:PATH, or glyphs")
    data_dir: str | None = _field("folder in which TFDS keeps prepared datasets", None)
    manual_dir: str | None = _field("folder with files that TFDS wants downloaded by hand", None)
    train_split: str = _field("TFDS split to train on", "train")
    validation_split: str = _field("TFDS split that is held out", "test")
    validation_share: float = _field(
        "folder: share of the images held out, by hash of their path", 0.1, minimum=0, maximum=0.9
    )
    image_key: str = _field("TFDS feature that holds the image", "image")
    label_key: str = _field("TFDS feature that holds the class, where there is one", "label")
    height: int = _field("image height in pixels", 32, minimum=4, maximum=4096)
    width: int = _field("image width in pixels", 32, minimum=4, maximum=4096)
    channels: int = _field("1 for grayscale, 3 for RGB", 3, minimum=1, maximum=3)
    fit: str = _field(
        "crop the longer side or pad the shorter one", "crop", choices=("crop", "pad")
    )
    images_per_shard: int = _field("images in one TFRecord file", 5000, minimum=1)
    max_images: int | None = _field("use no more images of each split than this", None, minimum=1)
    max_failed: float = _field(
        "share of images that may fail to decode", 0.01, minimum=0, maximum=1
    )

    def __post_init__(self):
        super().__post_init__()
        if self.channels == 2:
            raise VqbeamError("data.channels is 2; use 1 (grayscale) or 3 (RGB)")
        kind, _, rest = self.source.partition(":")
        if self.source != "glyphs" and not (kind in ("tfds", "folder") and rest):
            raise VqbeamError(
                f"data.source is {self.source!r}; use tfds:NAME, folder:PATH or glyphs"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class VQVAEConfig(_Section):
    """Network, quantizer and training of stage 1."""

    prefix = "vqvae"

    num_codes: int = _field("codebook size K", 512, minimum=2, maximum=2**20)
    code_dim: int = _field("length D of a codebook vector", 64, minimum=1)
    downsampling: int = _field("image side over grid side, a power of two", 4, minimum=2)
    width: int = _field("channels of the encoder and decoder", 128, minimum=4)
    residual_layers: int = _field("residual blocks in each of encoder and decoder", 2, minimum=0)
    residual_width: int = _field("channels inside a residual block", 32, minimum=1)
    commitment: float = _field("weight β of the commitment loss", 0.25, minimum=0)
    codebook_update: str = _field(
        "what moves the codebook: moving averages or the codebook loss",
        "ema",
        choices=("ema", "gradient"),
    )
    ema_decay: float = _field("decay of the moving averages", 0.99, minimum=0, maximum=0.99999)
    restart_below: float = _field(
        "move codes used less than this share of the mean onto data; 0 for never (ema only)",
        0.03,
        minimum=0,
        maximum=0.9,
    )
    batch_size: int = _field("images in a training batch", 64, minimum=1)
    steps: int = _field("training steps in all", 10_000, minimum=1)
    steps_per_epoch: int = _field("steps between checkpoints", 500, minimum=1)
    learning_rate: float = _field("peak learning rate of Adam", 3e-4, minimum=0)
    dtype: str = _field(
        "compute precision of the networks",
        "float32",
        choices=("float32", "mixed_bfloat16", "mixed_float16"),
    )

    def __post_init__(self):
        super().__post_init__()
        _check_epochs(self.prefix, self.steps, self.steps_per_epoch)
        if self.downsampling & (self.downsampling - 1):
            raise VqbeamError(
                f"vqvae.downsampling is {self.downsampling}; it must be a power of two"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodeConfig(_Section):
    """Batch encoding of the dataset."""

    prefix = "encode"

    batch_size: int = _field("images encoded at once", 256, minimum=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PriorConfig(_Section):
    """Transformer and training of stage 2."""

    prefix = "prior"

    layers: int = _field("transformer blocks", 6, minimum=1)
    width: int = _field("width of the residual stream", 256, minimum=4)
    heads: int = _field("attention heads", 8, minimum=1)
    dropout: float = _field("dropout rate in the blocks", 0.1, minimum=0, maximum=0.9)
    label_dropout: float = _field(
        "share of examples trained without their label, for guidance", 0.1, minimum=0, maximum=1
    )
    batch_size: int = _field("code grids in a training batch", 64, minimum=1)
    steps: int = _field("training steps in all", 10_000, minimum=1)
    steps_per_epoch: int = _field("steps between checkpoints", 500, minimum=1)
    learning_rate: float = _field("peak learning rate of AdamW", 1e-3, minimum=0)
    warmup_steps: int = _field("steps of linear warm-up", 200, minimum=0)
    weight_decay: float = _field("decoupled weight decay", 0.05, minimum=0)
    dtype: str = _field(
        "compute precision of the transformer",
        "float32",
        choices=("float32", "mixed_bfloat16", "mixed_float16"),
    )

    def __post_init__(self):
        super().__post_init__()
        _check_epochs(self.prefix, self.steps, self.steps_per_epoch)
        if self.width % self.heads or (self.width // self.heads) % 4:
            raise VqbeamError(
                f"prior.width is {self.width} and prior.heads is {self.heads}; the width of a "
                "head must be a whole multiple of 4, for 2-D rotary positions"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig(_Section):
    """How new images are drawn, unless the command line says otherwise."""

    prefix = "sample"

    num: int = _field("images to draw", 64, minimum=1)
    temperature: float = _field("divides the logits; 0 takes the likeliest code", 1.0, minimum=0)
    top_k: int = _field("draw from the K likeliest codes only; 0 for all", 0, minimum=0)
    top_p: float = _field(
        "draw from the smallest set of codes with this probability", 1.0, minimum=0, maximum=1
    )
    guidance: float = _field("classifier-free guidance scale; 1 for none", 1.0, minimum=0)
    batch_size: int = _field("images drawn at once", 64, minimum=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A run in full: the seed and one section for each stage."""

    name: str
    seed: int = _field("seed of all random numbers", 0, minimum=0, maximum=2**31)
    data: DataConfig
    vqvae: VQVAEConfig = VQVAEConfig()
    encode: EncodeConfig = EncodeConfig()
    prior: PriorConfig = PriorConfig()
    sample: SampleConfig = SampleConfig()

    def __post_init__(self):
        seed = next(field for field in dataclasses.fields(self) if field.name == "seed")
        _check("seed", self.seed, seed.metadata)
        for side in ("height", "width"):
            pixels = getattr(self.data, side)
            if pixels % self.vqvae.downsampling:
                raise VqbeamError(
                    f"data.{side} is {pixels}, which vqvae.downsampling "
                    f"({self.vqvae.downsampling}) does not divide"
                )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of a code grid."""
        factor = self.vqvae.downsampling
        return self.data.height // factor, self.data.width // factor

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image."""
        return self.data.height, self.data.width, self.data.channels


SECTIONS: dict[str, type] = {
    "data": DataConfig,
    "vqvae": VQVAEConfig,
    "encode": EncodeConfig,
    "prior": PriorConfig,
    "sample": SampleConfig,
}
