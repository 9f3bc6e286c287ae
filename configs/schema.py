"""The config of a run: one frozen, validated dataclass per stage.

The help text and range of each field are the single source for the command line, the checks and the
documentation.
"""

import dataclasses
import math
import re

from vqbeam.configs.fields import (
    Section,
    VqbeamError,
    check,
    check_type,
    dtype_field,
    field,
    init_from_field,
    schedule_field,
    weight_ema_field,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerSettings(Section):
    """Settings of the sampler: temperature, code filters, guidance and precision.

    `vqbeam.prior.filters` defines each filter and the order in which they are applied.
    """

    prefix = "sample"

    temperature: float = field("divides the logits; 0 takes the most likely code", 1.0, minimum=0)
    top_k: int = field("keep the K most likely codes; 0 keeps all", 0, minimum=0)
    top_p: float = field(
        "keep the smallest set of codes with this probability; 1 keeps all",
        1.0,
        minimum=0,
        maximum=1,
    )
    min_p: float = field(
        "keep codes at least this fraction as probable as the most likely; 0 keeps all",
        0.0,
        minimum=0,
        maximum=1,
    )
    guidance: float = field("classifier-free guidance scale; 1 for none", 1.0, minimum=0)
    guidance_schedule: str = field(
        "guidance over the sequence: the same for all codes, a linear or cosine ramp from 1 to the "
        "scale, or only inside an interval",
        "constant",
        choices=("constant", "linear", "cosine", "interval"),
    )
    guidance_power: float = field(
        "exponent of the cosine ramp; higher values guide fewer of the first codes",
        1.0,
        minimum=0.1,
        maximum=10,
    )
    guidance_start: float = field(
        "start of the interval, as a fraction of the sequence", 0.0, minimum=0, maximum=1
    )
    guidance_end: float = field(
        "end of the interval, as a fraction of the sequence", 1.0, minimum=0, maximum=1
    )
    precision: str = field(
        "exact computes in float32; fast uses bfloat16, with float32 logits, and is meant for GPUs",
        "exact",
        choices=("exact", "fast"),
    )

    def __post_init__(self):
        super().__post_init__()
        if self.top_p == 0:
            raise VqbeamError("sample.top_p is 0.0; it must be above 0; sample.top_k 1 is greedy")
        if self.min_p == 1:
            raise VqbeamError("sample.min_p is 1.0; it must be below 1; sample.top_k 1 is greedy")
        if self.guidance_start >= self.guidance_end:
            raise VqbeamError(
                f"sample.guidance_start is {self.guidance_start}; it must be below "
                f"sample.guidance_end ({self.guidance_end})"
            )

    def check_guidance(self, has_labels: bool, label_dropout: float) -> None:
        """Raises a VqbeamError if guidance is on and the prior was not trained for it.

        Guidance extrapolates from the prediction without a label to the prediction with it. A prior
        learns both only if its data has labels and training drops some of them.

        Args:
            has_labels: Whether the data has classes or attributes.
            label_dropout: Fraction of training examples whose label is dropped.
        """
        if self.guidance == 1 or (has_labels and label_dropout):
            return
        reason = "prior.label_dropout 0" if has_labels else "no labels"
        raise VqbeamError(
            f"sample.guidance is {self.guidance:g}, but the prior is trained with {reason}, which "
            "leaves nothing to guide with; set guidance to 1"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig(SamplerSettings):
    """Default settings of the commands that sample images."""

    num: int = field("number of images", 64, minimum=1)
    batch_size: int = field("images sampled at once", 64, minimum=1)

    @property
    def sampler(self) -> SamplerSettings:
        """The settings that decide what an image looks like."""
        names = [f.name for f in dataclasses.fields(SamplerSettings)]
        return SamplerSettings(**{name: getattr(self, name) for name in names})

    def with_at_most(self, count: int) -> "SampleConfig":
        """Returns the settings with `batch_size` limited to `count` images."""
        return dataclasses.replace(self, batch_size=min(self.batch_size, count))


# Quantizers whose codes follow from rounding the latent.
WITHOUT_CODEBOOK = ("fsq", "lfq")
# Advice for error messages when a device runs out of memory.
LESS_MEMORY = (
    "lower batch_size, or for the prior raise prior.grad_accumulation or set prior.remat to blocks"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PriorConfig(Section):
    """Transformer and training settings of stage 2."""

    prefix = "prior"

    layers: int = field("transformer blocks", 6, minimum=1)
    width: int = field("width of the residual stream", 256, minimum=4)
    heads: int = field("attention heads", 8, minimum=1)
    kv_heads: int = field(
        "key/value heads (grouped-query attention): fewer make sampling faster; 0 for as many "
        "as heads",
        0,
        minimum=0,
    )
    qk_norm: str = field(
        "norm of the queries and keys of each attention head: none, or rms",
        "none",
        choices=("none", "rms"),
    )
    branch_init: str = field(
        "the last matrix of each branch of a block starts random, or at zeros, so that the block "
        "returns its input",
        "random",
        choices=("random", "zeros"),
    )
    dropout: float = field("dropout rate in the blocks", 0.1, minimum=0, maximum=0.9)
    label_dropout: float = field(
        "fraction of training examples without their label, for guidance",
        0.1,
        minimum=0,
        maximum=0.9,
    )
    batch_size: int = field("code grids in a training batch, over all devices", 64, minimum=1)
    grad_accumulation: int = field(
        "parts of a batch computed one after the other, to save memory; a step is a full batch",
        1,
        minimum=1,
    )
    remat: str = field(
        "recompute activations in the backward pass, to save memory: none of them, or those "
        "inside the blocks",
        "none",
        choices=("none", "blocks"),
    )
    steps: int = field("number of training steps", 10_000, minimum=1)
    steps_per_epoch: int = field(
        "steps of an epoch, after which held-out losses are measured; the last may have fewer",
        500,
        minimum=1,
    )
    early_stopping: int = field(
        "stop after this many epochs without a better validation loss, with the weights of the "
        "best; 0 for never",
        0,
        minimum=0,
    )
    optimizer: str = field(
        "muon orthogonalizes the updates of the blocks' matrices, and leaves the rest to AdamW",
        "adamw",
        choices=("adamw", "muon"),
    )
    learning_rate: float = field("peak learning rate", 1e-3, minimum=0)
    schedule: str = schedule_field()
    warmup_steps: int = field("steps of linear warm-up", 200, minimum=0)
    weight_decay: float = field("decoupled weight decay", 0.05, minimum=0)
    clip_norm: float = field("clip the gradient to this norm; 0 for never", 1.0, minimum=0)
    weight_ema: float = weight_ema_field()
    init_from: str | None = init_from_field()
    pictures: int = field(
        "samples shown in TensorBoard after each epoch; 0 for none", 16, minimum=0, maximum=16
    )
    dtype: str = dtype_field("transformer")

    def __post_init__(self):
        super().__post_init__()
        if self.width % self.heads or (self.width // self.heads) % 4:
            raise VqbeamError(
                f"prior.width is {self.width} and prior.heads is {self.heads}; the width of a "
                "head must be a whole multiple of 4, for 2-D rotary positions"
            )
        if self.kv_heads and self.heads % self.kv_heads:
            raise VqbeamError(
                f"prior.heads is {self.heads}, which prior.kv_heads ({self.kv_heads}) does not "
                "divide; give a divisor of it, or 0 for as many as prior.heads"
            )
        if self.batch_size % self.grad_accumulation:
            raise VqbeamError(
                f"prior.batch_size is {self.batch_size}, which prior.grad_accumulation "
                f"({self.grad_accumulation}) does not divide; make it a multiple"
            )

    @property
    def part_size(self) -> int:
        """The number of images of a batch that are in memory at once."""
        return self.batch_size // self.grad_accumulation


@dataclasses.dataclass(frozen=True, kw_only=True)
class VQVAEConfig(Section):
    """Network, quantizer and training settings of stage 1."""

    prefix = "vqvae"

    quantizer: str = field(
        "vector: nearest codebook vector; predictive: residual of a prediction from neighbours; "
        "residual: several codes in turn; fsq: rounded numbers; lfq: signs; simvq: a learned map "
        "of a fixed codebook",
        "vector",
        choices=("vector", "predictive", "residual", "fsq", "lfq", "simvq"),
    )
    num_codes: int = field("codebook size K, of each level", 512, minimum=2, maximum=2**20)
    code_dim: int = field("length D of a codebook vector (not fsq, lfq)", 64, minimum=1)
    depth: int = field(
        "codes at each position: levels of the residual quantizer", 1, minimum=1, maximum=64
    )
    grids: int = field(
        "1, or 2 for VQ-VAE-2, which adds a grid of half the height and width",
        1,
        minimum=1,
        maximum=2,
    )
    fsq_levels: str = field("levels of each channel, such as 8,8,8 for K = 512 (fsq)", "8,8,8")
    downsampling: int = field("ratio of image height to grid height, a power of two", 4, minimum=2)
    network: str = field(
        "conv: residual blocks on the grid alone; resnet: normalized blocks at every resolution "
        "as in VQGAN, several times slower",
        "conv",
        choices=("conv", "resnet"),
    )
    width: int = field(
        "channels of the encoder and decoder; with resnet those at the full resolution, doubled "
        "at each lower one up to 4 times",
        128,
        minimum=4,
    )
    residual_layers: int = field(
        "residual blocks in each of encoder and decoder; with resnet at each resolution, and one "
        "more in the decoder",
        2,
        minimum=0,
    )
    residual_width: int = field("channels inside a residual block (conv)", 32, minimum=1)
    commitment: float = field("weight β of the commitment loss (all but fsq)", 0.25, minimum=0)
    entropy: float = field(
        "weight of the entropy loss, for confident and diverse codes (all but fsq)", 0.0, minimum=0
    )
    lookup: str = field(
        "nearest by Euclidean distance or by angle (vector, simvq)", "l2", choices=("l2", "cosine")
    )
    estimator: str = field(
        "estimator of the gradient through the quantizer (not fsq, lfq)",
        "straight_through",
        choices=("straight_through", "rotation", "diveq"),
    )
    codebook_update: str = field(
        "codebook update: moving averages or gradient of the codebook loss "
        "(vector, predictive, residual)",
        "ema",
        choices=("ema", "gradient"),
    )
    codebook_init: str = field(
        "codebook initialization: random, sampled encoder outputs, or k-means of them",
        "random",
        choices=("random", "data", "kmeans"),
    )
    ema_decay: float = field("decay of the moving averages", 0.99, minimum=0, maximum=0.99999)
    restart_below: float = field(
        "codes used less often than this fraction of the mean are moved to encoder outputs; 0 for "
        "never (vector, predictive, residual)",
        0.03,
        minimum=0,
        maximum=0.9,
    )
    balance: float = field(
        "penalty on the distance to frequently used codes; 0 for the nearest code "
        "(vector, predictive, residual)",
        0.0,
        minimum=0,
        maximum=10,
    )
    batch_size: int = field("images in a training batch, over all devices", 64, minimum=1)
    steps: int = field("number of training steps", 10_000, minimum=1)
    steps_per_epoch: int = field(
        "steps of an epoch, after which held-out losses are measured; the last may have fewer",
        500,
        minimum=1,
    )
    optimizer: str = field(
        "muon orthogonalizes the updates of convolutions: fewer steps, each a little slower",
        "adam",
        choices=("adam", "muon"),
    )
    learning_rate: float = field("peak learning rate", 3e-4, minimum=0)
    schedule: str = schedule_field()
    warmup_steps: int = field("steps of linear warm-up", 0, minimum=0)
    clip_norm: float = field("clip the gradient to this norm; 0 for never", 0.0, minimum=0)
    weight_ema: float = weight_ema_field()
    init_from: str | None = init_from_field()
    augment: str = field(
        "augmentation of the training images: horizontal flips, shifts, or both",
        "none",
        choices=("none", "flip", "crop", "flip_crop"),
    )
    finetune_steps: int = field(
        "further steps at the end that train only the decoder, for sharper images; 0 for none",
        0,
        minimum=0,
    )
    perceptual: float = field("weight of the feature loss in the finetune steps", 0.0, minimum=0)
    adversarial: float = field(
        "weight of the adversarial loss in the finetune steps", 0.0, minimum=0
    )
    dtype: str = dtype_field("networks")

    @property
    def fsq_sizes(self) -> tuple[int, ...]:
        """`fsq_levels` as a tuple of integers."""
        return tuple(int(size) for size in self.fsq_levels.split(","))

    @property
    def feature_steps(self) -> int:
        """Training steps of the network of the feature loss: half as many as of the decoder."""
        return math.ceil(self.finetune_steps / 2) if self.perceptual else 0

    def __post_init__(self):
        super().__post_init__()
        if self.downsampling & (self.downsampling - 1):
            raise VqbeamError(
                f"vqvae.downsampling is {self.downsampling}; it must be a power of two"
            )
        self._check_finetuning()
        self._check_quantizer()

    def _check_finetuning(self):
        weights = {name: getattr(self, name) for name in ("perceptual", "adversarial")}
        if self.finetune_steps and not any(weights.values()):
            raise VqbeamError(
                f"vqvae.finetune_steps is {self.finetune_steps}, but vqvae.perceptual and "
                "vqvae.adversarial are 0; set one of them, such as vqvae.perceptual 1"
            )
        for name, weight in weights.items():
            if weight and not self.finetune_steps:
                raise VqbeamError(
                    f"vqvae.{name} is {weight:g}, but vqvae.finetune_steps is 0; set that to 1000, "
                    f"for example, or vqvae.{name} to 0"
                )

    def _check_quantizer(self):
        if self.grids > 1 and self.network != "conv":
            raise VqbeamError("vqvae.grids is 2; use vqvae.network conv")
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
                f"vqvae.fsq_levels is {self.fsq_levels!r}; give integers from 2 up, such as 8,8,8"
            )
        if codes != self.num_codes:
            raise VqbeamError(
                f"vqvae.fsq_levels {self.fsq_levels} make {codes} codes, vqvae.num_codes is "
                f"{self.num_codes}; set it to {codes}"
            )


def fsq_codes(levels: str) -> int | None:
    """Returns the number of codes for levels such as "8,8,8", or None if they cannot be parsed."""
    if not re.fullmatch(r"\d+(,\d+)*", levels):
        return None
    return math.prod(map(int, levels.split(",")))


# The kinds of sources that take a path.
PATH_SOURCES = ("folder", "parquet", "webdataset", "tfrecord", "array")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """Source, splits and target shape of the images."""

    prefix = "data"

    source: str = field(
        "tfds:NAME[/CONFIG][:VERSION], hf:NAME[@REVISION], glyphs, folder:PATH, or files of many "
        "images: parquet:PATH, webdataset:PATH, tfrecord:PATH, array:PATH"
    )
    data_dir: str | None = field("folder in which TFDS keeps prepared datasets", None)
    manual_dir: str | None = field("folder with files that TFDS wants downloaded by hand", None)
    train_split: str = field(
        "split to train on: for TFDS its name, or a part such as train[:90%]; for files, what "
        "their names begin with; the word none to ignore names",
        "train",
    )
    validation_split: str = field("split that is held out, named in the same ways", "test")
    validation_share: float = field(
        "share of the images held out, by hash of their key, from a folder or from files whose "
        "names indicate no splits",
        0.1,
        minimum=0,
        maximum=0.9,
    )
    image_key: str = field("feature, column or array that holds the image", "image")
    label_key: str = field(
        "feature, column or array that holds the class, or none to use no classes", "label"
    )
    height: int = field("image height in pixels", 32, minimum=4, maximum=4096)
    width: int = field("image width in pixels", 32, minimum=4, maximum=4096)
    channels: int = field("1 for grayscale, 3 for RGB", 3, minimum=1, maximum=3)
    fit: str = field("crop the longer side or pad the shorter one", "crop", choices=("crop", "pad"))
    images_per_shard: int = field("images in one TFRecord file", 5000, minimum=1)
    max_images: int | None = field("use no more images of each split than this", None, minimum=1)
    max_failed: float = field("share of images that may fail to decode", 0.01, minimum=0, maximum=1)

    def __post_init__(self):
        super().__post_init__()
        if self.channels == 2:
            raise VqbeamError("data.channels is 2; use 1 (grayscale) or 3 (RGB)")
        kind, _, rest = self.source.partition(":")
        if self.source != "glyphs" and not (kind in ("tfds", "hf", *PATH_SOURCES) and rest):
            paths = ", ".join(f"{kind}:PATH" for kind in PATH_SOURCES)
            raise VqbeamError(
                f"data.source is {self.source!r}; use tfds:NAME, hf:NAME, {paths} or glyphs"
            )

    @property
    def path(self) -> str | None:
        """The path in `source`; None if it names a dataset instead."""
        kind, _, rest = self.source.partition(":")
        return rest if kind in PATH_SOURCES else None

    @property
    def form(self) -> dict[str, int | str]:
        """Height, width, channels and fit of the prepared images, by name."""
        return {name: getattr(self, name) for name in ("height", "width", "channels", "fit")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodeConfig(Section):
    """Settings for encoding the dataset into codes."""

    prefix = "encode"

    batch_size: int = field("images encoded at once", 256, minimum=1)
    augment: str = field(
        "encode variants of the training images as well: flip adds their mirror images; ten_crop "
        "shifts by a twentieth of the sides to four corners, and mirrors all five",
        "none",
        choices=("none", "flip", "ten_crop"),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The complete config of a run: the seed and one section per stage."""

    name: str
    seed: int = field("seed of all random numbers", 0, minimum=0, maximum=2**31)
    log: str | None = field(
        "where training writes its metrics besides TensorBoard: csv, wandb:PROJECT, or "
        "csv,wandb:PROJECT",
        None,
    )
    data: DataConfig
    vqvae: VQVAEConfig = VQVAEConfig()
    encode: EncodeConfig = EncodeConfig()
    prior: PriorConfig = PriorConfig()
    sample: SampleConfig = SampleConfig()

    def __post_init__(self):
        seed = next(f for f in dataclasses.fields(self) if f.name == "seed")
        check_type("name", self.name, str)
        check_type("seed", self.seed, int)
        check("seed", self.seed, seed.metadata)
        check_type("log", self.log, str | None)
        self._check_log()
        for side in ("height", "width"):
            pixels = getattr(self.data, side)
            if pixels % self.vqvae.downsampling:
                raise VqbeamError(
                    f"data.{side} is {pixels}, which vqvae.downsampling "
                    f"({self.vqvae.downsampling}) does not divide; make it a multiple"
                )
            if self.vqvae.grids == 2 and pixels // self.vqvae.downsampling % 2:
                raise VqbeamError(
                    f"data.{side} is {pixels}, which makes a grid with an odd side; "
                    "vqvae.grids 2 halves it: use 1"
                )

        self._check_sampling()

    @property
    def log_to(self) -> dict[str, str]:
        """Where metrics go besides TensorBoard: "csv" or "wandb", with its project or ""."""
        return {kind: rest for kind, _, rest in self._log_parts()}

    def _log_parts(self) -> list[tuple[str, str, str]]:
        return [part.partition(":") for part in self.log.split(",")] if self.log is not None else []

    def _check_log(self):
        for part in self._log_parts():
            if part != ("csv", "", "") and not (part[0] == "wandb" and part[2].strip()):
                raise VqbeamError(
                    f"log is {self.log!r}; give csv, wandb:PROJECT, csv,wandb:PROJECT or none"
                )

    def _check_sampling(self):
        if self.sample.top_k > self.vqvae.num_codes:
            raise VqbeamError(
                f"sample.top_k is {self.sample.top_k}, more than vqvae.num_codes "
                f"({self.vqvae.num_codes}); 0 keeps all codes"
            )
        # Assume labels: whether there are any is known only once the data is prepared.
        self.sample.check_guidance(has_labels=True, label_dropout=self.prior.label_dropout)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the code grid (of the finer one if there are two)."""
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
