import io
import json
import os
import pathlib
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image
from pipeline_fixtures import png, png_chunk, read_keys, run_transform, small_config

from vqbeam.pipelines.stages.prepare import DEAD_LETTERS, STAGE, PrepareImages
from vqbeam.vqvae.storage.run_folder import RunFolder

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parent.parent


def flat_png(width, height, kind=2, extra=b""):
    """A PNG of one colour, which takes few bytes at any size."""
    row = bytes(1 + width * {0: 1, 2: 3, 6: 4}[kind])
    packer = zlib.compressobj(1)
    data = b"".join([*(packer.compress(row) for _ in range(height)), packer.flush()])
    header = struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)
    parts = [png_chunk(b"IHDR", header), extra, png_chunk(b"IDAT", data), png_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def inflated(kind, name):
    """A chunk whose 200 KB in the file expand to 200 MB in memory."""
    return png_chunk(kind, name + zlib.compress(bytes(200_000_000), 9))


def with_exif(exif):
    """A JPEG with these EXIF data."""
    data = io.BytesIO()
    Image.fromarray(np.full((16, 16, 3), 99, np.uint8)).save(data, "JPEG", exif=exif)
    return data.getvalue()


def tiff_that_claims(side):
    """A TIFF of 4×4 pixels whose header says that it has `side` in each direction."""
    data = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(data, "TIFF")
    return data.getvalue().replace(struct.pack("<I", 4), struct.pack("<I", side))


# What is refused, with the reason; and what is strange but an image.
REFUSED = {
    "bomb.png": (lambda: flat_png(20_000, 20_000), "more than 89478485 pixels, the limit"),
    "text.png": (lambda: flat_png(8, 8, extra=inflated(b"zTXt", b"a\0\0")), "ValueError: "),
    "claims.tif": (lambda: tiff_that_claims(60_000), "more than 89478485 pixels, the limit"),
    "profile.png": (lambda: flat_png(8, 8, extra=inflated(b"iCCP", b"a\0\0")), "ValueError: "),
}
TAKEN = {
    "wide.png": lambda: flat_png(60_000, 1),
    "tall.png": lambda: flat_png(1, 60_000),
    "exif.jpg": lambda: with_exif(b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12\0\x03"),
    "largest.png": lambda: flat_png(9459, 9459, kind=6),
    "good.png": lambda: png(np.full((8, 8, 3), 7, np.uint8)),
    "other.png": lambda: png(np.full((8, 8, 3), 8, np.uint8)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harmful")
    for name, (make, _) in REFUSED.items():
        (folder / name).write_bytes(make())
    for name, make in TAKEN.items():
        (folder / name).write_bytes(make())
    return folder


MEASURE = """
import pathlib, sys, time
from vqbeam.pipelines.sources.images import ImageError, decode_image

def peak():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))

data = pathlib.Path(sys.argv[1]).read_bytes()
before, start = peak(), time.process_time()
try:
    said = str(decode_image(data, height=32, width=32, channels=3, fit=sys.argv[2]).shape)
except ImageError as error:
    said = str(error)
print(said, (peak() - before) // 1024, time.process_time() - start, sep="|")
"""


# To crop and to pad differ for what is large, or long in one direction.
CASES = [(name, "crop") for name in (*REFUSED, *TAKEN) if name != "other.png"]
CASES += [(name, "pad") for name in ("wide.png", "tall.png", "largest.png")]


@pytest.mark.system
@pytest.mark.parametrize(("name", "fit"), CASES)
def test_memory_and_time_are_bounded(folder, name, fit):
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder / name), fit],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    said, megabytes, seconds = done.stdout.split("|")
    assert REFUSED[name][1] in said if name in REFUSED else said == "(32, 32, 3)"
    # The largest image that is taken has 89 million pixels of four bytes.
    assert int(megabytes) < (900 if name == "largest.png" else 100)
    assert float(seconds) < 10  # of processor time; the largest takes about one


def test_they_become_dead_letters_and_the_rest_is_prepared(folder, tmp_path):
    run = RunFolder(tmp_path / "run")
    run.start(small_config(f"folder:{folder}", data__max_failed=0.9))
    run_transform(PrepareImages(), run)
    letters = (run.folder(STAGE) / DEAD_LETTERS).read_text().splitlines()
    assert {json.loads(line)["key"] for line in letters} == set(REFUSED)
    assert sorted(read_keys(run.folder(STAGE))) == sorted(TAKEN)
