import contextlib
import io
import json
import shutil

import numpy as np
import pytest
from etils import epath
from PIL import Image
from pipeline_fixtures import CLASSES, SIDE

from vqbeam.configs import SampleConfig, VqbeamError, override
from vqbeam.pipelines.cli.main import main
from vqbeam.pipelines.sampling import api
from vqbeam.pipelines.sampling.api import Run
from vqbeam.pipelines.sampling.sample import Samples, read_provenance, sample, sample_stage
from vqbeam.vqvae.figures import save_png
from vqbeam.vqvae.storage import run_folder
from vqbeam.vqvae.storage.files import read_json
from vqbeam.vqvae.storage.run_folder import RunFolder
from vqbeam.vqvae.training import load_vqvae

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


def test_as_many_of_a_label_as_the_own_number_has(draw):
    # Of seven images in three classes, two or three show each.
    assert draw(labels=["apple"])["labels"].tolist() == [1, 1]
    assert draw(labels=["cherry", "apple"])["labels"].tolist() == [2, 1, 2, 1]
    assert len(draw(labels=["apple"], num=5)["labels"]) == 5


def test_image_i_of_a_seed_is_always_the_same(draw):
    first, larger = draw(seed=3), draw(seed=3, num=10, batch_size=4)
    np.testing.assert_array_equal(larger["codes"][:7], first["codes"])
    # Decoded in a batch of another size, a pixel may round in another way.
    assert np.abs(larger["images"][:7].astype(int) - first["images"]).max() <= 1
    # The run's own seed is 0.
    assert (draw()["codes"] != first["codes"]).any()


def test_settings_change_what_is_drawn(draw):
    # Two ways to ask for the likeliest codes, whatever the seed.
    greedy = draw(temperature=0.0, seed=9)
    np.testing.assert_array_equal(greedy["codes"], draw(top_k=1)["codes"])
    assert (greedy["codes"] != draw()["codes"]).any()
    with pytest.raises(VqbeamError, match="top_k is 99; the model has 12 codes"):
        draw(top_k=99)


WORDS = "--num 5 --label cherry apple --seed 3 --min-p 0.05 --guidance-schedule linear".split()


@pytest.fixture(scope="module")
def written(finished_run, tmp_path_factory):
    """The folder that one command draws into, in batches of three, and what it prints."""
    folder = tmp_path_factory.mktemp("written") / "new" / "images"
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(["sample", str(finished_run.root), *WORDS, "--output", str(folder)]) == 0
    return folder, out.getvalue()


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def test_a_folder(finished_run, written, draw):
    folder, out = written
    assert out == f"5 new images: {folder}\n"
    names = [f"{index:05d}.png" for index in range(5)]
    assert sorted(path.name for path in folder.iterdir()) == [*names, "samples.jsonl"]
    settings = {"min_p": 0.05, "guidance_schedule": "linear"}
    expected = draw(num=5, labels=["cherry", "apple"], seed=3, **settings)
    settings |= {
        "preset": "small",
        "checkpoint": Run(finished_run.root).checkpoint,
        "seed": 3,
        "num": 5,
    }
    settings |= {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "guidance": 2.0, "batch_size": 3}
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [line["file"] for line in lines] == names
    for index, line in enumerate(lines):
        assert settings.items() <= line.items() and line["index"] == index
        assert line["name"] == ("cherry", "apple")[index % 2] == CLASSES[line["label"]]
        np.testing.assert_array_equal(pixels(folder / line["file"]), expected["images"][index])


def test_one_picture_again(finished_run, written, tmp_path, capsys):
    source = written[0] / "00004.png"
    again = ["sample", str(finished_run.root), "--like", str(source), "--output"]
    assert main([*again, str(tmp_path / "one.png")]) == 0
    assert capsys.readouterr().out == f"1 new images: {tmp_path / 'one.png'}\n"
    # Not the pixels alone: the file, with what it says of itself.
    assert (tmp_path / "one.png").read_bytes() == source.read_bytes()


