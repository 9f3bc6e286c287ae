import pathlib
import re
import shlex
import shutil

import matplotlib
import numpy as np
import pytest
from PIL import Image
from pipeline_fixtures import CLASSES, finish_again, read_records, small_config, write_measures
from report_pages import Page, check_self_contained, decoded

import vqbeam
from vqbeam.configs import VqbeamError, load_preset, override
from vqbeam.pipelines.cli import main as cli
from vqbeam.pipelines.cli.main import main, parse
from vqbeam.pipelines.cli.parser import UsageError
from vqbeam.pipelines.report.page import report
from vqbeam.vqvae.storage.files import write_json
from vqbeam.vqvae.storage.run_folder import MANIFEST, STAGES, RunFolder

ROOT = pathlib.Path(__file__).parent.parent
SETS = {
    "real": {"frechet": 0.054, "precision": 0.817, "recall": 0.816, "agreement": 0.746},
    "reconstructions": {"frechet": 4.614, "precision": 0.945, "recall": 0.638, "agreement": 0.582},
    "samples": {"frechet": 5.363, "precision": 0.827, "recall": 0.191, "agreement": None},
}
PRIOR = SETS | {
    "images": 10_000,
    "nearest": {"median": 0.3, "held_out": 1.0, "pairs": [[0, 0]]},
    "settings": {"guidance": 2.0, "temperature": 0.95},
}


@pytest.fixture(autouse=True)
def loud(monkeypatch):
    """Keeps the logging and importing of the test process as they are."""
    monkeypatch.setattr(cli, "_be_quiet", lambda: None)


@pytest.fixture
def run(finished_run, tmp_path):
    """A copy of a finished run, to be changed."""
    without = shutil.ignore_patterns("evaluation")  # other tests may have evaluated it
    return RunFolder(shutil.copytree(finished_run.root, tmp_path / "run", ignore=without))


@pytest.fixture(scope="module")
def page(finished_run, tmp_path_factory):
    """The page about a finished run, for all tests that only look at it."""
    return page_of(finished_run, output=tmp_path_factory.mktemp("page") / "page.html")


def page_of(*runs, output):
    """The page about some runs."""
    report([str(run.root) for run in runs], str(output))
    return Page(output.read_text("utf-8"))


def started(path, config=None, **manifests):
    """A run with manifests, but without any of their files."""
    run = RunFolder(path)
    run.start(config or small_config("glyphs"))
    for name, facts in manifests.items():
        stage = name.replace("_", "-")
        run.begin(stage)
        output = run.folder(stage) / "output"
        output.write_text("elsewhere")
        run.finish(stage, [output], **facts)
        output.unlink()
    return run


def test_arguments():
    assert parse(["report", "d"])[1] == {"run_dirs": ["d"], "output": None}
    words = ["report", "d", "e", "--output", "f.html"]
    assert parse(words)[1] == {"run_dirs": ["d", "e"], "output": "f.html"}
    with pytest.raises(UsageError, match="several folders need --output FILE.html"):
        parse(["report", "d", "e"])
    with pytest.raises(UsageError, match="missing DIR"):
        parse(["report"])


def test_other_endings_are_refused(capsys):
    assert main(["report", "d", "--output", "page.png"]) == 1
    assert "give a name that ends in .html" in capsys.readouterr().err


def test_no_run(tmp_path):
    with pytest.raises(VqbeamError, match="is not a run folder: it has no config.json"):
        report([str(tmp_path)])
    assert not (tmp_path / "report.html").exists()


