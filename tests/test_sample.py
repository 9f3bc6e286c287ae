import json
import shutil

import numpy as np
import pytest
from etils import epath
from PIL import Image
from pipeline_fixtures import CLASSES, SIDE, small_config

from configs import VqbeamError
from pipelines import sample as sample_module
from pipelines.sample import Samples, sample, sample_stage, write_samples
from vqvae.building import build_model
from vqvae.run_folder import RunFolder
from vqvae.training import load_vqvae

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def draw(finished_run, tmp_path_factory):
    """Draws into an .npz file and returns its arrays; what was drawn before is kept."""
    path = tmp_path_factory.mktemp("samples") / "samples.npz"
    drawn = {}

    def draw(**settings):
        key = repr(settings)
        if key not in drawn:
            sample(str(finished_run.root), output=str(path), **settings)
            with np.load(path) as arrays:
                drawn[key] = dict(arrays)
        return drawn[key]

    return draw


def test_arrays(draw, finished_run):
    # Seven images in batches of three, as the run's config says.
    arrays = draw()
    assert arrays["images"].shape == (7, SIDE, SIDE, 3) and arrays["images"].dtype == np.uint8
    assert arrays["codes"].shape == (7, 2, 2)
    assert arrays["codes"].min() >= 0 and arrays["codes"].max() < 12
    assert arrays["labels"].tolist() == [0, 1, 2, 0, 1, 2, 0]
    decoded = np.asarray(load_vqvae(finished_run).decode(arrays["codes"]))
    # A compiled decoder may round a pixel in another way.
    assert np.abs(decoded.astype(int) - arrays["images"]).max() <= 1


@pytest.mark.parametrize(
    "settings", [dict(vqvae__quantizer="residual", vqvae__depth=2), dict(vqvae__grids=2)]
)
def test_codes_of_several_levels_are_decoded(settings, monkeypatch):
    model = build_model(small_config("glyphs", **settings), data_variance=1.0)
    monkeypatch.setattr(sample_module, "load_vqvae", lambda run: model)
    codes = np.random.default_rng(0).integers(12, size=(5, *model.layout.shape), dtype="int32")
    images = sample_module._decode(None, codes, batch_size=3)
    assert images.shape == (5, SIDE, SIDE, 3) and images.dtype == np.uint8
    # A compiled decoder may round a pixel in another way.
    assert np.abs(np.asarray(model.decode(codes)).astype(int) - images).max() <= 1


def test_image_i_of_a_seed_is_always_the_same(draw):
    first, larger = draw(seed=3), draw(seed=3, num=10, batch_size=4)
    np.testing.assert_array_equal(larger["codes"][:7], first["codes"])
    np.testing.assert_array_equal(larger["images"][:7], first["images"])
    # The run's own seed is 0.
    assert (draw()["codes"] != first["codes"]).any()


def test_labels_by_name_number_and_case(draw):
    arrays = draw(labels=["cherry", "0", "APPLE", "banana"], num=6)
    assert arrays["labels"].tolist() == [2, 0, 1, 0, 2, 0]


def test_a_name_goes_before_its_like_in_another_case():
    names = ("A", "a", "1", "0")
    numbers = sample_module._label_numbers(["a", "A", "0", "1", "3"], names, 5)
    assert numbers.tolist() == [1, 0, 3, 2, 3]


@pytest.mark.parametrize("label", ["melon", "3", "-1", "²", "1.0"])
def test_unknown_label(draw, label, capsys):
    with pytest.raises(VqbeamError) as caught:
        draw(labels=[label])
    assert str(caught.value) == f"the run has no label {label!r}; it has Banana, apple, cherry"
    # Said before any work has begun.
    assert capsys.readouterr().err == ""


def test_settings_change_what_is_drawn(draw):
    # Two ways to ask for the likeliest codes, whatever the seed.
    greedy = draw(temperature=0.0, seed=9)
    np.testing.assert_array_equal(greedy["codes"], draw(top_k=1)["codes"])
    assert (greedy["codes"] != draw()["codes"]).any()
    with pytest.raises(VqbeamError, match="top_k is 99; it must be from 1 to 12"):
        draw(top_k=99)


def test_a_folder(finished_run, tmp_path, draw, capsys):
    folder = tmp_path / "new" / "images"
    sample(str(finished_run.root), output=str(folder), num=4, labels=["cherry", "apple"], seed=3)
    assert capsys.readouterr().out == f"4 new images: {folder}\n"
    names = [f"{index:05d}.png" for index in range(4)]
    assert sorted(path.name for path in folder.iterdir()) == [*names, "samples.jsonl"]
    expected = draw(num=4, labels=["cherry", "apple"], seed=3)
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [line["file"] for line in lines] == names
    for index, line in enumerate(lines):
        assert line["index"] == index and line["seed"] == 3
        assert line["name"] == ("cherry", "apple")[index % 2] == CLASSES[line["label"]]
        settings = {"num": 4, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "guidance": 2.0}
        assert settings.items() <= line.items()
        with Image.open(folder / line["file"]) as image:
            np.testing.assert_array_equal(np.asarray(image), expected["images"][index])