def test_fast_pictures_again_are_fast(finished_run, tmp_path):
    path, again = tmp_path / "fast.png", tmp_path / "again.png"
    words = ["--num=4", "--seed=3", "--precision=fast", "--output", str(path)]
    assert main(["sample", str(finished_run.root), *words]) == 0
    facts = read_provenance(epath.Path(path))
    assert facts["precision"] == "fast"
    sample(str(finished_run.root), like=str(path), output=str(again))
    assert again.read_bytes() == path.read_bytes()
    sample(str(finished_run.root), like=str(path), precision="exact", output=str(again))
    assert read_provenance(epath.Path(again)) == facts | {"precision": "exact"}


def test_a_picture_of_a_large_seed_again(finished_run, tmp_path):
    paths = [str(tmp_path / name) for name in ("one.png", "other.png")]
    sample(str(finished_run.root), num=2, seed=10**20, output=paths[0])
    sample(str(finished_run.root), like=paths[0], output=paths[1])
    np.testing.assert_array_equal(pixels(paths[1]), pixels(paths[0]))


def test_only_the_batch_of_a_picture_is_drawn(finished_run, written, tmp_path, monkeypatch):
    asked = []

    class Recorder:
        def __init__(self, prior, batch_size):
            self.batch_size = batch_size

        def __call__(self, labels, seed, settings, *, indices, on_batch):
            asked.append((self.batch_size, indices.tolist()))
            return np.zeros((len(labels), 2, 2), np.int32)

    monkeypatch.setattr(api, "Sampler", Recorder)
    like = str(written[0] / "00004.png")
    sample(str(finished_run.root), like=like, output=str(tmp_path / "one.png"))
    # At its place in a batch of the same size, as rounding may depend on both.
    assert asked == [(3, [3, 4])]


def test_a_picture_again_by_a_run_that_cannot_be_guided(finished_run, written, monkeypatch):
    settings = {"prior.label_dropout": 0.0, "sample.guidance": 1.0}
    config = override(finished_run.load_config(), settings)
    monkeypatch.setattr(RunFolder, "load_config", lambda run: config)
    message = "guidance is 3, .* prior.label_dropout 0,.* set guidance to 1"
    like = str(written[0] / "00004.png")
    with pytest.raises(VqbeamError, match=message):
        sample(str(finished_run.root), like=like, guidance=3.0, output="x.png")


def test_but_for_what_is_given(finished_run, written, draw, tmp_path):
    like, path = str(written[0] / "00001.png"), tmp_path / "other.npz"
    sample(str(finished_run.root), like=like, labels=["banana"], top_k=1, output=str(path))
    with np.load(path) as arrays:
        facts, codes = json.loads(str(arrays["vqbeam"])), arrays["codes"]
    assert facts["images"] == [{"index": 1, "label": 0, "name": "Banana"}]
    stated = {"seed": 3, "min_p": 0.05, "guidance_schedule": "linear", "top_k": 1}
    assert stated.items() <= facts.items()
    # The likeliest codes of a class are the same whatever the seed.
    greedy = draw(labels=["banana"], temperature=0.0, num=3, guidance_schedule="linear")
    np.testing.assert_array_equal(codes[0], greedy["codes"][0])


def test_more_images_and_another_seed(finished_run, written, draw, tmp_path):
    grid, path = tmp_path / "grid.png", tmp_path / "more.npz"
    sample(str(finished_run.root), output=str(grid), num=7, seed=8)
    sample(str(finished_run.root), like=str(grid), num=8, seed=3, output=str(path))
    with np.load(path) as arrays:
        np.testing.assert_array_equal(arrays["codes"][:7], draw(seed=3)["codes"])
        assert arrays["labels"].tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
        assert json.loads(str(arrays["vqbeam"]))["images"][7]["index"] == 7


