"""Decodes image files of any common format to one shape, and encodes images as PNG for records."""

import contextlib
import io
import itertools
import re

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError, features


def _suffixes() -> dict[str, tuple[str, ...]]:
    """Returns the formats that can be read on this machine, with their file name endings."""
    # The usual formats. Pillow knows more, some of which start other programs.
    found = {
        "JPEG": (".jpg", ".jpeg", ".jfif"),
        "PNG": (".png",),
        "BMP": (".bmp",),
        "GIF": (".gif",),
        "WEBP": (".webp",),
        "TIFF": (".tif", ".tiff"),
    }
    if features.check("avif"):
        found["AVIF"] = (".avif",)
    # Installed with the extra `formats`.
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
        found["HEIF"] = (".heic", ".heif", ".hif")
    with contextlib.suppress(ImportError):
        import pillow_jxl  # noqa: F401, registers itself

        found["JXL"] = (".jxl",)
    return found


_SUFFIXES = _suffixes()
FORMATS = tuple(_SUFFIXES)
SUFFIXES = tuple(itertools.chain(*_SUFFIXES.values()))

_SRGB = ImageCms.createProfile("sRGB")

# Level 6 makes records 1 to 12% smaller, and takes about twice as long (benchmarks/choices.py).
_COMPRESS_LEVEL = 1


class ImageError(ValueError):
    """An image that cannot be used; the message is one short line that gives the reason."""


def decode_image(
    data: bytes | np.ndarray,
    *,
    height: int,
    width: int,
    channels: int,
    fit: str,
    background: str = "white",
    notes: list[str] | None = None,
) -> np.ndarray:
    """Returns an image in the given shape, decoded if it is encoded.

    The image is rotated upright according to its EXIF data, and converted to sRGB from the colours
    of its ICC profile. Transparent parts take the colour of the background. Of an animation, only
    the first frame is used. 16-bit gray is scaled to 8 bits; floating-point gray must lie in [0, 1]
    and is scaled by 255. An sRGB image that already has the right size keeps its pixels. Any other
    size is resampled with an antialiasing filter (Lanczos), which does not extend the image at the
    edges.

    Args:
        data: The bytes of a file in one of `FORMATS`; or pixels, uint8 [H, W] or
            [H, W, C]: gray, gray and alpha, RGB, or RGBA.
        height: Height of the result in pixels.
        width: Width of the result in pixels.
        channels: 1 for grayscale, 3 for RGB.
        fit: "crop" covers the shape and cuts off the excess, evenly on both sides; "pad" fits the
            whole image inside and fills the rest, evenly on both sides, with black.
        background: "white" or "black".
        notes: A list to which a line is added if the colours cannot be converted and are left as
            they are.

    Returns:
        uint8 [height, width, channels].

    Raises:
        ImageError: The data are damaged, of another format, or too large to decode safely (more
            than `PIL.Image.MAX_IMAGE_PIXELS` pixels, which is checked before decoding).
    """
    image = _load(data, 2 * max(height, width), background, [] if notes is None else notes)
    image = _in_mode(image, "L" if channels == 1 else "RGB")
    image = _crop(image, (width, height)) if fit == "crop" else _pad(image, (width, height))
    return np.array(image).reshape(height, width, channels)


def encode_png(image: np.ndarray) -> bytes:
    """Returns an image as PNG bytes, which are always the same for the same image.

    Args:
        image: uint8 [height, width, channels] with 1 or 3 channels.
    """
    data = io.BytesIO()
    pixels = image[..., 0] if image.shape[-1] == 1 else image
    Image.fromarray(pixels).save(data, "PNG", compress_level=_COMPRESS_LEVEL)
    return data.getvalue()


def _load(
    data: bytes | np.ndarray, draft_side: int, background: str, notes: list[str]
) -> Image.Image:
    """Returns the image upright and opaque, with 8 bits per channel; raises ImageError."""
    try:
        image = _opened(data)
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError
        # JPEG can decode to 1/2, 1/4 or 1/8 of its size: much faster, and enough to resample.
        image.draft(None, (draft_side, draft_side))
        ImageOps.exif_transpose(image, in_place=True)
        return _flatten(_in_srgb(image, notes), background)
    except ImageError:
        raise
    # For damaged files, Pillow raises nearly anything: struct.error, SyntaxError, KeyError, ...
    except Exception as error:
        raise ImageError(_reason(error)) from error