def test_a_labelled_grid(finished_run, tmp_path, draw):
    path = tmp_path / "grid.png"
    sample(str(finished_run.root), output=str(path), seed=3)
    with Image.open(path) as figure:
        settings = json.loads(figure.text["vqbeam"])
        shown = np.asarray(figure)
    arrays = draw(seed=3)
    assert settings["labels"] == arrays["labels"].tolist() and settings["seed"] == 3
    # One column a class, under a heading of 16 pixels; the fifth image is the second apple.
    tile = arrays["images"][4].repeat(8, 0).repeat(8, 1)
    top, left = 4 + 16 + 68, 4 + 68
    np.testing.assert_array_equal(shown[top : top + 64, left : left + 64], tile)


def test_samples_png_by_default(finished_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sample(str(finished_run.root), num=2)
    assert (tmp_path / "samples.png").exists()
    assert capsys.readouterr().out == "2 new images: samples.png\n"


def test_an_ending_that_is_not_known_costs_no_drawing(finished_run, monkeypatch):
    monkeypatch.setattr(sample_module, "draw_samples", None)
    with pytest.raises(VqbeamError, match="cannot write samples as .jpeg; use .png, .npz or a fol"):
        sample(str(finished_run.root), output="samples.jpeg")


def test_the_stage_is_done_once(finished_run, monkeypatch):
    manifest = finished_run.manifest("sample")
    assert set(manifest["outputs"]) == {"samples.png"}
    assert manifest["settings"]["num"] == 7 and manifest["settings"]["guidance"] == 2.0
    monkeypatch.setattr(sample_module, "draw_samples", None)
    sample_stage(str(finished_run.root))
    assert finished_run.manifest("sample") == manifest


def test_a_run_without_a_prior(finished_run, tmp_path):
    run = RunFolder(tmp_path / "run")
    run.start(finished_run.load_config())
    with pytest.raises(VqbeamError, match="has no finished train-prior stage; run vqbeam train-p"):
        sample(str(run.root))
    with pytest.raises(VqbeamError, match="is not a run folder"):
        sample(str(tmp_path))


def test_models_alone_are_enough(finished_run, tmp_path, draw):
    for name in ("config.json", "vqvae", "prior"):
        copy = shutil.copytree if (finished_run.root / name).is_dir() else shutil.copy
        copy(finished_run.root / name, tmp_path / name)
    sample(str(tmp_path), output=str(tmp_path / "copy.npz"))
    with np.load(tmp_path / "copy.npz") as arrays:
        np.testing.assert_array_equal(arrays["codes"], draw()["codes"])


@pytest.fixture
def unlabelled(monkeypatch):
    """Has the classes taken from a run whose prior was trained with a guidance scale set."""
    samples = []

    def draw_samples(run, settings, seed, labels):
        samples.append(settings)
        images = np.zeros((2, SIDE, SIDE, 3), np.uint8)
        return Samples(images, np.zeros((2, 2, 2)), np.full(2, -1), None, {"seed": seed})

    require = RunFolder.require
    monkeypatch.setattr(
        RunFolder, "require", lambda self, stage: require(self, stage) | {"label_names": []}
    )
    return draw_samples, samples


def test_guidance_of_the_config_is_no_matter_without_classes(
    finished_run, unlabelled, monkeypatch, tmp_path
):
    draw_samples, drawn = unlabelled
    with monkeypatch.context() as patch:
        patch.setattr(sample_module, "draw_samples", draw_samples)
        sample(str(finished_run.root), output=str(tmp_path / "new"))
    # The config says 2, which would end a long run with an error.
    assert drawn[0].guidance == 1.0
    line = (tmp_path / "new" / "samples.jsonl").read_text().splitlines()[0]
    assert json.loads(line) == {"file": "00000.png", "index": 0, "seed": 0}
    for wrong, message in [
        ({"guidance": 2.0}, "guidance is 2.0, but .* has no classes; use 1"),
        ({"labels": ["apple"]}, "label 'apple' was asked for, but the run has no classes"),
    ]:
        with pytest.raises(VqbeamError, match=message):
            sample(str(finished_run.root), output=str(tmp_path / "x"), **wrong)


def test_writes_gray_images(tmp_path):
    gray = np.arange(2 * 4 * 4, dtype=np.uint8).reshape(2, 4, 4, 1)
    samples = Samples(gray, np.zeros((2, 1, 1)), np.array([0, 1]), ["a", "b"], {})
    write_samples(samples, epath.Path(tmp_path / "out"))
    with Image.open(tmp_path / "out" / "00001.png") as image:
        np.testing.assert_array_equal(np.asarray(image), gray[1, ..., 0])