def test_a_labelled_grid_and_the_same_again(finished_run, tmp_path, draw):
    path = tmp_path / "grid.png"
    sample(str(finished_run.root), output=str(path), seed=3)
    with Image.open(path) as figure:
        facts = json.loads(figure.text["vqbeam"])
        shown = np.asarray(figure)
    arrays = draw(seed=3)
    labels = [image["label"] for image in facts["images"]]
    assert labels == arrays["labels"].tolist() and facts["seed"] == 3
    # One column a class, under a heading of 16 pixels; the fifth image is the second apple.
    tile = arrays["images"][4].repeat(8, 0).repeat(8, 1)
    top, left = 4 + 16 + 68, 4 + 68
    np.testing.assert_array_equal(shown[top : top + 64, left : left + 64], tile)
    sample(str(finished_run.root), like=str(path), output=str(tmp_path / "again.png"))
    assert (tmp_path / "again.png").read_bytes() == path.read_bytes()


def test_a_picture_of_another_checkpoint_or_of_none(finished_run, written, tmp_path, capsys):
    folder, own = written[0], Run(finished_run.root).checkpoint
    with Image.open(folder / "00000.png") as picture:
        facts = json.loads(picture.text["vqbeam"]) | {"checkpoint": "0123456789abcdef"}
        save_png(picture, epath.Path(tmp_path / "other.png"), {"vqbeam": json.dumps(facts)})
        picture.save(tmp_path / "bare.png")
    for name, said in [
        ("other.png", ("0123456789abcdef", own, "would give another picture")),
        ("bare.png", ("does not hold the settings of its images",)),
        ("gone.png", ("there is no file",)),
    ]:
        words = ["--like", str(tmp_path / name), "--output", str(tmp_path / "no.png")]
        assert main(["sample", str(finished_run.root), *words]) == 1
        error = capsys.readouterr().err
        assert all(part in error for part in said) and error.count("\n") == 1
    assert not (tmp_path / "no.png").exists()


@pytest.mark.parametrize(
    "change,told",
    [
        ({"label": 99}, "has no label 99"),
        ({"label": "\x1b[31m"}, r"has no label '\x1b[31m'"),
        ({"label": [0, 1]}, "has no label [0, 1]"),
        ({"label": None}, None),
        ({"temperature": "warm"}, "sample.temperature is 'warm'; give a number"),
        ({"temperature": -1}, "sample.temperature is -1; it must be at least 0"),
        ({"top_k": 2**70}, "top_k"),
        ({"guidance_schedule": []}, "sample.guidance_schedule is []"),
        ({"batch_size": 2**40}, None),
        ({"checkpoint": "\x1b]0;title\x07"}, r"was sampled from checkpoint \x1b]0;title\x07"),
    ],
)
def test_metadata_that_others_have_changed(finished_run, written, tmp_path, capsys, change, told):
    with Image.open(written[0] / "00000.png") as picture:
        facts = json.loads(picture.text["vqbeam"]) | change
        save_png(picture, epath.Path(tmp_path / "x.png"), {"vqbeam": json.dumps(facts)})
    words = ["--like", str(tmp_path / "x.png"), "--output", str(tmp_path / "no.png")]
    status = main(["sample", str(finished_run.root), *words])
    error = capsys.readouterr().err
    if told:
        assert status == 1 and told in error and "x.png" in error
        # A bar may have been shown before.
        assert error.count("\n") <= 2 and "Traceback" not in error and "\x1b" not in error
        assert not (tmp_path / "no.png").exists()
    else:
        assert status == 0


def test_more_images_than_memory_holds(finished_run, tmp_path):
    told = "num is 10,000,000,000,000; at most 89,478,485 images are sampled at once, and any"
    with pytest.raises(VqbeamError, match=told):
        sample(str(finished_run.root), num=10**13, output=str(tmp_path / "no.png"))


@pytest.mark.parametrize("content", ["[]", '{"temperature": []}', '{"warmth": 1}', "7", "[" * 9999])
def test_settings_of_a_run_that_others_have_changed(finished_run, tmp_path, content):
    shutil.copytree(finished_run.root, tmp_path / "run")
    (tmp_path / "run" / "sample.json").write_text(content)
    with pytest.raises(VqbeamError, match="sample.json"):
        Run(tmp_path / "run").default_settings()


