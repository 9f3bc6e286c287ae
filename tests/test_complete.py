import json

import numpy as np
import pytest
from PIL import Image
from pipeline_fixtures import CLASSES, SIDE, small_config, write_images

from vqbeam.pipelines.cli.main import main
from vqbeam.pipelines.sampling.api import Run, _likeliest
from vqbeam.pipelines.sampling.complete import kept_part
from vqbeam.prior.sampler import code_scorer
from vqbeam.prior.transformer import CodePrior
from vqbeam.vqvae.building import build_model
from vqbeam.vqvae.layout import CodeLayout
from vqbeam.vqvae.storage.labels import Labels
from vqbeam.vqvae.storage.run_folder import RunFolder


@pytest.fixture
def photos(tmp_path):
    """Two images and their pixels by name."""
    return tmp_path / "photos", write_images(tmp_path / "photos", 2, classes=())


def figure_tiles(path):
    """The rows of 64 x 64 tiles below the headings of a figure, and its text."""
    with Image.open(path) as figure:
        facts, shown = json.loads(figure.text["vqbeam"]), np.asarray(figure)
    rows = range(4 + 16, shown.shape[0] - 64, 68)
    columns = range(4, shown.shape[1] - 64, 68)
    return [[shown[y : y + 64 : 8, x : x + 64 : 8] for x in columns] for y in rows], facts


def test_images_side_by_side(finished_run, photos, tmp_path, capsys):
    folder, pixels = photos
    path = tmp_path / "c.png"
    words = ["--input", str(folder), "--keep", "top-half", "--num", "3", "--label", "apple"]
    words += ["--seed", "4", "--output", str(path)]
    assert main(["complete", str(finished_run.root), *words]) == 0
    assert capsys.readouterr().out == f"6 completions of 2 images: {path}\n"
    tiles, facts = figure_tiles(path)
    assert facts["input"] == list(pixels) and facts["keep"] == "top-half"
    assert facts["label"] == CLASSES.index("apple") and facts["seed"] == 4
    for row, image in zip(tiles, pixels.values(), strict=True):
        assert len(row) == 5
        np.testing.assert_array_equal(row[0], image)
        np.testing.assert_array_equal(row[1][:4], image[:4])
        assert (row[1][4:] == 128).all()
    # What is drawn differs from one completion to the next.
    assert any((row[2] != row[3]).any() for row in tiles)


def test_a_folder_of_completions_under_a_mask(finished_run, photos, tmp_path):
    folder, _ = photos
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[:, 4:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    words = ["--input", str(folder / "001.png"), "--keep", str(tmp_path / "mask.png")]
    words += ["--num=2", "--candidates=3", "--output", str(tmp_path / "out")]
    assert main(["complete", str(finished_run.root), *words, "--num=4"]) == 0
    assert main(["complete", str(finished_run.root), *words]) == 0
    *paths, listing = sorted((tmp_path / "out").iterdir())
    assert [path.name for path in paths] == ["00000-1.png", "00000-2.png"]
    lines = [json.loads(line) for line in listing.read_text().splitlines()]
    assert listing.name == "completions.jsonl"
    assert [(line["file"], line["input"]) for line in lines] == [
        ("00000-1.png", "001.png"),
        ("00000-2.png", "001.png"),
    ]
    for path in paths:
        with Image.open(path) as image:
            assert image.size == (SIDE, SIDE)
            assert json.loads(image.text["vqbeam"])["input"] == "001.png"


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [dict(vqvae__quantizer="residual", vqvae__depth=2), dict(vqvae__grids=2)]
)
def test_kept_codes_of_every_level_stay(settings, tmp_path):
    config = small_config("glyphs", **settings)
    model = build_model(config, data_variance=1.0)
    prior = CodePrior(model.layout, num_labels=3, layers=1, width=16, heads=2)
    images = np.random.default_rng(0).integers(0, 256, (2, SIDE, SIDE, 3), np.uint8)
    RunFolder(tmp_path).start(config)
    run = Run(tmp_path)
    run.vqvae, run.prior, run.prior_labels = model, prior, Labels(("a", "b", "c"))
    run.decoder = lambda codes: codes
    codes = run.complete(images, "left-half", num=2).reshape(-1, *model.layout.shape)
    assert codes.shape == (4, *model.layout.shape)
    encoded = np.repeat(np.asarray(model.encode(images)), 2, axis=0)
    width = model.layout.grids[-1][1]
    kept = (model.layout.columns < width / 2 - 0.5).reshape(model.layout.shape)
    np.testing.assert_array_equal(codes[:, kept], encoded[:, kept])
    assert (codes[:, ~kept] != encoded[:, ~kept]).any()


@pytest.mark.slow
def test_those_are_taken_that_fit_best_to_what_is_kept():
    numbers = np.random.default_rng(0)
    prior = CodePrior(CodeLayout(5, ((2, 2),)), num_labels=3, layers=1, width=16, heads=2)
    prior.head.kernel.assign(numbers.normal(size=prior.head.kernel.shape))
    keep = np.array([[False, False], [False, True]])
    codes = numbers.integers(5, size=(8, 2, 2))
    candidates = codes.reshape(2, 4, 2, 2)
    taken = _likeliest(code_scorer(prior, counted=keep), candidates, np.ones(3, "int32"), num=2)
    logits = np.asarray(prior({"codes": codes, "labels": np.ones(8, int)}))[:, 3].astype(float)
    chances = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    chances = chances[np.arange(8), codes[:, 1, 1]].reshape(2, 4)
    best = np.argsort(-chances, axis=1)[:, :2] + [[0], [4]]
    np.testing.assert_array_equal(taken, codes[best])


def test_thekept_part_is_that_of_the_cells():
    images = np.full((1, 4, 6, 3), 7, np.uint8)
    kept = kept_part(images, np.array([[True, False], [False, False]]))
    assert (kept[0, :2, :3] == 7).all() and (kept == 7).sum() == 2 * 3 * 3
    assert (kept[0, 2:] == 128).all() and kept.dtype == np.uint8


def test_the_label_of_a_run_with_one_class_is_known(tmp_path, tiny_config):
    RunFolder(tmp_path).start(tiny_config())
    run = Run(tmp_path)
    for names, label in ((), -1), (("a",), 0), (("a", "b"), -1):
        run.prior_labels = Labels(names)
        assert run.completion_label(None) == label
    assert run.completion_label("b") == 1
    # One attribute may be present or not.
    run.prior_labels = Labels(("hat",), "attributes")
    assert run.completion_label(None) == (-1,)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words,message",
    [
        (["--input", "gone.png"], "there is no file or folder gone.png; check --input"),
        (["--keep", "middle"], "keep is 'middle'; give top-half"),
        (["--output", "c.gif"], "--output is 'c.gif'; give a name that ends in .png, or a folder"),
        (["--label", "melon"], "the run has no label 'melon'"),
        (["--top-k", "99"], "sample.top_k is 99; the model has 12 codes"),
    ],
)
def test_what_a_user_can_mend(finished_run, photos, tmp_path, capsys, words, message):
    given = ["--input", str(photos[0]), "--keep", "top-half", "--output", str(tmp_path / "c.png")]
    assert main(["complete", str(finished_run.root), *given, *words]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"vqbeam: {message}")
    assert not (tmp_path / "c.png").exists()
