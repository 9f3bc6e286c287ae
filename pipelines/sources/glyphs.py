"""A dataset of rendered letters, to train on without a download."""

import contextlib
import functools
import io
import math
import pathlib

import apache_beam as beam
import matplotlib
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image, ImageDraw, ImageFont

from vqbeam.pipelines.sources.tfds import TfdsSource

SIZE = 32
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

# The text fonts that matplotlib ships. Its other fonts have mathematical symbols.
FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-BoldOblique",
    "DejaVuSans-Oblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSansMono-BoldOblique",
    "DejaVuSansMono-Oblique",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-BoldItalic",
    "DejaVuSerif-Italic",
    "STIXGeneral",
    "STIXGeneralBol",
    "STIXGeneralBolIta",
    "STIXGeneralItalic",
    "cmb10",
    "cmr10",
    "cmss10",
    "cmti10",
    "cmtt10",
)

_OVERSAMPLING = 4
_MASK_SIDE = SIZE * _OVERSAMPLING  # pixels of a mask's longer side
# Pixels of a letter's longer side in an image. A square of 26, turned by 10 degrees, still fits.
_MIN_SIDE, _MAX_SIDE = 21.0, 26.0
_MAX_ANGLE = math.radians(10)
_MAX_SHIFT = 2.0
# Ink and paper. There are few pairs, since some hundreds of codes cannot cover every stroke in
# every colour.
_COLOURS = np.array(
    [
        [(24, 36, 110), (255, 236, 179)],
        [(176, 18, 44), (255, 255, 255)],
        [(255, 255, 255), (22, 102, 66)],
        [(255, 214, 64), (40, 40, 48)],
        [(20, 20, 24), (174, 217, 244)],
        [(110, 24, 120), (226, 244, 214)],
        [(255, 255, 255), (200, 72, 24)],
        [(10, 80, 160), (255, 220, 225)],
    ],
    np.float64,
)


class Glyphs(tfds.core.GeneratorBasedBuilder):
    """Capital letters in many fonts, colours and poses: [32, 32, 3] uint8 with a label A to Z.

    They are drawn, not downloaded. In each split, all classes have the same number of images.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}
    SEED = 0
    COUNTS = {"train": 26_000, "test": 2_600}

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Capital letters in many fonts, colours and poses.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(SIZE, SIZE, 3), encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=list(LETTERS)),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager):
        # No index is used twice, so no image is in two splits.
        splits, start = {}, 0
        for name, count in self.COUNTS.items():
            splits[name] = self._generate_examples(start, start + count)
            start += count
        return splits

    def _generate_examples(self, start: int, stop: int) -> beam.PTransform:
        return beam.Create(range(start, stop)) | beam.Map(_example, seed=self.SEED)


def _example(index: int, seed: int) -> tuple[int, dict]:
    image, label = draw_glyph(seed, index)
    return index, {"image": image, "label": label}


def draw_glyph(seed: int, index: int) -> tuple[np.ndarray, int]:
    """Draws one letter; the same arguments always give the same image.

    Args:
        seed: The series of images, at least 0.
        index: Position in the series, at least 0. The letter is `LETTERS[index % 26]`, so any 26
            consecutive images have each letter once.

    Returns:
        The image, uint8 [32, 32, 3], and its label, 0 for A to 25 for Z.
    """
    label = index % len(LETTERS)
    # The pair is the key, so an image does not depend on those drawn before it.
    rng = np.random.Generator(np.random.Philox(key=[seed, index]))
    mask = _letter_mask(FONTS[rng.integers(len(FONTS))], LETTERS[label])
    coverage = _pose(mask, rng)[..., None]
    ink, paper = _COLOURS[rng.integers(len(_COLOURS))]
    return np.rint(paper + coverage * (ink - paper)).astype(np.uint8), label


@functools.cache
def _letter_mask(font: str, letter: str) -> Image.Image:
    """Returns the letter, white on black (mode L), cropped to its edges and of the same size."""
    path = pathlib.Path(matplotlib.get_data_path(), "fonts", "ttf", f"{font}.ttf")
    # Every build of Pillow has the basic layout, so all machines draw the same image.
    face = ImageFont.truetype(path, _MASK_SIDE, layout_engine=ImageFont.Layout.BASIC)
    left, top, right, bottom = face.getbbox(letter)
    mask = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(mask).text((-left, -top), letter, fill=255, font=face)
    scale = _MASK_SIDE / max(mask.size)
    return mask.resize([round(side * scale) for side in mask.size], Image.Resampling.LANCZOS)


def _pose(mask: Image.Image, rng: np.random.Generator) -> np.ndarray:
    """Returns the coverage in [0, 1] of the letter scaled, rotated and shifted, [SIZE, SIZE]."""
    angle = rng.uniform(-_MAX_ANGLE, _MAX_ANGLE)
    scale = rng.uniform(_MIN_SIDE, _MAX_SIDE) / _MASK_SIDE
    cos, sin = math.cos(angle), math.sin(angle)
    width, height = mask.width * scale, mask.height * scale
    # The free space on each side of the rotated letter limits the shift, so nothing is cut off.
    x = SIZE / 2 + _shift(width * cos + height * abs(sin), rng)
    y = SIZE / 2 + _shift(width * abs(sin) + height * cos, rng)
    # Image.transform maps each pixel of the result to a position in the mask.
    a, b = cos / scale / _OVERSAMPLING, sin / scale / _OVERSAMPLING
    x, y = x * _OVERSAMPLING, y * _OVERSAMPLING
    affine = (a, b, mask.width / 2 - a * x - b * y, -b, a, mask.height / 2 + b * x - a * y)
    side = SIZE * _OVERSAMPLING
    method = Image.Transform.AFFINE
    posed = mask.transform((side, side), method, affine, Image.Resampling.BILINEAR)
    return np.asarray(posed.reduce(_OVERSAMPLING), np.float64) / 255


def _shift(extent: float, rng: np.random.Generator) -> float:
    limit = min((SIZE - extent) / 2, _MAX_SHIFT)
    return rng.uniform(-limit, limit)


class GlyphsSource(TfdsSource):
    """`glyphs`: the letters, which TFDS renders on this machine and keeps like a dataset."""

    def builder(self) -> Glyphs:
        """Returns the builder of the letters."""
        return Glyphs(**self.builder_options())

    def announcement(self, builder: Glyphs) -> str:
        """Returns the line that is printed before the letters are rendered."""
        count = sum(builder.COUNTS.values())
        return f"drawing the {count:,} letters of {builder.info.full_name}, once, into " + str(
            builder.data_dir
        )

    def quiet(self) -> contextlib.AbstractContextManager:
        """Returns a context that drops TFDS's messages about a download, since there is none."""
        return contextlib.redirect_stdout(io.StringIO())