def _opened(data: bytes | np.ndarray) -> Image.Image:
    if isinstance(data, bytes):
        if _jxl_pixels(data) > Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError
        return Image.open(io.BytesIO(data), formats=FORMATS)
    return Image.fromarray(data[..., 0] if data.ndim == 3 and data.shape[-1] == 1 else data)


# Start of a JPEG XL code stream: bare, or in one of two kinds of boxes; `jxlp` has a number first.
_JXL = re.compile(rb"\A\xff\x0a|(?:jxlc|jxlp....)\xff\x0a", re.DOTALL)
_JXL_RATIOS = (None, (1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))


def _jxl_pixels(data: bytes) -> int:
    """Returns the number of pixels of a JPEG XL file, or 0 for any other file.

    It is read from the header (ISO/IEC 18181-1, D.3), since the plugin decodes all pixels when it
    opens a file.
    """
    start = _JXL.search(data[: 2**16]) if data[:2] == b"\xff\x0a" or data[4:8] == b"JXL " else None
    if start is None:
        return 0
    bits, at = int.from_bytes(data[start.end() : start.end() + 16], "little"), 0

    def take(count):
        nonlocal at
        at += count
        return bits >> (at - count) & (2**count - 1)

    def side():
        return 8 * (take(5) + 1) if is_small else take((9, 13, 18, 30)[take(2)]) + 1

    is_small = take(1)
    height = side()
    ratio = _JXL_RATIOS[take(3)]
    return height * (height * ratio[0] // ratio[1] if ratio else side())


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"not an image in one of the formats {', '.join(FORMATS)}"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"more than {Image.MAX_IMAGE_PIXELS} pixels, the limit"
    text = str(error).partition("\n")[0]
    return "truncated file" if "truncated" in text.lower() else f"{type(error).__name__}: {text}"


def _in_srgb(image: Image.Image, notes: list[str]) -> Image.Image:
    """Returns the image converted to sRGB; one without a usable profile is taken to be in sRGB."""
    embedded = image.info.get("icc_profile")
    if not embedded:
        return image
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(embedded))
        # Converting from sRGB to sRGB would take time and cause rounding.
        if "sRGB" in (profile.profile.profile_description or ""):
            return image
        if image.mode in ("P", "PA"):
            image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        mode = "RGBA" if image.mode == "RGBA" else "RGB"
        return ImageCms.profileToProfile(image, profile, _SRGB, outputMode=mode)
    except (OSError, ImageCms.PyCMSError):
        notes.append(
            "the colour profile is damaged, or of another kind than the pixels, which are taken as "
            "they are"
        )
        return image


def _flatten(image: Image.Image, background: str) -> Image.Image:
    if image.mode == "F":
        return _scale_gray(np.asarray(image), top=1)
    if image.mode.startswith("I"):  # "I;16", "I;16B", and "I" for 16 bits in 32
        gray = _scale_gray(np.asarray(image), top=65535)
        if "transparency" in image.info:  # a transparent value, which Pillow ignores in this mode
            hole = Image.fromarray(np.asarray(image) == image.info["transparency"])
            gray.paste(255 if background == "white" else 0, mask=hole)
        return gray
    if image.has_transparency_data:
        layer = _in_mode(image, "RGBA")
        image = Image.new("RGB", image.size, background)
        image.paste(layer, mask=layer)
    return image if image.mode == "L" else _in_mode(image, "RGB")


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    # Pillow's `convert` copies the image even if it has the mode, and images may be large.
    return image if image.mode == mode else image.convert(mode)


def _scale_gray(values: np.ndarray, top: int) -> Image.Image:
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= top):
        raise ImageError(f"gray values from {low:g} to {high:g}, which is outside 0 to {top}")
    # Not Pillow's conversion to 8 bits, which clips.
    return Image.fromarray(np.rint(values * np.float32(255 / top)).astype(np.uint8))


def _crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return ImageOps.fit(image, size, Image.Resampling.LANCZOS)


def _pad(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    scale = min(size[0] / image.width, size[1] / image.height)
    inner = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    canvas = Image.new(image.mode, size, "black")
    corner = (size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2
    canvas.paste(image.resize(inner, Image.Resampling.LANCZOS), corner)
    return canvas
