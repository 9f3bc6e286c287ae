"""How new images are drawn."""

import dataclasses

from vqbeam.configs.errors import VqbeamError
from vqbeam.configs.fields import Section, field

# Fields that decide how many images are drawn, and not what they look like.
HOW_MANY = ("num", "batch_size")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig(Section):
    """How new images are drawn, unless the command line says otherwise."""

    prefix = "sample"

    num: int = field("images to draw", 64, minimum=1)
    temperature: float = field("divides the logits; 0 takes the likeliest code", 1.0, minimum=0)
    top_k: int = field("draw from the K likeliest codes only; 0 for all", 0, minimum=0)
    top_p: float = field(
        "draw from the smallest set of codes with this probability", 1.0, minimum=0, maximum=1
    )
    min_p: float = field(
        "draw from codes at least this share as probable as the likeliest; below 1, 0 for all",
        0.0,
        minimum=0,
        maximum=1,
    )
    guidance: float = field("classifier-free guidance scale; 1 for none", 1.0, minimum=0)
    guidance_schedule: str = field(
        "guide all codes alike, ever more from the first to the last, or some of them",
        "constant",
        choices=("constant", "linear", "interval"),
    )
    guidance_start: float = field(
        "interval: share of the codes that are drawn before guidance", 0.0, minimum=0, maximum=1
    )
    guidance_end: float = field(
        "interval: share of the codes that are drawn when guidance ends", 1.0, minimum=0, maximum=1
    )
    batch_size: int = field("images drawn at once", 64, minimum=1)

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
