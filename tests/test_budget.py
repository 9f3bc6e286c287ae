import re

import pytest

from vqbeam.configs import load_preset, override
from vqbeam.pipelines import budget
from vqbeam.pipelines.budget import Trial, parts_of, scaled, with_steps_of
from vqbeam.pipelines.sources import Unit
from vqbeam.vqvae.storage.labels import Labels
from vqbeam.vqvae.storage.records import Shard

TRIALS = {
    "train vqvae": Trial(0.2, 9.0, 100),
    "features": Trial(0.05, 4.0, 100),
    "decoder": Trial(0.3, 9.0, 100),
    "train prior": Trial(0.1, 6.0, 100),
}
COUNTS = {"train": 50_000, "validation": 10_000}
UNIT = Unit(Shard("images", "train", 0, 1), [], Labels(()), 0)


def steps(config):
    return config.vqvae.steps, config.vqvae.finetune_steps, config.prior.steps


def preset(**changes):
    base = {
        "vqvae.steps": 6000,
        "vqvae.steps_per_epoch": 500,
        "vqvae.finetune_steps": 1000,
        "vqvae.perceptual": 1.0,
        "prior.steps": 3000,
        "prior.steps_per_epoch": 500,
    }
    return override(load_preset("cifar10"), base | changes)


def fit(config, seconds):
    return scaled(config, seconds, TRIALS, COUNTS, prepare=1e-3)


def seconds(config):
    return sum(part.seconds for part in parts_of(config, TRIALS, COUNTS, prepare=1e-3))


def test_the_time_is_used_and_divided_as_in_the_preset():
    config = preset()
    fitted = fit(config, 3600)
    # All that is not a step has its part of the time, too: this much.
    one, decoder, two = steps(config)
    rest = seconds(config) - (one * 0.2 + decoder * (0.3 + 0.05) + two * 0.1)
    assert rest > 9 + 4 + 9 + 6 + 60_000 * 1e-3
    assert seconds(fitted) == pytest.approx(3600, rel=0.02)
    one, decoder, two = steps(fitted)
    assert one * 0.2 + decoder * 0.35 + two * 0.1 == pytest.approx(3600 - rest, rel=0.02)
    assert one == 6 * decoder and two == pytest.approx(one / 2, rel=0.05)
    assert fitted.vqvae.steps_per_epoch % 10 == fitted.prior.steps_per_epoch % 10 == 0
    assert fitted.vqvae.steps // fitted.vqvae.steps_per_epoch == 12
    assert fitted.prior.steps // fitted.prior.steps_per_epoch == 6
    # The warm-up of 200 steps is the same share of them.
    assert fitted.prior.warmup_steps == round(200 / 3000 * two)
    assert fitted.vqvae.warmup_steps == pytest.approx(200 / 6000 * one, abs=1)
    assert override(fitted, {}) == fitted  # it is valid
    assert with_steps_of(config, fitted) == fitted


def test_minutes_are_filled(monkeypatch, capsys):
    monkeypatch.setattr(budget, "measure", lambda *_, **__: TRIALS)
    monkeypatch.setattr(budget, "seconds_per_image", lambda *_: 1e-3)
    fitted, trials = budget.fit_to_minutes(preset(), 60, COUNTS, UNIT)
    # Loading the libraries takes some seconds, too.
    assert trials == TRIALS and seconds(fitted) == pytest.approx(3600 - 8, rel=0.02)
    said = capsys.readouterr().out
    assert f"train prior: {fitted.prior.steps:,} steps (100 ms each)" in said
    assert "too few" not in said
    budget.fit_to_minutes(preset(), 1, COUNTS, UNIT)
    least = float(
        re.search(r"1 minutes are too few: .* takes about (\d+)", capsys.readouterr().out)[1]
    )
    rest = seconds(
        override(
            preset(),
            {
                "vqvae.steps": 12,
                "vqvae.finetune_steps": 2,
                "vqvae.steps_per_epoch": 1,
                "prior.steps": 6,
                "prior.steps_per_epoch": 1,
            },
        )
    )
    assert least == pytest.approx((rest + 8) / 60, abs=1)


def test_each_part_counts_what_it_does():
    parts = {part.title: part for part in parts_of(preset(), TRIALS, COUNTS, prepare=1e-3)}
    assert list(parts) == ["prepare", *list(TRIALS)[:3], "encode", "train prior", "sample"]
    assert parts["prepare"].bar == pytest.approx(60)
    assert parts["features"].seconds == pytest.approx(4 + 500 * 0.05)
    config = preset()
    # A forward pass is a third of a step: of 2,048 held-out images after each of 12 epochs.
    validation = 12 * 2048 / config.vqvae.batch_size * 0.2 / 3
    assert parts["train vqvae"].bar == pytest.approx(6000 * 0.2 + validation)
    assert parts["train vqvae"].end > 10_000 / config.vqvae.batch_size * 0.2 / 3
    # Twice the samples, twice the time.
    more = parts_of(preset(**{"sample.num": 2 * config.sample.num}), TRIALS, COUNTS, 1e-3)
    assert more[-1].bar == pytest.approx(2 * parts["sample"].bar) and parts["sample"].bar > 0


def test_what_is_not_trained_takes_no_time():
    trials = {"train prior": TRIALS["train prior"]}
    titles = [part.title for part in parts_of(preset(), trials, {}, prepare=0.0)]
    assert titles == ["prepare", "train prior", "sample"]


def test_the_shortest_time_is_a_step_an_epoch():
    assert steps(fit(preset(), 1e-6)) == (12, 2, 6)


def test_an_epoch_longer_than_training():
    config = preset(**{"prior.steps_per_epoch": 5000})
    fitted = fit(config, 3600)
    assert fitted.prior.steps == fitted.prior.steps_per_epoch


def test_a_part_of_an_epoch_stays_a_part():
    config = preset(**{"prior.steps": 1234, "vqvae.finetune_steps": 100})
    fitted = fit(config, 3600)
    epochs = fitted.prior.steps / fitted.prior.steps_per_epoch
    assert epochs == pytest.approx(1234 / 500, rel=0.01)
    parts = fitted.vqvae.finetune_steps / fitted.vqvae.steps_per_epoch
    assert parts == pytest.approx(100 / config.vqvae.steps_per_epoch, rel=0.02)


def test_all_else_stays():
    config = preset()
    assert with_steps_of(fit(config, 3600), config) == config
