import pytest

from vqbeam.configs import load_preset, override
from vqbeam.pipelines.budget import scaled, with_steps_of

SECONDS = {"stage 1": 0.2, "its decoder": 0.3, "stage 2": 0.1}


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


def test_the_time_is_used_and_divided_as_in_the_preset():
    config = preset()
    fitted = scaled(config, 10, SECONDS)
    one, decoder, two = steps(fitted)
    assert one * 0.2 + decoder * 0.3 + two * 0.1 == pytest.approx(0.85 * 600, rel=0.05)
    assert one == 6 * decoder and two == pytest.approx(one / 2, rel=0.05)
    assert fitted.vqvae.steps_per_epoch % 10 == fitted.prior.steps_per_epoch % 10 == 0
    assert fitted.vqvae.steps // fitted.vqvae.steps_per_epoch == 12
    assert fitted.prior.steps // fitted.prior.steps_per_epoch == 6
    assert override(fitted, {}) == fitted  # it is valid


def test_twice_the_time_gives_twice_the_steps():
    short, long = (steps(scaled(preset(), minutes, SECONDS)) for minutes in (20, 40))
    assert [b / a for a, b in zip(short, long, strict=True)] == pytest.approx([2, 2, 2], rel=0.05)


def test_the_shortest_time_is_a_step_an_epoch():
    assert steps(scaled(preset(), 1e-6, SECONDS)) == (12, 2, 6)


def test_an_epoch_longer_than_training():
    config = preset(**{"prior.steps_per_epoch": 5000})
    fitted = scaled(config, 10, SECONDS)
    assert fitted.prior.steps == fitted.prior.steps_per_epoch


def test_all_else_stays():
    config = preset()
    assert with_steps_of(scaled(config, 10, SECONDS), config) == config
