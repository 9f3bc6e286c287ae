import json

import numpy as np
import pytest
from measured_run import add_models, stub_classifier, stub_features
from PIL import Image

import vqbeam.pipelines.evaluation.reference as comparison
from vqbeam.configs import SamplerSettings, VqbeamError
from vqbeam.pipelines.cli import main as cli
from vqbeam.pipelines.cli.main import main
from vqbeam.pipelines.evaluation.evaluate import measure_prior, prior_lines
from vqbeam.pipelines.evaluation.reference import SampleEvaluator
from vqbeam.pipelines.sampling.api import Run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(prepared_run, tiny_config):
    run, pixels = prepared_run(tiny_config(sample__batch_size=4))
    add_models(run, pixels)
    return run


@pytest.fixture(autouse=True)
def stubs(monkeypatch):
    monkeypatch.setattr(cli, "_be_quiet", lambda: None)
    monkeypatch.setattr(comparison, "feature_extractor", stub_features)
    monkeypatch.setattr(comparison, "load_classifier", stub_classifier)


def test_the_prior_is_measured(run):
    measures = measure_prior(run, "classifier", 100, 3)
    assert json.loads((run.evaluation / "prior.json").read_text()) == measures
    assert measures["images"] == 10 and measures["left_out"] == {}
    assert measures["nats_per_code"] == 1.5 and measures["bits_per_dim"] == 0.25
    assert measures["settings"]["temperature"] == 1 and measures["seed"] == 3
    for kind in ("real", "reconstructions", "samples"):
        names = {"frechet", "precision", "recall", "density", "coverage", "agreement"}
        assert set(measures[kind]) == names
        assert measures[kind]["frechet"] > 0
    check_nearest(run, measures)
    lines = prior_lines(measures)
    assert lines[0] == "sets of 10 images by as many of the validation split"
    assert lines[1].split() == ["real", "reconstructions", "samples"]
    distances = [f"{measures[kind]['frechet']:.3f}" for kind in lines[1].split()]
    assert lines[2].split() == ["Fréchet", "distance", *distances]
    assert lines[-1] == "held-out codes: 1.500 nats per code, 0.2500 bits per dimension"
    assert "features: classifier, 3 neighbours" in lines


def check_nearest(run, measures):
    extract = stub_features(run, "classifier")
    reference = comparison.ReferenceSet(run, 100, "classifier", 3)
    training = np.stack([reference.training_image(index) for index in range(20)])
    held_out = np.concatenate([images for images, _ in reference.real("validation")])
    meter = SampleEvaluator(run, reference, 4, 3)
    rows = range(10)
    drawn = np.concatenate(
        [meter.sample_again(SamplerSettings(), rows[i : i + 4]) for i in (0, 4, 8)]
    )

    def distances(images):
        return np.linalg.norm(extract(images)[:, None] - extract(training), axis=-1)

    found = measures["nearest"]
    np.testing.assert_allclose(found["median"], np.median(distances(drawn).min(1)), rtol=1e-4)
    np.testing.assert_allclose(found["held_out"], np.median(distances(held_out).min(1)), rtol=1e-4)
    own = distances(drawn)
    ordered = [own[row, index] for row, index in found["pairs"]]
    np.testing.assert_allclose(ordered, np.sort(own.min(axis=1)), rtol=1e-4, atol=1e-4)
    with Image.open(run.evaluation / "nearest.png") as picture:
        assert picture.size == (10 * 68 + 4, 2 * 68 + 4)


def test_a_sweep_goes_on_where_it_was_killed(run, capsys, monkeypatch):
    measured = []
    whole = SampleEvaluator.samples

    def samples(self, settings, title):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append((settings.temperature, settings.guidance))
        return whole(self, settings)

    words = ["evaluate", str(run.root), "--num", "8", "--store"]
    words += ["--sweep", "temperature=0,1", "guidance=1,3"]
    with monkeypatch.context() as patch:
        patch.setattr(SampleEvaluator, "samples", samples)
        assert main(words) == 130
        path = run.evaluation / "sweep.json"
        first = json.loads(path.read_text())["results"]
        assert len(first) == 2
    capsys.readouterr()

    def watched(self, settings, title):
        measured.append((settings.temperature, settings.guidance))
        return whole(self, settings, title)

    with monkeypatch.context() as patch:
        patch.setattr(SampleEvaluator, "samples", watched)
        assert main(words) == 0
    said = capsys.readouterr()
    assert measured == [(0.0, 1.0), (0.0, 3.0), (1.0, 1.0), (1.0, 3.0)]
    lines = said.out.splitlines()
    # The bar has the name of the one that was not measured yet.
    assert "temperature 1.0, guidance 3.0 100%" in said.err
    found = json.loads(path.read_text())
    assert found["images"] == 8 and found["features"] == "classifier"
    results = found["results"]
    assert results[:2] == first
    swept = [(r["settings"]["temperature"], r["settings"]["guidance"]) for r in results]
    assert swept == [(0.0, 1.0), (0.0, 3.0), (1.0, 1.0), (1.0, 3.0)]
    best = min(range(4), key=lambda index: results[index]["frechet"])
    assert lines[0] == "8 images at each setting (--num), seed 0, classifier features"
    assert lines[1].split()[:2] == ["temperature", "guidance"]
    assert [line.startswith("* ") for line in lines[2:6]] == [i == best for i in range(4)]
    assert f"{results[0]['frechet']:.3f}" in lines[2]
    assert (run.evaluation / "sweep.png").read_bytes().startswith(b"\x89PNG")
    stored = Run(run.root).default_settings()
    assert (stored.temperature, stored.guidance) == swept[best]
    assert stored.batch_size == 4
    # Measured with another seed, nothing is known: the first is to be measured again.
    monkeypatch.setattr(SampleEvaluator, "samples", samples)
    measured[:] = [None, None]
    assert main([*words, "--seed", "5"]) == 130


def test_without_a_distance_there_is_no_best(prepared_run, tiny_config):
    from vqbeam.pipelines.evaluation.evaluate import evaluate

    run, pixels = prepared_run(tiny_config(), labels=())
    add_models(run, pixels, labels=())
    with pytest.raises(VqbeamError, match="cannot be measured: no classes"):
        evaluate(str(run.root), sweep={"temperature": [1.0]})


def test_settings_without_effect_are_refused(run):
    from vqbeam.pipelines.evaluation.evaluate import evaluate

    with pytest.raises(VqbeamError, match="guidance_power is 2.0, .* set it to cosine"):
        evaluate(str(run.root), sweep={"guidance_power": [2.0, 3.0]})


def test_a_run_that_cannot_be_guided(prepared_run, tiny_config, capsys):
    from vqbeam.pipelines.evaluation.evaluate import evaluate

    run, pixels = prepared_run(tiny_config(prior__label_dropout=0.0))
    add_models(run, pixels)
    with pytest.raises(
        VqbeamError, match="guidance is 2, .* prior.label_dropout 0,.* set guidance to 1"
    ):
        evaluate(str(run.root), sweep={"guidance": [1.0, 2.0]}, store=True)
    assert Run(run.root).default_settings().guidance == 1
    evaluate(str(run.root), sweep={"temperature": [0.5]}, store=True)
    said = capsys.readouterr().out
    # It has no more to hold out.
    assert said.startswith("10 images at each setting") and "10 images are too few" in said
