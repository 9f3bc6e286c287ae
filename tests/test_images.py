import contextlib
import io
import struct
import warnings

import numpy as np
import pytest
from PIL import Image
from pipeline_fixtures import png_chunk

from vqbeam.pipelines.sources import images


def _file(image, format, **options):
    data = io.BytesIO()
    image.save(data, format, **options)
    return data.getvalue()


def _pixels(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def _decode(data, height, width, channels=3, fit="crop", **more):
    shape = dict(height=height, width=width, channels=channels)
    image = images.decode_image(data, **shape, fit=fit, **more)
    assert image.shape == (height, width, channels)
    assert image.dtype == np.uint8
    return image


def _png_header(width, height):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", b""), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


@pytest.mark.parametrize(
    ("format", "options"),
    [("PNG", {}), ("BMP", {}), ("TIFF", {}), ("WEBP", {"lossless": True})],
)
@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_image_of_the_right_size_keeps_its_pixels(format, options, fit):
    pixels = _pixels(9, 7, 3)
    data = _file(Image.fromarray(pixels), format, **options)
    np.testing.assert_array_equal(_decode(data, 9, 7, fit=fit), pixels)


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_gray_keeps_its_pixels_in_one_channel_and_in_three(fit):
    pixels = _pixels(9, 7)
    data = _file(Image.fromarray(pixels), "PNG")
    np.testing.assert_array_equal(_decode(data, 9, 7, 1, fit)[..., 0], pixels)
    np.testing.assert_array_equal(_decode(data, 9, 7, 3, fit), np.stack([pixels] * 3, axis=-1))


def test_colour_becomes_gray_by_brightness():
    pixels = _pixels(9, 7, 3)
    expected = pixels @ np.array([0.299, 0.587, 0.114])
    gray = _decode(_file(Image.fromarray(pixels), "PNG"), 9, 7, 1)[..., 0]
    np.testing.assert_allclose(gray, expected, atol=0.51)


def test_jpeg_of_the_right_size_is_not_resampled():
    data = _file(Image.fromarray(_pixels(32, 32, 3)), "JPEG")
    np.testing.assert_array_equal(_decode(data, 32, 32), np.asarray(Image.open(io.BytesIO(data))))


def test_large_jpeg_loses_nothing_by_fast_decoding():
    coarse = Image.fromarray(_pixels(6, 8, 3))
    image = coarse.resize((800, 600), Image.Resampling.BICUBIC)
    data = _file(image, "JPEG", quality=95)
    exact = Image.open(io.BytesIO(data)).resize((40, 30), Image.Resampling.LANCZOS)
    np.testing.assert_allclose(_decode(data, 30, 40), np.asarray(exact).astype(int), atol=3)


def test_cmyk_jpeg_as_adobe_writes_it():
    # Pillow, like Adobe's programs, stores CMYK JPEG inverted, with the marker that says so.
    data = _file(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100)
    assert b"Adobe" in data
    np.testing.assert_allclose(_decode(data, 8, 8), np.full((8, 8, 3), (255, 0, 0)), atol=3)


def test_cmyk_tiff():
    data = _file(Image.new("CMYK", (2, 2), (255, 0, 0, 0)), "TIFF")
    np.testing.assert_array_equal(_decode(data, 2, 2)[0, 0], (0, 255, 255))


WIDE_GRAY = np.array([[0, 65535, 257], [1000, 32768, 40000]])


@pytest.mark.parametrize(
    ("mode", "dtype", "format"),
    [
        ("I;16", "<u2", "PNG"),
        ("I;16", "<u2", "TIFF"),
        ("I;16B", ">u2", "TIFF"),
        ("I", "<i4", "TIFF"),
    ],
)
def test_16_bit_gray_is_scaled_not_clipped(mode, dtype, format):
    image = Image.frombytes(mode, (3, 2), WIDE_GRAY.astype(dtype).tobytes())
    data = _file(image, format)
    assert Image.open(io.BytesIO(data)).mode == mode
    gray = _decode(data, 2, 3, 1)[..., 0]
    np.testing.assert_array_equal(gray, np.rint(WIDE_GRAY / 257))
    assert (gray[0, 0], gray[0, 1], gray[0, 2]) == (0, 255, 1)


def test_gray_beyond_16_bits_is_refused():
    data = _file(Image.fromarray(np.array([[0, 65536]], np.int32)), "TIFF")
    with pytest.raises(images.ImageError, match="from 0 to 65536, which is outside 0 to 65535"):
        _decode(data, 1, 2)


def test_float_gray_is_scaled_by_255():
    values = np.array([[0, 0.5, 1], [0.1, 0.25, 0.9]], np.float32)
    gray = _decode(_file(Image.fromarray(values), "TIFF"), 2, 3, 1)[..., 0]
    np.testing.assert_array_equal(gray, np.rint(values * 255))


@pytest.mark.parametrize("value", [-0.1, 1.1, np.nan])
def test_float_gray_outside_0_to_1_is_refused(value):
    data = _file(Image.fromarray(np.array([[0.5, value]], np.float32)), "TIFF")
    with pytest.raises(images.ImageError, match="outside 0 to 1"):
        _decode(data, 1, 2)


def test_alpha_is_composited_on_white():
    pixels = _pixels(9, 7, 4)
    colour, alpha = pixels[..., :3].astype(int), pixels[..., 3:].astype(int)
    expected = np.rint((colour * alpha + 255 * (255 - alpha)) / 255)
    np.testing.assert_array_equal(_decode(_file(Image.fromarray(pixels), "PNG"), 9, 7), expected)


def test_gray_with_alpha():
    pixels = np.array([[[0, 255], [0, 0], [100, 51]]], np.uint8)
    gray = _decode(_file(Image.fromarray(pixels, "LA"), "PNG"), 1, 3, 1)
    # 0.2 · 100 + 0.8 · 255 = 224
    np.testing.assert_array_equal(gray[0, :, 0], (0, 255, 224))


@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_palette(format):
    image = Image.fromarray(np.array([[0, 1], [2, 0]], np.uint8), "P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    expected = [[(10, 20, 30), (40, 50, 60)], [(70, 80, 90), (10, 20, 30)]]
    np.testing.assert_array_equal(_decode(_file(image, format), 2, 2), expected)


@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_transparent_palette_entry_becomes_white(format):
    image = Image.fromarray(np.array([[0, 1], [2, 0]], np.uint8), "P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    expected = [[(10, 20, 30), (255, 255, 255)], [(70, 80, 90), (10, 20, 30)]]
    np.testing.assert_array_equal(_decode(_file(image, format, transparency=1), 2, 2), expected)


def test_transparent_value_of_16_bit_gray():
    data = _file(Image.fromarray(np.array([[0, 257, 65535]], np.uint16)), "PNG", transparency=257)
    assert b"tRNS" in data
    np.testing.assert_array_equal(_decode(data, 1, 3, 1)[..., 0], [[0, 255, 255]])


def test_black_and_white():
    data = _file(Image.fromarray(np.array([[True, False]])), "PNG")
    np.testing.assert_array_equal(_decode(data, 1, 2, 1)[..., 0], [[255, 0]])


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda a: a),
        (2, np.fliplr),
        (3, lambda a: np.rot90(a, 2)),
        (4, np.flipud),
        (5, lambda a: a.transpose(1, 0, 2)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: np.rot90(a, 2).transpose(1, 0, 2)),
        (8, np.rot90),
    ],
)
def test_exif_orientation(orientation, upright):
    pixels = _pixels(3, 5, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    expected = upright(pixels)
    image = _decode(_file(Image.fromarray(pixels), "PNG", exif=exif), *expected.shape[:2])
    np.testing.assert_array_equal(image, expected)


def test_exif_orientation_of_a_jpeg():
    # The stored first row is black; orientation 6 makes it the last column.
    pixels = np.full((16, 32, 3), 255, np.uint8)
    pixels[:8] = 0
    exif = Image.Exif()
    exif[0x0112] = 6
    image = _decode(_file(Image.fromarray(pixels), "JPEG", quality=100, exif=exif), 32, 16)
    assert image[:, :8].min() > 250
    assert image[:, 8:].max() < 5


def test_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    data = _file(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(data)).n_frames == 3
    np.testing.assert_array_equal(_decode(data, 4, 4), np.full((4, 4, 3), (255, 0, 0)))


def test_downscaling_keeps_constant_areas():
    pixels = np.kron(np.array([[10, 200]], np.uint8), np.ones((64, 32), np.uint8))
    gray = _decode(_file(Image.fromarray(pixels), "PNG"), 32, 32, 1)[..., 0]
    # A Lanczos window reaches three pixels of the result to each side.
    np.testing.assert_array_equal(gray[:, :13], 10)
    np.testing.assert_array_equal(gray[:, 19:], 200)


def test_downscaling_is_antialiased():
    checkers = (np.indices((128, 128)).sum(axis=0) % 2 * 255).astype(np.uint8)
    gray = _decode(_file(Image.fromarray(checkers), "PNG"), 16, 16, 1)
    np.testing.assert_allclose(gray, 127.5, atol=1.5)


@pytest.mark.parametrize("shape", [(6, 10), (10, 6)])
def test_crop_keeps_the_centre(shape):
    pixels = _pixels(*shape, 3)
    top, left = (shape[0] - 6) // 2, (shape[1] - 6) // 2
    image = _decode(_file(Image.fromarray(pixels), "PNG"), 6, 6)
    np.testing.assert_array_equal(image, pixels[top : top + 6, left : left + 6])


def test_pad_fills_with_black_on_both_sides():
    image = _decode(_file(Image.new("RGB", (64, 32), (9, 99, 199)), "PNG"), 32, 32, fit="pad")
    assert not image[:8].any()
    np.testing.assert_array_equal(image[8:24], np.full((16, 32, 3), (9, 99, 199)))
    assert not image[24:].any()


@pytest.mark.parametrize("fit", ["crop", "pad"])
@pytest.mark.parametrize("size", [(1000, 1), (1, 1000), (1, 1)])
def test_extreme_shapes(size, fit):
    image = _decode(_file(Image.new("RGB", size, "white"), "PNG"), 8, 8, fit=fit)
    assert (image == 255).all(axis=-1).sum() == (8 if fit == "pad" and size != (1, 1) else 64)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "BMP", "TIFF", "GIF"])