def test_a_finished_run(run, capsys):
    assert main(["report", str(run.root)]) == 0
    path = run.root / "report.html"
    assert capsys.readouterr().out.endswith(f" MB: {path}\n")
    assert path.stat().length < 5e6
    page = Page(path.read_text())
    check_self_contained(page)
    encoded, vqvae, prior = (
        run.manifest(stage) for stage in ("encode", "train-vqvae", "train-prior")
    )
    counts = run.manifest("prepare")["counts"]
    for fact in (
        f"trained on {counts['train']} images of folder:",
        "8×8 pixels, 3 classes",
        f"{vqvae['measures']['psnr']:.1f} dB",
        f"{encoded['codes_used']} of 12",
        f"{prior['measures']['nats_per_code']:.2f} nats",
        f"{prior['parameters']:,}",
        f"{prior['speed']['images_per_second']:,.0f}",
        *(run.manifest(stage)["sha256"] for stage in STAGES),
        f"Not measured yet: vqbeam evaluate {run.root}",
    ):
        assert fact in page.text, fact
    (sheet,) = page.all("img", class_="sheet")
    assert sheet["alt"] == f"New images of the classes {', '.join(CLASSES)}"
    marks = [found["data-tip"] for found in page.all("g", class_="mark")]
    for history in (vqvae["history"], prior["history"]):
        for number, epoch in enumerate(history, 1):
            values = f"{epoch['loss']:.4g} training, {epoch['val_loss']:.4g} held out"
            assert f"epoch {number}, {2 * number} steps: {values}" in marks
            row = f" {number} {epoch['loss']:.4g} {epoch['val_loss']:.4g} "
            assert row in page.text


def test_pictures_are_those_of_the_run(finished_run, page):
    records = read_records(finished_run.folder("prepare"))["validation"]
    originals = np.stack([example["image"] for example in records])
    copies = vqbeam.open(finished_run.root).reconstruct(originals)
    colours = matplotlib.colormaps["inferno"]
    assert len(page.all("div", class_="tile")) == min(len(originals), 16) > 0
    for number, (original, copy) in enumerate(zip(originals, copies, strict=True), 1):
        np.testing.assert_array_equal(page.picture(f"Held-out image {number}"), original)
        found = page.picture(f"Reconstruction of held-out image {number}")
        np.testing.assert_array_equal(found, copy)
        error = np.abs(original.astype(int) - copy.astype(int)).mean(axis=2)
        alt = f"Error of reconstruction {number}: {error.mean():.1f} of 255 on average"
        expected = colours(np.clip(error, 0, 100) / 100)[..., :3] * 255
        assert np.abs(page.picture(alt) - expected).max() <= 1


def test_codes_are_counted_and_shown(finished_run, page):
    run = finished_run
    codes = np.stack([example["codes"] for example in read_records(run.folder("encode"))["train"]])
    shares = np.bincount(codes.ravel(), minlength=12) / codes.size
    order = np.argsort(-shares, kind="stable")
    tips = [found["data-tip"] for found in page.all("g") if "by use" in found["data-tip"]]
    assert tips == [
        f"codes {rank} by use: {shares[code]:.3%} of all codes"
        for rank, code in enumerate(order, 1)
    ]
    everywhere = vqbeam.open(run.root).decode(np.broadcast_to(order[:, None, None], (12, 2, 2)))
    for code, picture in zip(order, everywhere, strict=True):
        found = page.picture(f"Code {code}: {shares[code]:.3%} of all codes")
        np.testing.assert_array_equal(found, picture)
    assert ("Never used" in page.text) == (0 in shares)


def test_a_run_without_its_data_and_models(run, tmp_path):
    for stage in STAGES:
        for path in run.folder(stage).iterdir():
            if path.name != MANIFEST and path.is_file():
                path.unlink()
    page = page_of(run, output=tmp_path / "page.html")
    check_self_contained(page)
    assert not page.all("img")
    place = run.root
    for line in (
        f"No samples yet: vqbeam sample {place} --output {place}/samples/samples.png",
        f"make them again: vqbeam prepare PRESET --run-dir {place}",
        f"make them again: vqbeam encode PRESET --run-dir {place}",
    ):
        assert line in page.text
    assert len(page.all("svg")) == 3
    assert f"{run.manifest('train-prior')['measures']['nats_per_code']:.2f} nats" in page.text


