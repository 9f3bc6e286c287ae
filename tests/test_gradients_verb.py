import re

import keras
import pytest
from PIL import Image
from pipeline_fixtures import small_config, write_images, write_preset

from vqbeam.pipelines.cli.main import main
from vqbeam.pipelines.gradients import audit_lines
from vqbeam.vqvae.gradients import Audit

pytestmark = pytest.mark.slow

FSQ = ("--vqvae.quantizer", "fsq", "--vqvae.num-codes", 512)
KIND = "sparse" if keras.backend.backend() == "tensorflow" else "dense"


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    """A preset file for a folder of 24 small images, in batches of 8."""
    folder = tmp_path_factory.mktemp("gradients")
    write_images(folder / "source", 24)
    (folder / "source" / "apple" / "broken.png").write_bytes(b"not an image")
    config = small_config(
        f"folder:{folder / 'source'}",
        vqvae__codebook_update="gradient",
        vqvae__restart_below=0.0,
    )
    return str(write_preset(folder / "own.py", config))


def call(capsys, *words):
    """Returns the exit status and the lines on stdout and stderr of `vqbeam gradients`."""
    status = main(["gradients", *map(str, words)])
    captured = capsys.readouterr()
    return status, captured.out.splitlines(), captured.err.splitlines()


def cells(line):
    return line.split()


def is_norm(cell):
    return re.fullmatch(r"\d\.\d{3}e[+-]\d\d", cell) is not None


def test_a_preset(preset, tmp_path, capsys):
    path = tmp_path / "new" / "paths.png"
    status, lines, errors = call(capsys, preset, "--output", path)
    assert (status, errors) == (0, [])
    title = "preset small, before its first step: L2 norms of the gradients on 8 training images"
    assert lines[:2] == [title, "estimator: straight_through"]
    assert cells(lines[2]) == ["encoder", "codebook", "decoder"]
    table = {name: values for name, *values in map(cells, lines[3:6])}
    assert {
        loss: ["norm" if is_norm(cell) else cell for cell in at] for loss, at in table.items()
    } == {
        "reconstruction": ["norm", "0", "norm"],
        "codebook": ["0", "norm", "0"],
        "commitment": ["norm", "0", "0"],
    }
    assert len({len(line) for line in lines[2:6]}) == 1  # aligned
    assert lines[6:] == [f"figure: {path}"]
    with Image.open(path) as figure:
        assert figure.format == "PNG" and figure.size[0] == 950


def test_without_an_estimator(preset, tmp_path, capsys):
    path, estimator = tmp_path / "paths.png", "rotation"
    words = ["--no-straight-through", "--steps", 3, "--output", path]
    status, lines, _ = call(capsys, preset, *words, "--vqvae.estimator", estimator)
    assert status == 0
    assert lines[1] == f"estimator: {estimator}" and lines[6] == "estimator: none"
    assert is_norm(cells(lines[3])[1])
    assert cells(lines[8])[:3] == ["reconstruction", "0", "0"]
    for name, line in zip((estimator, "none"), lines[-3:-1], strict=True):
        start = f"after 3 training steps, estimator {name}: reconstruction error "
        assert re.fullmatch(start + r"\d\.\d{4} of the variance", line)
    with Image.open(path) as figure:
        assert figure.size[1] > 1200  # two diagrams and the curves


def test_flags_change_the_preset(preset, tmp_path, capsys):
    words = ["--vqvae.codebook-update", "ema", "--vqvae.batch_size", 4]
    status, lines, _ = call(capsys, preset, *words, "--output", tmp_path / "a.png")
    assert status == 0
    assert lines[0].endswith("on 4 training images")
    assert all("moving average" in line for line in lines[3:5])


def test_rounding(preset, tmp_path, capsys):
    path = tmp_path / "a.png"
    status, lines, _ = call(capsys, preset, *FSQ, "--output", path)
    assert status == 0
    assert lines[1] == "estimator: that of rounding, without a codebook"
    assert cells(lines[3])[0] == "reconstruction" and cells(lines[3])[2] == "none"


def test_a_run(finished_run, tmp_path, capsys):
    path = tmp_path / "a.png"
    words = ["--output", path, "--no-straight-through", "--steps", 2]
    status, lines, _ = call(capsys, finished_run.root, *words)
    assert status == 0
    title = f"run {finished_run.root}: L2 norms of the gradients on 8 training images"
    assert lines[0] == title
    assert "after 2 training steps, estimator none" in lines[-2]
    assert path.exists()


def refusal(capsys, *words):
    status, lines, errors = call(capsys, *words)
    assert status and not lines and len(errors) == 1
    return errors[0]


def test_refusals(preset, tmp_path, capsys):
    said = refusal(capsys, "nothing-like-it")
    assert said.startswith(
        "vqbeam: there is no folder 'nothing-like-it', and no preset is named 'nothing-like-it'; "
    )
    said = refusal(capsys, "gone.py")
    assert said == "vqbeam: there is no preset file 'gone.py'; check the path"
    said = refusal(capsys, tmp_path)
    assert said == f"vqbeam: {tmp_path} is not a run folder: it has no config.json; check the path"
    said = refusal(capsys, preset, "--output", "a.jpg")
    assert said == "vqbeam: --output is 'a.jpg'; give a name that ends in .png"
    for quantizer in ("fsq", "lfq"):
        words = ["--vqvae.quantizer", quantizer, "--vqvae.num-codes", 512]
        said = refusal(
            capsys, preset, *words, "--no-straight-through", "--output", tmp_path / "a.png"
        )
        assert said.startswith("vqbeam: this quantizer rounds, and has no")
    assert not (tmp_path / "a.png").exists()


def test_a_source_without_an_image(tmp_path, capsys):
    (tmp_path / "source").mkdir()
    for name in "abcdefghijkl":
        (tmp_path / "source" / f"{name}.png").write_text(f"not an image: {name}")
    preset = write_preset(tmp_path / "own.py", small_config(f"folder:{tmp_path / 'source'}"))
    said = refusal(capsys, preset)
    assert said.endswith(" has no training image that can be decoded; check it")


def test_the_table():
    norms = {"reconstruction": {"encoder": 0.25, "decoder": 12.5}}
    found = Audit("rotation", "moving average", norms)
    assert list(audit_lines([found], {"none": [1.0, 0.5]})) == [
        "estimator: rotation",
        "                    encoder        codebook    decoder",
        "  reconstruction  2.500e-01  moving average  1.250e+01",
        "after 1 training steps, estimator none: reconstruction error 0.5000 of the variance",
    ]
