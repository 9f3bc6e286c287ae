import json
import os

import numpy as np
import pytest
from etils import epath
from pipeline_fixtures import png

from vqbeam.configs import VqbeamError
from vqbeam.pipelines.sampling.input_images import image_files, read_image
from vqbeam.vqvae.figures import PROVENANCE, picture, save_png


@pytest.fixture
def folder(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    for name in ("b.png", "a/c.PNG", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png(image))
    return epath.Path(tmp_path), image


def test_a_folder_or_one_image(folder):
    path, _ = folder
    assert image_files(path) == {"a/c.PNG": path / "a" / "c.PNG", "b.png": path / "b.png"}
    assert image_files(path / "b.png") == {"b.png": path / "b.png"}


def test_no_image(folder, tmp_path):
    path, _ = folder
    (tmp_path / "empty").mkdir()
    with pytest.raises(VqbeamError, match="the folder .*empty holds no image; check --input"):
        image_files(path / "empty")
    with pytest.raises(VqbeamError, match="there is no file or folder .*gone; check --input"):
        image_files(path / "gone")
    odd = epath.Path(os.fsdecode(os.fsencode(path) + b"/\xff.png"))
    odd.write_bytes(b"")
    with pytest.raises(VqbeamError, match="the file name .* is not valid UTF-8; rename it"):
        image_files(odd)


def test_read_as_the_run_prepares(folder, tiny_config):
    path, image = folder
    config = tiny_config(data__channels=3)
    np.testing.assert_array_equal(read_image(path / "b.png", config), image)
    assert read_image(path / "b.png", tiny_config()).shape == (8, 8, 1)
    own = {"checkpoint": "x", "index": 3}  # a single sample is an image like others
    save_png(picture(image), path / "b.png", {PROVENANCE: json.dumps(own)})
    np.testing.assert_array_equal(read_image(path / "b.png", config), image)
    save_png(picture(image), path / "b.png", {PROVENANCE: json.dumps({"images": [own]})})
    with pytest.raises(VqbeamError, match="b.png is a grid of many samples; give a single image"):
        read_image(path / "b.png", config)
    (path / "b.png").write_bytes(b"no image")
    with pytest.raises(VqbeamError, match="b.png cannot be used .*; give another image"):
        read_image(path / "b.png", config)
