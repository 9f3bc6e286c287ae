import json

import pytest

import vqbeam.pipelines.evaluation.features as features
import vqbeam.pipelines.evaluation.reconstructions as evaluation
from vqbeam.pipelines.cli import main as cli
from vqbeam.pipelines.cli.main import main
from vqbeam.pipelines.evaluation.evaluate import prior_lines, vqvae_rows
from vqbeam.vqvae.storage.run_folder import RunFolder

MEASURES = {
    "images": 12345,
    "mse": 322.06,
    "nmse": 0.05634,
    "psnr": 23.054,
    "ssim": 0.87654,
    "frechet": 12.3456,
    "feature_dim": 256,
    "frechet_left_out": None,
    "features": "classifier",
    "perplexity": 1412.4,
    "codes_used": 2048,
    "num_codes": 4096,
    "bits_per_image": 588.0,
    "compression_ratio": 10.667,
    "seed": 0,
}


@pytest.fixture(autouse=True)
def loud(monkeypatch):
    """Keeps the logging and importing of the test process as they are."""
    monkeypatch.setattr(cli, "_be_quiet", lambda: None)


def test_each_figure_has_its_unit():
    assert vqvae_rows(MEASURES) == [
        ("MSE", "322.1 of 255²"),
        ("NMSE", "0.0563 of the training pixels' variance"),
        ("PSNR", "23.05 dB"),
        ("SSIM", "0.8765 of 1"),
        (
            "Fréchet distance (classifier features)",
            "12.346, of 256 numbers over 12,345 reconstructions and their originals",
        ),
        ("perplexity", "1,412 of 4,096"),
        ("codes used", "2,048 of 4,096"),
        ("size of the codes", "588 bits an image"),
        ("compression", "10.7 to 1, of 8 bits a number"),
    ]


def test_several_levels():
    rows = dict(vqvae_rows({**MEASURES, "perplexity": [411.6, 98.2], "codes_used": [512, 99]}))
    assert rows["perplexity"] == "412, 98 of 4,096"
    assert rows["codes used"] == "512, 99 of 4,096"


def test_a_figure_that_is_left_out_says_why():
    left_out = {"frechet": None, "feature_dim": None, "frechet_left_out": "no classes"}
    rows = dict(vqvae_rows({**MEASURES, **left_out, "features": "inception"}))
    assert rows["Fréchet distance (inception features)"] == "left out: no classes"


def test_no_run(tmp_path, capsys):
    assert main(["evaluate", str(tmp_path)]) == 1
    assert capsys.readouterr() == (
        "",
        f"vqbeam: {tmp_path} is not a run folder: it has no config.json; check the path\n",
    )


def test_what_is_not_trained(prepared_run, tiny_config, capsys):
    run, _ = prepared_run(tiny_config())
    assert main(["evaluate", str(run.root)]) == 1
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1
    assert "has no finished train-vqvae stage; run vqbeam train-vqvae PRESET" in error


def test_a_table_of_what_is_left():
    names = ("frechet", "precision", "recall", "density", "coverage")
    figures = dict.fromkeys(names) | {"agreement": 0.25}
    reasons = dict.fromkeys(names, "no features")
    measures = {
        "images": 2000,
        **dict.fromkeys(("real", "reconstructions", "samples"), figures),
        "nearest": {"median": 0.9, "held_out": 1.2, "pairs": []},
        "left_out": reasons,
        "nats_per_code": 2.1456,
        "bits_per_dim": 0.19354,
        "features": "classifier",
        "neighbours": 3,
        "seed": 7,
        "settings": {"temperature": 0.9, "top_k": 5},
    }
    assert prior_lines(measures) == [
        "sets of 2,000 images by as many of the validation split",
        "                  real  reconstructions  samples",
        "label agreement  25.0%            25.0%    25.0%",
        "nearest training image: samples are 0.75 times as far from it as held-out images "
        "(medians); the closest pairs: nearest.png",
        "left out: Fréchet distance, precision, recall, density, coverage (no features)",
        "real: training images, but for the label agreement the held-out ones",
        "samples: temperature 0.9, top_k 5, seed 7; labels as in the training split",
        "features: classifier, 3 neighbours",
        "held-out codes: 2.146 nats per code, 0.1935 bits per dimension",
    ]
    nothing = prior_lines(measures | {"left_out": reasons | {"agreement": "no classes"}})
    assert nothing == [
        "by the codes of its validation split",
        "left out: Fréchet distance, precision, recall, density, coverage (no features)",
        "left out: label agreement (no classes)",
        "held-out codes: 2.146 nats per code, 0.1935 bits per dimension",
    ]


def test_a_prior_that_is_not_trained(prepared_run, tiny_config, capsys):
    run, _ = prepared_run(tiny_config())
    run.begin("train-vqvae")
    run.finish("train-vqvae", [])
    assert main(["evaluate", str(run.root), "--stage", "prior"]) == 1
    assert "has no finished train-prior stage; run vqbeam train-prior" in capsys.readouterr().err


def test_prints_and_writes(own_run, capsys, monkeypatch):
    monkeypatch.setattr(features, "_MOST_STEPS", 4)
    run, _ = own_run
    assert main(["evaluate", str(run.root)]) == 0
    lines, rest = capsys.readouterr().out.split("prior of ")
    lines = lines.splitlines()
    images = run.manifest("prepare")["counts"]["validation"]
    measures = json.loads((run.evaluation / "vqvae.json").read_text())
    accuracy = json.loads((run.evaluation / "classifier.json").read_text())["accuracy"]
    rows = vqvae_rows(measures)
    rows.append(("classifier", f"names the class of {accuracy:.1%} of the originals"))
    assert lines[0] == f"VQ-VAE of {run.root}, {images} images of the validation split"
    # All values begin in the same column, two places behind the longest name.
    column = 2 + len("Fréchet distance (classifier features)") + 2
    assert [(line[:column].strip(), line[column:]) for line in lines[1:-1]] == rows
    assert lines[-1] == f"written to {run.evaluation / 'vqvae.json'}"
    found = json.loads((run.evaluation / "prior.json").read_text())
    assert found["images"] == images and found["settings"]["guidance"] == 2
    expected = prior_lines(found)
    assert rest.splitlines()[0] == f"{run.root}, {expected[0]}"
    assert rest.splitlines()[1:-1] == [f"  {line}" for line in expected[1:]]
    assert rest.endswith(f"written to {run.evaluation / 'prior.json'}\n")


def test_the_features_are_those_asked_for(finished_run, capsys, monkeypatch):
    asked = []

    def extractor(run: RunFolder, name):
        asked.append((run.root, name))
        return lambda images: images.reshape(len(images), -1)[:, :2]

    monkeypatch.setattr(evaluation, "feature_extractor", extractor)
    words = ["evaluate", str(finished_run.root), "--features", "inception", "--stage", "vqvae"]
    assert main(words) == 0
    assert asked == [(finished_run.root, "inception")]
    out = capsys.readouterr().out
    assert "Fréchet distance (inception features)  " in out and "names the class" not in out
    assert "prior of" not in out