def test_a_run_in_training(run, tmp_path):
    history = run.manifest("train-prior")["history"]
    (run.folder("train-prior") / MANIFEST).unlink()
    shutil.rmtree(run.folder("sample"))
    page = page_of(run, output=tmp_path / "page.html")
    assert "4 steps done" in page.text
    assert f"The prior is not trained yet: vqbeam run PRESET.py --run-dir {run.root}" in page.text
    tips = [found.get("data-tip", "") for found in page.all("g")]
    for epoch in history:
        assert any(f"{epoch['val_loss']:.4g} held out" in tip for tip in tips)


def test_a_run_that_was_only_started(tmp_path):
    page = page_of(started(tmp_path / "run"), output=tmp_path / "page.html")
    check_self_contained(page)
    assert "No epoch is complete yet" in page.text
    assert "has no finished prepare stage; run vqbeam prepare" in page.text


def test_metrics_and_advice(tmp_path):
    run = started(tmp_path / "run")
    run.evaluation.mkdir()
    write_json(run.evaluation / "prior.json", PRIOR)
    page = page_of(run, output=tmp_path / "page.html")
    assert "sets of 10,000 images" in page.text
    assert re.search(r"Fréchet distance [^0-9]* 5\.363 4\.614 0\.054 ", page.text)
    assert re.search(r"recall [^0-9]* 0\.191 0\.638 0\.816 ", page.text)
    assert "label agreement" not in page.text  # one of the sets lacks it
    for title in (
        "Samples resemble training images closely",
        "Guidance is too strong",
        "Stage 1 limits the quality of samples",
    ):
        assert title in page.text
    assert "Not all is measured yet" in page.text


@pytest.mark.slow
@pytest.mark.slow
def test_what_is_of_another_model_is_not_shown(own_run, tmp_path):
    run, _ = own_run
    write_measures(run, "prior", **PRIOR)
    assert "sets of 10,000 images" in page_of(run, output=tmp_path / "page.html").text
    finish_again(run, "train-prior", history=[])
    text = page_of(run, output=tmp_path / "page.html").text
    assert "The models have changed since the samples were made: vqbeam run" in text
    assert "sets of 10,000 images" not in text


def test_texts_of_other_people_are_escaped(tmp_path):
    evil = "\"'><img src=x onerror=alert(1)><b>"
    config = override(small_config(f"folder:/{evil}"), {})
    labels = dict(label_names=[evil], label_kind="classes")
    run = started(
        tmp_path / evil.replace("/", ""),
        config,
        prepare=dict(counts={"train": 3, "validation": 2}, **labels),
        train_prior=dict(measures={"nats_per_code": 1.0}, history=[], **labels),
    )
    run.folder("sample").mkdir()
    shutil.copy(ROOT / "docs" / "samples-glyphs.png", run.folder("sample") / "samples.png")
    page = page_of(run, output=tmp_path / "page.html")
    assert len(page.all("img")) == 1 and not page.all("b")
    assert not any("onerror" in found for _, found in page.elements)
    (sheet,) = page.all("img")
    assert sheet["alt"] == f"New images of the classes {evil}"
    assert page.text.count(evil) >= 3


def test_several_runs(tmp_path):
    def made(name, losses, **changes):
        history = [{"loss": loss, "val_loss": loss} for loss in losses]
        vqvae = dict(measures={"psnr": 20.0 + losses[0]}, history=history)
        return started(tmp_path / name, small_config("glyphs", **changes), train_vqvae=vqvae)

    runs = [made("a", [4.0, 2.0]), made("b", [1.0, 0.0], vqvae__width=16, seed=7)]
    page = page_of(*runs, output=tmp_path / "page.html")
    check_self_contained(page)
    differs = page.text.partition("What differs")[2].partition("Pictures")[0]
    expected = f"setting {tmp_path}/a {tmp_path}/b seed 0 7 vqvae.width 8 16"
    assert " ".join(differs.split()) == expected
    assert "24.0 dB" in page.text and "21.0 dB" in page.text
    # Both charts have the same axis, so that 2.0 is as far above 1.0 as 1.0 above 0.0.
    heights = [float(found["cy"]) for found in page.all("circle", class_="dot s2")]
    assert heights[0] < heights[1] < heights[2] < heights[3]
    np.testing.assert_allclose(np.diff(heights)[1:], np.diff(heights)[0] / 2, atol=0.2)


