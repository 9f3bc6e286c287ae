"""What a run is: one frozen, validated dataclass per stage.

Each field carries its help text and its range, so that the command line, the checks and the
documentation have one source.
"""

import dataclasses

from vqbeam.configs.errors import VqbeamError
from vqbeam.configs.fields import Section, check, check_type, field
from vqbeam.configs.prior_config import PriorConfig
from vqbeam.configs.sample_config import SampleConfig
from vqbeam.configs.vqvae_config import VQVAEConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """Where the images come from and the shape that they are brought to."""

    prefix = "data"

    source: str = field("tfds:NAME[/CONFIG][:VERSION], folder:PATH, or glyphs")
    data_dir: str | None = field("folder in which TFDS keeps prepared datasets", None)
    manual_dir: str | None = field("folder with files that TFDS wants downloaded by hand", None)
    train_split: str = field("TFDS split to train on, or a part of it such as train[:90%]", "train")
    validation_split: str = field("TFDS split that is held out, or a part of it", "test")
    validation_share: float = field(
        "folder: share of the images held out, by hash of their path", 0.1, minimum=0, maximum=0.9
    )
    image_key: str = field("TFDS feature that holds the image", "image")
    label_key: str = field("TFDS feature that holds the class, or none to use no classes", "label")
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
        if self.source != "glyphs" and not (kind in ("tfds", "folder") and rest):
            raise VqbeamError(
                f"data.source is {self.source!r}; use tfds:NAME, folder:PATH or glyphs"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodeConfig(Section):
    """Batch encoding of the dataset."""

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
    """A run in full: the seed and one section for each stage."""

    name: str
    seed: int = field("seed of all random numbers", 0, minimum=0, maximum=2**31)
    data: DataConfig
    vqvae: VQVAEConfig = VQVAEConfig()
    encode: EncodeConfig = EncodeConfig()
    prior: PriorConfig = PriorConfig()
    sample: SampleConfig = SampleConfig()

    def __post_init__(self):
        seed = next(f for f in dataclasses.fields(self) if f.name == "seed")
        check_type("seed", self.seed, int)
        check("seed", self.seed, seed.metadata)
        for side in ("height", "width"):
            pixels = getattr(self.data, side)
            if pixels % self.vqvae.downsampling:
                raise VqbeamError(
                    f"data.{side} is {pixels}, which vqvae.downsampling "
                    f"({self.vqvae.downsampling}) does not divide"
                )
            if self.vqvae.grids == 2 and pixels // self.vqvae.downsampling % 2:
                raise VqbeamError(
                    f"data.{side} is {pixels}, which makes a grid with an odd side; "
                    "vqvae.grids 2 halves it: use 1"
                )

        self._check_sampling()

    def _check_sampling(self):
        if self.sample.top_k > self.vqvae.num_codes:
            raise VqbeamError(
                f"sample.top_k is {self.sample.top_k}, more than the codes there are, "
                f"vqvae.num_codes ({self.vqvae.num_codes}); 0 is for all"
            )
        if self.sample.guidance != 1 and not self.prior.label_dropout:
            raise VqbeamError(
                f"sample.guidance is {self.sample.guidance}, away from images without a label, "
                "but prior.label_dropout 0 learns none; make that more, or guidance 1"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the code grid, of the finer one where there are two."""
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
