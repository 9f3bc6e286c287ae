import dataclasses
import json
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from pipeline_fixtures import CLASSES, SIDE
from report_pages import Page

import vqbeam
from vqbeam.configs import VqbeamError
from vqbeam.pipelines.sampling.complete import complete
from vqbeam.pipelines.sampling.sample import sample
from vqbeam.pipelines.sampling.score import score
from vqbeam.vqvae.figures import label_figure, picture, save_png
from vqbeam.vqvae.storage.run_folder import RunFolder
from vqbeam.vqvae.training import load_vqvae

pytestmark = pytest.mark.slow

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "python.md"


@pytest.fixture(scope="module")
def run(finished_run):
    return vqbeam.open(str(finished_run.root))


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(1).integers(0, 256, (5, SIDE, SIDE, 3), np.uint8)


def test_importing_loads_next_to_nothing():
    code = (
        "import sys, vqbeam\n"
        "assert {'open', 'Run', 'VqbeamError', 'EncodeImages'} <= set(dir(vqbeam))\n"
        "vqbeam.VqbeamError, hasattr(vqbeam, 'nothing')\n"
        "heavy = {'tensorflow', 'keras', 'numpy', 'apache_beam', 'jax', 'etils', 'matplotlib'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_opening(run, finished_run, tmp_path):
    assert run.path == finished_run.root and run.config == finished_run.load_config()
    assert isinstance(run, vqbeam.Run) and repr(run) == f"vqbeam.open({str(run.path)!r})"
    assert run.labels == CLASSES
    assert list(run.history) == ["train-vqvae", "train-prior"]
    for epochs in run.history.values():
        assert len(epochs) == 2 and {"loss", "val_loss"} <= set(epochs[0])
    with pytest.raises(vqbeam.VqbeamError, match="is not a run folder") as refused:
        vqbeam.open(tmp_path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "arguments", [{}, {"labels": ["apple"] * 4, "num": 4, "seed": 3, "top_p": 0.9}]
)
def test_samples_are_those_of_the_command(run, tmp_path, arguments):
    path = tmp_path / "new.npz"
    sample(str(run.path), output=str(path), **arguments)
    new = run.sample(**arguments)
    with np.load(path) as written:
        for name in ("images", "codes", "labels"):
            np.testing.assert_array_equal(getattr(new, name), written[name])
    assert new.images.dtype == np.uint8 and new.codes.dtype == np.int32
    assert new.names == [CLASSES[label] for label in new.labels]


def test_labels_by_name_or_number(run):
    by_name = run.sample(labels=["cherry", "Banana", "cherry"], seed=2)
    again = run.sample(labels=by_name.labels, seed=2)
    assert again.names == ["cherry", "Banana", "cherry"]
    np.testing.assert_array_equal(again.codes, by_name.codes)
    assert run.sample(labels=[None, "apple", None], seed=2).names == ["", "apple", ""]


def test_numbers_may_be_those_of_numpy(run):
    one = run.sample(num=np.int64(2), seed=np.int64(3), temperature=np.float32(0.5))
    np.testing.assert_array_equal(one.codes, run.sample(num=2, seed=3, temperature=0.5).codes)
    with pytest.raises(vqbeam.VqbeamError, match="^seed is 1.5; give an integer$"):
        run.sample(seed=1.5)


def test_a_stage_that_finishes_after_opening(own_run):
    folder, _ = own_run
    manifest = folder.folder("train-prior") / "manifest.json"
    content = manifest.read_bytes()
    manifest.unlink()
    run = vqbeam.open(folder.root)
    with pytest.raises(vqbeam.VqbeamError, match="has no finished train-prior stage"):
        run.sample(1)
    manifest.write_bytes(content)
    assert len(run.sample(1).images) == 1


def test_codes_and_images(run, finished_run, images):
    model = load_vqvae(finished_run)
    codes = run.encode(images)
    assert codes.dtype == np.int32
    np.testing.assert_array_equal(codes, model.encode(images))
    decoded = run.decode(codes.astype("uint16"))
    assert decoded.dtype == np.uint8 and decoded.shape == images.shape
    # A compiled decoder may round a pixel in another way.
    assert np.abs(np.asarray(model.decode(codes)).astype(int) - decoded).max() <= 1
    np.testing.assert_array_equal(run.reconstruct(images), decoded)
    np.testing.assert_array_equal(run.codebook, model.quantizer.vectors())
    assert run.codebook.shape == (12, 4) and run.codebook.dtype == np.float32


@pytest.mark.parametrize("label", [None, "cherry"])
def test_likelihoods_are_those_of_the_command(run, images, tmp_path, label):
    for index, image in enumerate(images):
        save_png(picture(image), tmp_path / f"{index}.png")
    score(str(run.path), str(tmp_path), label=label, output=str(tmp_path / "lines"))
    lines = map(json.loads, (tmp_path / "lines").read_text().splitlines())
    nats = run.log_likelihood(images, label and [label] * len(images))
    assert nats.dtype == np.float32
    assert nats.tolist() == [line["log_likelihood"] for line in lines]


def test_completions_are_those_of_the_command(run, images, tmp_path):
    save_png(picture(images[0]), tmp_path / "one.png")
    arguments = {"keep": "left-half", "num": 2, "candidates": 2, "label": "apple", "seed": 4}
    source, output = str(tmp_path / "one.png"), tmp_path / "out"
    complete(str(run.path), source=source, output=str(output), **arguments)
    done = run.complete(images[:1], **arguments)
    assert done.shape == (1, 2, SIDE, SIDE, 3) and done.dtype == np.uint8
    for column in range(2):
        with Image.open(output / f"00000-{column + 1}.png") as written:
            np.testing.assert_array_equal(done[0, column], written)
    mask = np.arange(SIDE) < np.full((SIDE, 1), SIDE / 2)
    np.testing.assert_array_equal(run.complete(images[:1], **arguments | {"keep": mask}), done)


@pytest.mark.parametrize(
    "settings, shape",
    [
        ({"vqvae__quantizer": "predictive"}, (16, 4)),
        ({"vqvae__quantizer": "simvq"}, (16, 4)),
        ({"vqvae__quantizer": "residual", "vqvae__depth": 3}, (3, 16, 4)),
        ({"vqvae__grids": 2}, (2, 16, 4)),
        ({"vqvae__quantizer": "fsq", "vqvae__fsq_levels": "4,4"}, (16, 2)),
        ({"vqvae__quantizer": "lfq"}, (16, 4)),
    ],
)
def test_codebooks_of_every_kind(settings, shape, tmp_path, tiny_config):
    from vqbeam.vqvae.building import build_model

    folder = RunFolder(tmp_path / "run")
    folder.start(tiny_config(**{"vqvae__num_codes": 16} | settings))
    folder.begin("prepare")
    folder.finish("prepare", [], label_names=["a", "b"], label_kind="classes")
    run = vqbeam.open(folder.root)
    run.vqvae = build_model(run.config, data_variance=1.0)
    assert run.codebook.shape == shape and run.labels == ("a", "b")
    with pytest.raises(VqbeamError, match="no finished train-prior stage"):
        run.sample()


def test_what_does_not_fit_is_refused(run, images):
    codes = np.zeros((2, 2, 2), np.int32)
    shape = r"give uint8 \[N, 8, 8, 3\] with pixels from 0 to 255"
    for call, message in [
        (lambda: run.encode(images / 255), rf"images is float64 \[5, 8, 8, 3\]; {shape}"),
        (lambda: run.encode(images[0]), rf"images is uint8 \[8, 8, 3\]; {shape}"),
        (lambda: run.encode(images[:, :4]), rf"images is uint8 \[5, 4, 8, 3\]; {shape}"),
        (lambda: run.encode(images[:0]), rf"images is uint8 \[0, 8, 8, 3\]; {shape}"),
        (lambda: run.encode(3), rf"images is int64 \[\]; {shape}"),
        (lambda: run.decode(codes * 1.0), r"codes is float64 \[2, 2, 2\]; give integers \[N, 2, 2"),
        (lambda: run.decode(codes[0]), r"codes is int32 \[2, 2\]; give integers \[N, 2, 2\]"),
        (lambda: run.decode(codes - 1), "codes go from -1 to -1; this run has codes from 0 to 11"),
        (lambda: run.decode(codes + 12), "codes go from 12 to 12; this run has"),
        (lambda: run.sample(labels=["melon"]), "the run has no label 'melon'; it has Banana"),
        (
            lambda: run.sample(labels=[3]),
            "the run has no label 3; give a name or a number from 0 to 2",
        ),
        (lambda: run.sample(labels=[]), "labels is empty; give at least one"),
        (lambda: run.sample(num=0), "num is 0"),
        (lambda: run.log_likelihood(images, ["apple"]), "labels must be a list of 5"),
        (lambda: run.complete(images, np.ones((8, 8))), r"keep is float64 \[8, 8\]; give bool"),
        (lambda: run.complete(images, "top", num=1), "give top-half, bottom-half"),
        (lambda: run.complete(images, "top-half", num=0), "num is 0; it must be at least 1"),
        (lambda: run.interpolate("apple", 1), "the first and the last class are both apple; give"),
        (lambda: run.interpolate(0, 1, steps=1), "steps is 1; it must be at least 2"),
    ]:
        with pytest.raises(VqbeamError, match=message) as refused:
            call()
        assert "\n" not in str(refused.value)


def test_the_page_of_examples(finished_run, tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 4
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "fashion").symlink_to(finished_run.root)
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in blocks:
        exec(block.replace('"Bag"', '"apple"').replace('"Sneaker"', '"cherry"'), names)
    assert names["way"].shape == (2, 8, SIDE, SIDE, 3)
    assert names["done"].shape == (8, 4, SIDE, SIDE, 3) and names["vectors"].shape == (5, 16)


def test_a_notebook_shows_a_run_and_samples(run, finished_run):
    page = Page(run._repr_html_())
    vqvae, encoded = (finished_run.manifest(stage) for stage in ("train-vqvae", "encode"))
    assert str(finished_run.root) in page.text and "preset small, seed 0" in page.text
    assert f"{vqvae['measures']['psnr']:.1f} dB" in page.text
    assert f"{encoded['codes_used']} of 12" in page.text
    for name, text in (
        ("vqvae/reconstructions.png", "Held-out images above their reconstructions"),
        ("samples/samples.png", "New images"),
    ):
        with Image.open(finished_run.root / name) as written:
            np.testing.assert_array_equal(page.picture(text), np.asarray(written.convert("RGB")))
    new = run.sample(labels=["apple", "cherry"], num=4, seed=2)
    grid = np.asarray(label_figure(new.images, new.names, fill=True))
    shown = Page(new._repr_html_())
    np.testing.assert_array_equal(shown.picture("4 new images"), grid)
    assert repr(new) == f"Samples(uint8 [4, {SIDE}, {SIDE}, 3], seed 2)"
    assert f"4 new images, seed 2, checkpoint {run.checkpoint}" in shown.text
    settings = new.settings | {"checkpoint": "<script>"}
    assert "<script>" not in dataclasses.replace(new, settings=settings)._repr_html_()