def test_truncated_file(format):
    data = _file(Image.fromarray(_pixels(32, 32, 3)), format)
    with pytest.raises(images.ImageError, match="^truncated file$"):
        _decode(data[: len(data) * 3 // 4], 32, 32)


def test_truncated_webp():
    data = _file(Image.fromarray(_pixels(32, 32, 3)), "WEBP")
    with pytest.raises(images.ImageError):
        _decode(data[: len(data) // 2], 32, 32)


@pytest.mark.parametrize("data", [b"", b"hello", b"P5 1 1 255\n\0"])
def test_not_an_image(data):
    # The last is a PGM file: Pillow could read it, but it is not one of FORMATS.
    with pytest.raises(images.ImageError, match="^not an image"):
        _decode(data, 8, 8)


@pytest.mark.parametrize("format", ["AVIF", "HEIF", "JXL"])
def test_formats_of_telephones_and_the_web(format):
    colour = Image.new("RGB", (24, 16), (200, 40, 90))
    shown = _decode(_file(colour, format), 16, 24)
    np.testing.assert_allclose(shown.reshape(-1, 3).mean(0), (200, 40, 90), atol=4)


@pytest.mark.parametrize("in_boxes", [False, True])
@pytest.mark.parametrize(
    "size", [(8, 8), (5, 7), (16, 9), (12, 10), (300, 200), (513, 4), (8192, 3)]
)
def test_pixels_in_the_header_of_jpeg_xl(size, in_boxes):
    data = _file(Image.new("RGB", size), "JXL", use_container=in_boxes)
    assert images._jxl_pixels(data) == size[0] * size[1]
    assert images._jxl_pixels(b"no " + data) == 0


@pytest.mark.parametrize("format", ["AVIF", "HEIF", "JXL"])
def test_too_large_in_the_header_of_newer_formats(format, monkeypatch):
    data = _file(Image.new("RGB", (64, 64)), format)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 - 1)
    with pytest.raises(images.ImageError, match="^more than [0-9]+ pixels, the limit$"):
        _decode(data, 8, 8)


@pytest.mark.parametrize("size", [(0, 8), (8, 0)])
def test_side_of_0_is_refused(size):
    with pytest.raises(images.ImageError):
        _decode(_png_header(*size), 8, 8)


def test_too_large_is_seen_in_the_header():
    with pytest.raises(images.ImageError, match="^more than [0-9]+ pixels, the limit$"):
        _decode(_png_header(100_000, 100_000), 8, 8)


# Pillow itself warns above the limit and raises only above twice the limit.
@pytest.mark.parametrize("action", ["ignore", "error"])
@pytest.mark.parametrize(("side", "fails"), [(10, False), (11, True), (20, True)])
def test_limit_is_exact(monkeypatch, side, fails, action):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    data = images.encode_png(_pixels(side, side, 3))
    outcome = contextlib.nullcontext()
    if fails:
        outcome = pytest.raises(images.ImageError, match="more than 100 pixels")
    with warnings.catch_warnings(), outcome:
        warnings.simplefilter(action)
        _decode(data, side, side)


def test_reason_is_one_line():
    damaged = bytearray(images.encode_png(_pixels(32, 32, 3)))
    damaged[60] ^= 0xFF
    with pytest.raises(images.ImageError) as caught:
        _decode(bytes(damaged), 32, 32)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("channels", [1, 3])
def test_png_round_trip(channels):
    pixels = _pixels(10, 14, channels)[1:, ::2]
    data = images.encode_png(pixels)
    assert data == images.encode_png(pixels.copy())
    np.testing.assert_array_equal(_decode(data, 9, 7, channels), pixels)


# Chromaticities of the primaries, of Adobe RGB (1998) and of Display P3, adapted to D50.
ADOBE = [[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]]
P3 = [[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]]
SRGB = [[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]]


def icc_profile(space, matrix=(), gamma=2.2, name=b"other"):
    """A minimal ICC profile, version 2: a gamma, and for "RGB " the XYZ of the primaries.

    For "CMYK" it has a table instead: each ink takes its share of `DARKNESS` from the lightness.
    """

    def numbers(kind, values):
        fixed = (round(value * 65536) for value in values)
        return kind + bytes(4) + b"".join(struct.pack(">i", value) for value in fixed)

    described = b"desc" + bytes(4) + struct.pack(">I", len(name) + 1) + name + bytes(79)
    curve = b"curv" + bytes(4) + struct.pack(">IHH", 1, round(gamma * 256), 0)
    tags = {b"desc": described, b"wtpt": numbers(b"XYZ ", [0.9642, 1, 0.8249])}
    tags |= {b"cprt": b"text" + bytes(8)}
    if space == b"GRAY":
        tags[b"kTRC"] = curve
    elif space == b"CMYK":
        same, inks = bytes(range(256)), np.stack(np.meshgrid(*[(0, 1)] * 4, indexing="ij"), -1)
        light = np.maximum(0, 255 - 255 * inks.reshape(16, 4) @ DARKNESS).round()
        nodes = np.stack([light, light * 0 + 128, light * 0 + 128], -1).astype(np.uint8)
        matrix = struct.pack(">9i", *(65536 * np.eye(3, dtype=int)).ravel())
        table = matrix + same * 4 + nodes.tobytes() + same * 3
        tags[b"A2B0"] = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + table
    else:
        tags |= {
            letter + b"XYZ": numbers(b"XYZ ", column)
            for letter, column in zip((b"r", b"g", b"b"), np.transpose(matrix), strict=True)
        }
        tags |= {letter + b"TRC": curve for letter in (b"r", b"g", b"b")}
    place, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for tag, value in tags.items():
        value += bytes(-len(value) % 4)
        table += tag + struct.pack(">II", place + len(body), len(value))
        body += value
    header = struct.pack(">I4xI", place + len(body), 0x02400000)
    header += b"prtrCMYKLab " if space == b"CMYK" else b"mntr" + space + b"XYZ "
    header += bytes(12) + b"acsp" + bytes(28) + struct.pack(">iii", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def in_srgb(pixels, matrix, gamma=2.2):
    """The same colours in sRGB, by the definition of both spaces."""
    linear = (pixels / 255.0) ** gamma
    linear = linear @ np.transpose(matrix) @ np.linalg.inv(np.transpose(SRGB))
    linear = np.clip(linear, 0, 1)
    encoded = np.where(linear < 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return 255 * encoded


@pytest.mark.parametrize("matrix", [ADOBE, P3], ids=["adobe", "p3"])
@pytest.mark.parametrize("alpha", [False, True])
def test_colours_of_a_profile_become_those_of_srgb(matrix, alpha):
    pixels = np.random.default_rng(0).integers(60, 200, (16, 16, 3), np.uint8)
    image = Image.fromarray(pixels)
    if alpha:
        image.putalpha(255)
    data = _file(image, "PNG", icc_profile=icc_profile(b"RGB ", matrix))
    found, expected = _decode(data, 16, 16), in_srgb(pixels, matrix)
    assert np.abs(found - expected).max() < 3
    assert np.abs(pixels - expected).max() > 15  # as they would be without the profile


DARKNESS = [0.5, 0.3, 0.1, 1.0]


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_inks_have_the_colours_of_their_profile(format):
    for ink, share in enumerate([*DARKNESS, 0]):
        amounts = [255 if ink == index else 0 for index in range(4)]
        image = Image.new("CMYK", (16, 16), tuple(amounts))
        data = _file(image, format, icc_profile=icc_profile(b"CMYK"))
        # Gray of this lightness in CIELAB: its luminance, as sRGB encodes it.
        light = (100 * (1 - share) + 16) / 116
        luminance = light**3 if light > 6 / 29 else 3 * (6 / 29) ** 2 * (light - 4 / 29)
        expected = in_srgb(np.full((16, 16, 3), 255 * luminance), SRGB, gamma=1)
        assert np.abs(_decode(data, 16, 16) - expected).max() < 4, ink
    without = _decode(_file(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "TIFF"), 16, 16)
    assert without[0, 0].tolist() == [0, 255, 255]


def test_gray_and_palette_have_profiles_too():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    data = _file(Image.fromarray(levels), "PNG", icc_profile=icc_profile(b"GRAY", gamma=1.6))
    expected = in_srgb(np.repeat(levels[..., None], 3, axis=-1), SRGB, gamma=1.6)
    assert np.abs(_decode(data, 16, 16) - expected).max() < 3
    assert np.abs(_decode(data, 16, 16, channels=1)[..., 0] - expected[..., 0]).max() < 3
    image = Image.fromarray(levels).convert("P")
    data = _file(image, "PNG", icc_profile=icc_profile(b"RGB ", ADOBE))
    shown = np.asarray(image.convert("RGB"))
    assert np.abs(_decode(data, 16, 16) - in_srgb(shown, ADOBE)).max() < 3


@pytest.mark.parametrize(
    "profile, is_told",
    [
        (b"broken", True),
        (icc_profile(b"GRAY"), True),  # of another kind than the pixels
        (icc_profile(b"RGB ", P3, name=b"sRGB IEC61966-2.1"), False),  # sRGB, by its name
    ],
    ids=["broken", "gray", "srgb"],
)
def test_pixels_stay_where_a_profile_says_nothing(profile, is_told):
    pixels, notes = _pixels(16, 16, 3), []
    data = _file(Image.fromarray(pixels), "PNG", icc_profile=profile)
    np.testing.assert_array_equal(_decode(data, 16, 16, notes=notes), pixels)
    assert [note[:37] for note in notes] == ["the colour profile is damaged, or of "] * is_told
