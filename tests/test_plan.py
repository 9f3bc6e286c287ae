"""What `run` says before it begins."""

import re

import pytest
from pipeline_fixtures import small_config, write_images

from vqbeam.pipelines import budget, plan
from vqbeam.pipelines.budget import Part, Trial, measure, parts_of, seconds_per_image, survey
from vqbeam.pipelines.plan import announce, foretell, plan_lines
from vqbeam.vqvae.fitting.progress import seconds_after, seconds_of_bar
from vqbeam.vqvae.storage.run_folder import STAGES, RunFolder

COUNTS = {"train": 900, "validation": 100}
TRIALS = {"train vqvae": Trial(0.2, 3.0, 5000), "train prior": Trial(0.1, 3.0, 7000)}


@pytest.fixture
def source(tmp_path):
    write_images(tmp_path / "source", 24)
    return f"folder:{tmp_path / 'source'}"


@pytest.fixture(autouse=True)
def _nothing_foretold():
    yield
    seconds_of_bar.clear()
    seconds_after.clear()


def test_a_bar_knows_what_comes_after_it():
    foretell(
        [
            Part("prepare", "prepare", 1, 10),
            Part("train-vqvae", "train vqvae", 2, 20, 3),
            Part("encode", "encode", 4, 40),
        ]
    )
    assert seconds_of_bar == {"prepare": 10, "train vqvae": 20, "encode": 40}
    assert seconds_after == {"prepare": 2 + 20 + 3 + 4 + 40, "train vqvae": 3 + 44, "encode": 0}


def test_the_plan_fits_into_60_columns_and_adds_up(tmp_path):
    run, config = RunFolder(tmp_path / "run"), small_config("glyphs", vqvae__steps=2000)
    parts = [
        Part("prepare", "prepare", 1, 9),
        Part("train-vqvae", "train vqvae", 3, 60, 7),
        Part("train-vqvae", "decoder", 3, 40),
        Part("train-prior", "train prior", 3, 3600),
    ]
    lines = plan_lines(run, config, list(STAGES), parts, COUNTS, TRIALS, {"train-vqvae": 500})
    assert max(len(line) for line in lines[1:]) < 60
    words = {line.split()[0]: line for line in lines}
    assert words["prepare"].split(maxsplit=1)[1].split("  ")[0] == "1,000 images"
    assert "2,000 steps of 8, 500 done" in words["train-vqvae"]
    assert words["train-vqvae"].endswith("about 1:53")
    assert words["train-prior"].endswith("about 1:00:03")
    assert words["in"].split() == ["in", "all", "about", "1:02:06"]
    assert words["disk"].endswith(" free")
    assert "5,000 parameters" in words["train"] or "7,000 parameters" in words["train"]
    assert "cpu:0 with" in words["device"] and words["memory"].split()[2] in ("MB", "GB")


def test_a_full_disk_is_told_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda _: type("", (), {"free": 1000}))
    run, config = RunFolder(tmp_path / "new" / "run"), small_config("glyphs")
    lines = plan_lines(run, config, ["prepare"], [], COUNTS, {}, {})
    assert any("the disk is too full" in line for line in lines)


def test_short_trainings_are_not_tried(tmp_path, source, capsys):
    run, config = RunFolder(tmp_path / "run"), small_config(source)
    run.start(config)
    announce(run, config, list(STAGES))
    said = capsys.readouterr().err
    assert "24 images" in said and f"{config.vqvae.steps} steps" in said
    assert "in all" not in said and "train-prior" in said
    assert said.endswith("\n  classes      3: Banana, apple, cherry\n")


def test_steps_that_are_done_take_no_time(tmp_path, source, capsys):
    steps = {"vqvae__steps": 2000, "vqvae__steps_per_epoch": 1000}
    run, config = RunFolder(tmp_path / "run"), small_config(source, **steps)
    run.start(config)
    folder = run.folder("train-vqvae") / "checkpoints" / "f"
    folder.mkdir(parents=True)
    told = []
    for steps in (0, 1000):
        (folder / f"step-{steps:08d}.weights.h5").write_text("")
        announce(run, config, ["train-vqvae"], TRIALS)
        (line,) = re.findall(r"  train-vqvae .* about (\d+):(\d+)", capsys.readouterr().err)
        told.append(60 * int(line[0]) + int(line[1]))
    parts = parts_of(config, TRIALS, survey(run, config)[0], 0.0)
    (part,) = [part for part in parts if part.title == "train vqvae"]
    assert told == pytest.approx([part.seconds, part.seconds - part.bar / 2], abs=1)


@pytest.mark.slow
def test_every_training_is_tried_and_timed(tmp_path, source, capsys):
    config = small_config(source, vqvae__finetune_steps=2, vqvae__perceptual=1.0)
    trials = measure(config, list(STAGES), 0.0, fewest=1)
    assert "measuring the speed of this machine ...\n" in capsys.readouterr().err
    assert list(trials) == ["train vqvae", "features", "decoder", "train prior"]
    assert all(trial.step > 0 and trial.start > 0 for trial in trials.values())
    from vqbeam.vqvae.building import build_model

    model = build_model(config, data_variance=1.0)
    weights = sum(variable.numpy().size for variable in model.trainable_variables)
    assert trials["train vqvae"].parameters == weights
    assert measure(config, ["prepare", "encode"], 0.0, fewest=1) == {}
    run = RunFolder(tmp_path / "run")
    run.start(config)
    announce(run, config, list(STAGES), trials)
    assert "in all" in capsys.readouterr().err
    assert 0 < seconds_after["encode"] < seconds_after["decoder"] < seconds_after["train vqvae"]
    assert 0 < seconds_per_image(config, survey(run, config)[1]) < 1


def test_images_are_counted_where_that_takes_no_pass_over_them(tmp_path, source):
    run, config = RunFolder(tmp_path / "run"), small_config(source)
    counts, unit = survey(run, config)
    assert sum(counts.values()) == 24 and set(counts) == {"train", "validation"}
    other = small_config(f"tfrecord:{tmp_path}")
    assert survey(run, other) == ({}, None)


@pytest.mark.slow
def test_trials_take_few_steps_at_a_time(tiny_config, monkeypatch):
    asked = []
    monkeypatch.setattr(budget, "steps_per_call", lambda steps: asked.append(steps) or 1)
    config = tiny_config(vqvae__steps=1000, vqvae__steps_per_epoch=1000)
    measure(config, ("train-vqvae",), 0, fewest=1)
    assert asked == [10]
