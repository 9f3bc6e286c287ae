import io
import json
import os
import zipfile

import numpy as np
import pytest
from etils import epath
from PIL import Image

from vqbeam.configs import VqbeamError
from vqbeam.pipelines.sampling.api import Run
from vqbeam.pipelines.sampling.sample import check_checkpoint, read_provenance
from vqbeam.vqvae.figures import save_png
from vqbeam.vqvae.storage.run_folder import RunFolder


@pytest.fixture
def run(tmp_path, tiny_config):
    """A run with a file of a model for each stage, of `weights` and a date."""

    def make(name, weights=b"weights", date=b"today"):
        run = RunFolder(tmp_path / name)
        run.start(tiny_config())
        for stage in ("train-vqvae", "train-prior"):
            run.begin(stage)
            path = run.folder(stage) / "model.keras"
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("metadata.json", date)
                archive.writestr("model.weights.h5", weights)
            run.finish(stage, [path])
        return Run(run.root)

    return make


def test_a_checkpoint_is_its_weights(run):
    first = run("a").checkpoint
    assert len(first) == 16 and run("b", date=b"tomorrow").checkpoint == first
    assert run("c", weights=b"Weights").checkpoint != first


def test_another_checkpoint_is_refused(run):
    here, path = run("a"), epath.Path("x.png")
    facts = {"checkpoint": here.checkpoint, "preset": "fashion"}
    check_checkpoint(facts, here, path)
    other = run("b", weights=b"more")
    with pytest.raises(VqbeamError) as caught:
        check_checkpoint(facts, other, path)
    for part in ("x.png", facts["checkpoint"], "fashion", other.checkpoint, "tiny", "/b holds"):
        assert part in str(caught.value)


def save_array(path, text):
    np.savez(path, vqbeam=np.array(text), images=np.zeros((1, 4, 4, 1), np.uint8))


def save_picture(path, text):
    save_png(Image.new("L", (2, 2)), path, {"vqbeam": text})


@pytest.mark.parametrize("name,save", [("a.png", save_picture), ("a.npz", save_array)])
def test_reads_what_is_written(tmp_path, name, save):
    facts = {"checkpoint": "01", "preset": "p", "seed": 0, "images": [{"index": 3, "name": "é"}]}
    save(epath.Path(tmp_path / name), json.dumps(facts))
    assert read_provenance(epath.Path(tmp_path / name)) == facts


def without_text():
    data = io.BytesIO()
    Image.new("L", (2, 2)).save(data, "PNG")
    return data.getvalue()


def photo():
    data = io.BytesIO()
    Image.new("L", (2, 2)).save(data, "JPEG")
    return data.getvalue()


def other_arrays():
    data = io.BytesIO()
    np.savez(data, images=np.zeros(3))
    return data.getvalue()


@pytest.mark.parametrize(
    "data", [b"", b"no image", b"PK no archive", without_text(), photo(), other_arrays()]
)
def test_files_that_do_not_say(tmp_path, data):
    (tmp_path / "x.png").write_bytes(data)
    with pytest.raises(
        VqbeamError, match="x.png does not hold the settings of its images; give a .png"
    ):
        read_provenance(epath.Path(tmp_path / "x.png"))


def test_a_grid_larger_than_pillow_opens(tmp_path, monkeypatch):
    save_picture(epath.Path(tmp_path / "x.png"), '{"checkpoint": "01", "images": []}')
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)
    with pytest.raises(VqbeamError, match="does not hold the settings of its images"):
        read_provenance(epath.Path(tmp_path / "x.png"))


RIGHT = {"checkpoint": "01", "preset": "p", "seed": 0, "images": [{"index": 0}, {"index": 1}]}


def test_what_the_wrong_texts_are_made_of_is_right(tmp_path):
    save_png(Image.new("L", (8, 4)), epath.Path(tmp_path / "x.png"), {"vqbeam": json.dumps(RIGHT)})
    assert read_provenance(epath.Path(tmp_path / "x.png")) == RIGHT


@pytest.mark.parametrize(
    "facts",
    [
        [],
        7,
        {"seed": 1, "index": 2},
        {"checkpoint": "01"},
        *(RIGHT | {"checkpoint": one} for one in (None, 7, [], {})),
        *(RIGHT | {"preset": one} for one in (None, 7)),
        *(RIGHT | {"seed": one} for one in (None, "1", 1.5, True, -1)),
        *(RIGHT | {"images": one} for one in (None, [], {}, "ab", [7], [{}], [[]], 9)),
        *(RIGHT | {"images": [{"index": i}]} for i in (None, -1, "0", 1.0, 2**64, [0])),
        RIGHT | {"images": [{"index": 0}, {"index": 2}]},
        RIGHT | {"images": [{"index": i} for i in range(300_000)]},  # all would be sampled
    ],
)
def test_text_of_another_kind(tmp_path, facts):
    path = epath.Path(tmp_path / "x.png")
    save_png(Image.new("L", (8, 4)), path, {"vqbeam": json.dumps(facts)})
    with pytest.raises(VqbeamError, match="x.png does not hold the settings of its images"):
        read_provenance(path)


@pytest.mark.parametrize("facts", ["[" * 100_000, "", "{", '{"seed": ' + "9" * 5000 + "}"])
def test_text_that_is_no_json(tmp_path, facts):
    save_picture(epath.Path(tmp_path / "x.png"), facts)
    with pytest.raises(VqbeamError, match="does not hold the settings of its images"):
        read_provenance(epath.Path(tmp_path / "x.png"))


def test_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "x.png")  # would be waited for without end
    with pytest.raises(VqbeamError, match="does not hold the settings of its images"):
        read_provenance(epath.Path(tmp_path / "x.png"))


def test_no_file(tmp_path):
    with pytest.raises(VqbeamError, match="there is no file .*gone.png"):
        read_provenance(epath.Path(tmp_path / "gone.png"))
