import json

import numpy as np
import pytest
from etils import epath
from PIL import Image

from vqbeam.configs import VqbeamError
from vqbeam.pipelines.sampling.api import Samples
from vqbeam.pipelines.sampling.sample import write_samples

SETTINGS = {"preset": "tiny", "checkpoint": "0123", "seed": 4}


@pytest.fixture
def samples():
    images = np.arange(2 * 4 * 4, dtype=np.uint8).reshape(2, 4, 4, 1)
    codes = np.array([[[3]], [[7]]])
    return Samples(images, codes, np.array([1, 0]), ["é", "a"], SETTINGS, first=5)


def text_of(path):
    with Image.open(path) as image:
        return json.loads(image.text["vqbeam"])


def test_a_folder(samples, tmp_path):
    write_samples(samples, epath.Path(tmp_path / "out"))
    lines = (tmp_path / "out" / "samples.jsonl").read_text().splitlines()
    own = [{"index": 5, "label": 1, "name": "é"}, {"index": 6, "label": 0, "name": "a"}]
    assert len(lines) == len(own)
    for row, line in enumerate(lines):
        name = f"{5 + row:05d}.png"
        assert json.loads(line) == {"file": name} | SETTINGS | own[row]
        assert text_of(tmp_path / "out" / name) == SETTINGS | own[row]
        with Image.open(tmp_path / "out" / name) as image:
            np.testing.assert_array_equal(np.asarray(image), samples.images[row, ..., 0])


def test_a_grid_and_arrays_say_it_of_each_image(samples, tmp_path):
    for name in ("grid.png", "arrays.npz"):
        write_samples(samples, epath.Path(tmp_path / "new" / name))
    facts = text_of(tmp_path / "new" / "grid.png")
    images = facts.pop("images")
    assert facts == SETTINGS
    assert images[0] == {"index": 5, "label": 1, "name": "é"} and images[1]["index"] == 6
    with np.load(tmp_path / "new" / "arrays.npz") as arrays:
        np.testing.assert_array_equal(arrays["images"], samples.images)
        np.testing.assert_array_equal(arrays["codes"], samples.codes)
        assert arrays["labels"].tolist() == [1, 0]
        assert json.loads(str(arrays["vqbeam"])) == SETTINGS | {"images": images}


def test_one_picture_pixel_for_pixel(samples, tmp_path):
    write_samples(samples, epath.Path(tmp_path / "one.png"), bare=True)
    with Image.open(tmp_path / "one.png") as image:
        np.testing.assert_array_equal(np.asarray(image), samples.images[0, ..., 0])
    assert text_of(tmp_path / "one.png")["index"] == 5


def test_without_classes_there_are_no_labels(samples, tmp_path):
    plain = Samples(samples.images, samples.codes, np.full(2, -1), None, SETTINGS)
    write_samples(plain, epath.Path(tmp_path / "out"))
    assert text_of(tmp_path / "out" / "00001.png") == SETTINGS | {"index": 1}


def test_no_picture_of_before_is_left(samples, tmp_path):
    folder = epath.Path(tmp_path / "out")
    write_samples(samples, folder)
    others = {"mine.png", "2026-trip.png", "00001-larger.png"}
    for name in others:
        (folder / name).write_text("another's")
    one = Samples(samples.images[:1], samples.codes[:1], samples.labels[:1], ["é"], SETTINGS, 9)
    write_samples(one, folder)
    assert {path.name for path in folder.iterdir()} == others | {"00009.png", "samples.jsonl"}
    assert all((folder / name).read_text() == "another's" for name in others)


def test_what_is_killed_while_it_removes_those_of_before(samples, tmp_path, monkeypatch):
    folder = epath.Path(tmp_path / "out")
    write_samples(samples, folder)
    one = Samples(samples.images[:1], samples.codes[:1], samples.labels[:1], ["é"], SETTINGS, 9)
    with monkeypatch.context() as patch:
        unlink = type(folder).unlink

        def killed(path, missing_ok=False):
            if path.name == "00006.png":
                raise KeyboardInterrupt
            unlink(path, missing_ok)

        patch.setattr(type(folder), "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            write_samples(one, folder)
    # It is not taken for whole.
    assert not (folder / "samples.jsonl").exists() and (folder / "00006.png").exists()
    write_samples(one, folder)
    assert {path.name for path in folder.iterdir()} == {"00009.png", "samples.jsonl"}


def test_a_list_that_names_files_elsewhere_removes_none(samples, tmp_path):
    (tmp_path / "mine.png").write_text("another's")
    (tmp_path / "out").mkdir()
    lines = [json.dumps({"file": name}) for name in ("../mine.png", str(tmp_path / "mine.png"))]
    (tmp_path / "out" / "samples.jsonl").write_text("\n".join(lines))
    write_samples(samples, epath.Path(tmp_path / "out"))
    assert (tmp_path / "mine.png").read_text() == "another's"


@pytest.mark.parametrize("line", ["no JSON", "{}", "[]"])
def test_a_list_that_is_none(samples, tmp_path, line):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "samples.jsonl").write_text(f"{line}\n")
    with pytest.raises(VqbeamError, match="out/.samples.jsonl.old does not list .*; delete it, or"):
        write_samples(samples, epath.Path(tmp_path / "out"))