def test_the_same_settings_are_said_to_be(tmp_path):
    runs = [started(tmp_path / name) for name in "ab"]
    assert "All settings are the same." in page_of(*runs, output=tmp_path / "page.html").text


def test_the_command_that_resumes_has_the_settings_of_the_run(tmp_path):
    config = override(load_preset("glyphs"), {"vqvae.steps": 800, "data.max_images": 99})
    page = page_of(started(tmp_path / "a run", config), output=tmp_path / "page.html")
    command = re.search(r"vqbeam run glyphs [^\n]*", "\n".join(page.texts))[0]
    arguments = parse(shlex.split(command)[1:])[1]
    assert arguments["config"] == config
    assert arguments["run_dir"] == str(tmp_path / "a run")
    assert "vqvae.steps 800 1200" in page.text  # beside the preset's


@pytest.mark.slow
def test_large_pictures_stay_below_the_limit(tmp_path):
    run = started(tmp_path / "run")
    run.folder("sample").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (2400, 2400, 3), np.uint8)
    Image.fromarray(noise).save(run.folder("sample") / "samples.png")
    write_measures(run, "prior", **PRIOR)
    Image.fromarray(noise).save(run.evaluation / "nearest.png")
    page = page_of(run, output=tmp_path / "page.html")
    assert len(page.all("img")) == 2
    assert 5e5 < len(page.source) < 5e6
    assert {found["width"] for found in page.all("img")} == {"2400"}


def test_damaged_metrics_do_not_hide_the_rest(tmp_path):
    run = started(tmp_path / "run")
    run.evaluation.mkdir()
    (run.evaluation / "prior.json").write_text("{")
    assert "Not measured yet" in page_of(run, output=tmp_path / "page.html").text


def test_damaged_pictures_do_not_hide_the_rest(run, tmp_path):
    path = run.folder("sample") / "samples.png"
    whole = path.read_bytes()
    path.write_bytes(b"no picture")
    write_measures(run, "prior", **PRIOR)
    (run.evaluation / "nearest.png").write_bytes(whole[:99])
    try:
        report([str(run.root)], str(tmp_path / "page.html"))
    finally:
        path.write_bytes(whole)
        (run.evaluation / "nearest.png").unlink()
        (run.evaluation / "prior.json").unlink()
    page = Page((tmp_path / "page.html").read_text())
    assert f"{path} cannot be read" in page.text and "Held-out image 1" in str(page.all("img"))


def test_losses_that_cannot_be_drawn(tmp_path):
    history = [{"loss": float("nan"), "val_loss": 1.0}, {"loss": 1.0, "val_loss": 1.0}]
    facts = dict(measures={"psnr": 20.0}, history=history)
    page = page_of(started(tmp_path / "run", train_vqvae=facts), output=tmp_path / "page.html")
    assert "nan" not in " ".join(found["d"] for found in page.all("path"))
    assert len(page.all("svg")) == 1


@pytest.mark.slow
def test_codes_of_several_levels(prepared_run, tiny_config):
    from measured_run import add_models

    from vqbeam.pipelines.report.page import _code_pictures

    config = tiny_config(vqvae__quantizer="residual", vqvae__depth=2)
    run, pixels = prepared_run(config)
    add_models(run, pixels)
    counts = np.array([[0, 5, 3, *[0] * 9], [4, 0, 0, 4, *[0] * 9][:12]])
    opened = vqbeam.open(run.root)
    levels = _code_pictures(opened, counts, 10**6)
    assert [title for title, _ in levels[1]] == ["Used most", "Never used"]
    (most, _), (never, _) = levels[0][0][1][:2], levels[0][1][1][:2]
    assert most.alt == "Code 1: 62.500% of all codes" and never.alt.startswith("Code 0: 0.000%")
    # The second level has its most frequent code, 0, meanwhile.
    grid = np.zeros((1, *opened.encode(pixels["train"][:1]).shape[1:]), int)
    grid[..., 0] = 1
    np.testing.assert_array_equal(decoded(most.uri)[..., :1], opened.decode(grid)[0])