def test_what_is_stored_for_a_run_goes_before_its_config(finished_run, tmp_path):
    for name in ("config.json", "vqvae", "prior"):
        (tmp_path / name).symlink_to(finished_run.root / name)
    run = RunFolder(tmp_path)
    Run(run.root).store_default_settings(SampleConfig(num=2, top_k=1, guidance=1.5))
    sample(str(tmp_path), top_k=2, output=str(tmp_path / "stored.npz"))
    with np.load(tmp_path / "stored.npz") as arrays:
        facts = json.loads(str(arrays["vqbeam"]))
    assert {"num": 2, "top_k": 2, "guidance": 1.5, "batch_size": 2}.items() <= facts.items()


def test_samples_png_by_default(finished_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for told in ("", "samples.png exists: it will be replaced\n"):
        assert main(["sample", str(finished_run.root), "--num", "2"]) == 0
        assert (tmp_path / "samples.png").exists()
        found = capsys.readouterr()
        assert found.out == "2 new images: samples.png\n" and found.err.startswith(told)


def test_the_stage_is_done_once(finished_run, monkeypatch):
    manifest = finished_run.manifest("sample")
    assert set(manifest["outputs"]) == {"samples.png"}
    assert manifest["settings"]["num"] == 7 and manifest["settings"]["guidance"] == 2.0
    monkeypatch.setattr(Run, "sample_rows", None)
    sample_stage(str(finished_run.root))
    assert finished_run.manifest("sample") == manifest


def test_a_run_without_a_prior(finished_run, tmp_path):
    run = RunFolder(tmp_path / "run")
    run.start(finished_run.load_config())
    with pytest.raises(VqbeamError, match="has no finished train-prior stage; run vqbeam train-p"):
        sample(str(run.root), output="x.png")
    with pytest.raises(VqbeamError, match="is not a run folder"):
        sample(str(tmp_path), output="x.png")


def test_manifests_are_read_once_and_only_those_of_the_models(finished_run, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(run_folder, "read_json", lambda path: read.append(path) or read_json(path))
    sample(str(finished_run.root), output=str(tmp_path / "x.npz"))
    names = [str(path.relative_to(finished_run.root)) for path in read]
    assert sorted(set(names)) == ["config.json", "prior/manifest.json", "vqvae/manifest.json"]
    assert names.count("prior/manifest.json") == names.count("vqvae/manifest.json") == 1


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

    def sample_rows(run, labels, seed, settings):
        samples.append(settings)
        images = np.zeros((2, SIDE, SIDE, 3), np.uint8)
        return Samples(images, np.zeros((2, 2, 2)), np.full(2, -1), None, {"seed": seed})

    require = RunFolder.require
    monkeypatch.setattr(
        RunFolder,
        "require",
        lambda self, stage, among: require(self, stage, among) | {"label_names": []},
    )
    return sample_rows, samples


def test_guidance_of_the_config_is_no_matter_without_classes(
    finished_run, unlabelled, monkeypatch, tmp_path
):
    sample_rows, drawn = unlabelled
    with monkeypatch.context() as patch:
        patch.setattr(Run, "sample_rows", sample_rows)
        sample(str(finished_run.root), output=str(tmp_path / "new"))
    # The config says 2, which would end a long run with an error.
    assert drawn[0].guidance == 1.0
    line = (tmp_path / "new" / "samples.jsonl").read_text().splitlines()[0]
    assert json.loads(line) == {"file": "00000.png", "index": 0, "seed": 0}
    for wrong, message in [
        ({"guidance": 2.0}, "guidance is 2, but the prior is trained with no labels"),
        ({"labels": ["apple"]}, "label 'apple' was asked for, but the run has no classes"),
    ]:
        with pytest.raises(VqbeamError, match=message):
            sample(str(finished_run.root), output=str(tmp_path / "x"), **wrong)
