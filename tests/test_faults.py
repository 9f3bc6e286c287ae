import json
import os
import re
import signal
import time

import numpy as np
import pytest
from commands import SIGNS, started, status_of, wait_for
from pipeline_fixtures import (
    drawn_pixels,
    png,
    read_keys,
    small_config,
    write_images,
    write_preset,
)

from vqbeam.pipelines.cli import main as cli
from vqbeam.pipelines.run import run_stages
from vqbeam.vqvae.fitting.fit import load_model
from vqbeam.vqvae.storage.run_folder import STAGES, RunFolder
from vqbeam.vqvae.training import MODEL_FILE

pytestmark = pytest.mark.slow

IMAGES = 60


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with images, large ones so that it takes a while to prepare them, and a preset."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "source" / "a").mkdir(parents=True)
    (folder / "source" / "b").mkdir()
    numbers = np.random.default_rng(0)
    for kind in ("a", "b"):
        data = png(numbers.integers(0, 256, (600, 600, 3), np.uint8))
        for index in range(IMAGES // 2):
            # What comes behind a PNG is not read, but makes it no copy of another.
            (folder / "source" / kind / f"{index:02d}.png").write_bytes(data + bytes([index]))
    config = small_config(
        f"folder:{folder / 'source'}",
        data__images_per_shard=3,
        vqvae__steps=24,
        prior__steps=24,
        prior__dropout=0.1,
        prior__weight_ema=0.7,
        prior__grad_accumulation=2,
        prior__early_stopping=12,
    )
    return folder, config, write_preset(folder / "preset.py", config)


def start_run(place, run_dir):
    folder, _, preset = place
    return started(folder / "log.txt", "run", preset, "--run-dir", run_dir)


# How the command is ended in each stage, its exit status, and the last line that it writes.
ENDS = {
    "prepare": (signal.SIGKILL, -signal.SIGKILL, ""),
    "train-vqvae": (signal.SIGTERM, -signal.SIGTERM, "ended by SIGTERM; step .* is saved: run the"),
    "encode": (signal.SIGKILL, -signal.SIGKILL, ""),
    "train-prior": (signal.SIGINT, 130, "vqbeam: interrupted; run the same command to go on"),
}


def end_in(stage, place, run_dir):
    """Starts the run and ends it by a signal once the stage has begun to write."""
    number, status, told = ENDS[stage]
    log = place[0] / "log.txt"
    with start_run(place, run_dir) as process:
        wait_for(SIGNS[stage], run_dir, process, log)
        process.send_signal(number)
        assert process.wait(60) == status
    assert re.match(told, log.read_text().splitlines()[-1])


def weights(run, stage):
    return load_model(run.folder(stage) / MODEL_FILE).weights


@pytest.mark.system
def test_ended_in_each_stage_and_run_again(place, compiled, interruptible):
    folder, config, _ = place
    run = RunFolder(folder / "run")
    for stage in SIGNS:
        end_in(stage, place, folder / "run")
        # It was in the middle of that stage, and no other.
        assert run.manifest(stage) is None
        before = list(STAGES)[: list(STAGES).index(stage)]
        assert all(run.is_done(name) for name in before)
    with start_run(place, folder / "run") as process:
        assert process.wait(300) == 0, (folder / "log.txt").read_text()
    assert all(run.is_done(stage) for stage in STAGES)

    # Every image is there exactly once, and nothing else is.
    expected = sorted(f"{kind}/{i:02d}.png" for kind in "ab" for i in range(IMAGES // 2))
    for stage in ("prepare", "encode"):
        assert sorted(read_keys(run.folder(stage))) == expected
        found = {path.name for path in run.folder(stage).iterdir()}
        reports = f".reports-{run.fingerprint(stage)}"
        assert found == {*run.manifest(stage)["outputs"], "manifest.json", reports}

    # And the models are those of a run that nothing has broken off.
    unbroken = RunFolder(folder / "unbroken")
    run_stages(config, str(unbroken.root), tuple(SIGNS), ["--runner=FnApiRunner"])
    for stage in ("train-vqvae", "train-prior"):
        one, two = weights(run, stage), weights(unbroken, stage)
        assert len(one) > 5
        for a, b in zip(one, two, strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=a.path)
        assert len(run.manifest(stage)["history"]) == 12


@pytest.mark.system
def test_generate_killed_and_run_again(finished_run, tmp_path):
    log = tmp_path / "log.txt"
    words = ("generate", finished_run.root, "--num", 150, "--shard-images", 3)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert status_of(log, *words, "--output", whole) == 0, log.read_text()
    with started(log, *words, "--output", killed) as process:
        wait_for("*/samples.jsonl", killed, process, log)
    done = len(list(killed.glob("*/samples.jsonl")))
    assert 0 < done < 50
    assert status_of(log, *words, "--output", killed) == 0, log.read_text()
    pictures = [sorted(path.relative_to(f) for path in f.rglob("*.png")) for f in (whole, killed)]
    assert pictures[0] == pictures[1] and len(pictures[0]) == 150
    for name in pictures[0]:
        assert (whole / name).read_bytes() == (killed / name).read_bytes()


@pytest.mark.system
def test_a_second_command_in_the_same_folder(place, failure, tmp_path):
    with start_run(place, tmp_path / "run") as process:
        wait_for(".lock.json", tmp_path / "run", process, place[0] / "log.txt")
        line = failure("run", place[2], "--run-dir", tmp_path / "run")
        assert f"run is in use by process {process.pid} on " in line


def test_one_image_in_a_hundred_is_corrupt(tmp_path):
    keys = sorted(write_images(tmp_path / "source", 300))
    damaged = keys[7], keys[150], keys[299]
    for key, content in zip(damaged, (b"", b"no image", None), strict=True):
        file = tmp_path / "source" / key
        file.write_bytes(file.read_bytes()[:50] if content is None else content)
    config = small_config(f"folder:{tmp_path / 'source'}", data__images_per_shard=50)
    run_stages(config, str(tmp_path / "run"), ("prepare",), ["--runner=FnApiRunner"])
    run = RunFolder(tmp_path / "run")
    letters = (run.folder("prepare") / "dead_letters.jsonl").read_text().splitlines()
    assert {json.loads(line)["key"] for line in letters} == set(damaged)
    assert sorted(read_keys(run.folder("prepare"))) == sorted(set(keys) - set(damaged))


@pytest.mark.system
def test_a_clock_that_jumps(finished_run, tmp_path, monkeypatch):
    clock, run = time.time, RunFolder(tmp_path / "run")
    # By an hour or two, forwards and backwards, every half second.
    monkeypatch.setattr(time, "time", lambda: clock() + 3600 * (int(2 * time.monotonic()) % 3 - 1))
    beam_args = ["--runner=FnApiRunner"]
    run_stages(finished_run.load_config(), str(run.root), tuple(STAGES), beam_args)
    monkeypatch.undo()
    np.testing.assert_array_equal(drawn_pixels(run), drawn_pixels(finished_run))
    assert min(run.manifest(stage)["seconds"] for stage in STAGES) >= 0


def test_words_that_are_not_known(failure, finished_run, tmp_path):
    root = finished_run.root
    new = tmp_path / "new"
    assert "did you mean 'glyphs'" in failure("run", "glyps", "--run-dir", new)
    assert "did you mean sample?" in failure("smaple", root)
    assert "did you mean --runner?" in failure("run", "glyphs", "--run-dir", new, "--runer=X")
    assert "did you mean --num?" in failure("sample", root, "--nun", 3)
    wrong = ("--data.source", "tfds:cifra10")
    assert "did you mean 'cifar10'?" in failure("run", "glyphs", "--run-dir", new, *wrong)
    assert "no label 'melon'; it has Banana, " in failure("sample", root, "--label", "melon")
    assert not new.exists()


def test_a_folder_with_no_image(failure, tmp_path):
    (tmp_path / "empty").mkdir()
    for name, message in [("empty", "holds no image"), ("nowhere", "there is no folder")]:
        source = f"folder:{tmp_path / name}"
        words = ("run", "glyphs", "--run-dir", tmp_path / "new", "--data.source", source)
        assert message in failure(*words)
    assert not (tmp_path / "new").exists()


def test_no_write_permission(failure, tmp_path):
    write_images(tmp_path / "source", 4)
    source = ("--data.source", f"folder:{tmp_path / 'source'}")
    (tmp_path / "file").write_text("")
    # Nobody, not even root, makes a folder in /sys.
    for place in (tmp_path / "file", tmp_path / "file" / "run", "/sys/vqbeam"):
        message = failure("prepare", "glyphs", "--run-dir", place, *source)
        told = f"cannot write to {place} (", f"{place} is a file, not a folder"
        assert any(line in message for line in told) and "choose another --run-dir" in message


def test_no_write_permission_for_samples(failure, finished_run, tmp_path):
    (tmp_path / "file").write_text("")
    output = ("--output", tmp_path / "file" / "samples.png")
    assert str(tmp_path / "file") in failure("sample", finished_run.root, *output, alone=False)


def times(folder):
    return {path: os.stat(path).st_mtime_ns for path in folder.glob("*.tfrecord-*")}


@pytest.mark.parametrize("stage", ["prepare", "encode"])
def test_a_truncated_shard(failure, own_run, stage):
    run, preset = own_run
    shard = next(run.folder(stage).glob("*-train.tfrecord-00001-*"))
    manifest, content = run.manifest(stage), shard.read_bytes()
    models = {name: run.result_hash(name) for name in ("train-vqvae", "train-prior")}
    shard.write_bytes(content[:-7])
    following = list(STAGES)[list(STAGES).index(stage) + 1]
    message = failure(following, preset, "--run-dir", run.root)
    assert f"{shard} has " in message and f"run vqbeam {stage} PRESET --run-dir" in message
    # That shard is written again, and nothing else.
    before = times(run.folder(stage))
    assert cli.main(["run", str(preset), "--run-dir", str(run.root)]) == 0
    after = times(run.folder(stage))
    assert {path for path in after if after[path] != before[path]} == {shard}
    assert shard.read_bytes() == content
    assert run.manifest(stage)["sha256"] == manifest["sha256"]
    assert models == {name: run.result_hash(name) for name in models}
    assert all(run.is_done(name) for name in STAGES)


def damaged_shard(run, stage, split):
    """Flips a bit in the last shard of a split; returns its path."""
    shard = max(run.folder(stage).glob(f"*-{split}.tfrecord-*"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(bytes(content))
    return shard


@pytest.mark.parametrize(
    ("stage", "split", "words"),
    [
        ("prepare", "validation", ("reconstruct", "--output", "a.png")),
        ("prepare", "validation", ("evaluate", "--stage", "vqvae")),
        ("encode", "train", ("export-codes", "--output", "a.npz")),
    ],
)
def test_a_damaged_record_that_another_command_reads(
    failure, own_run, monkeypatch, stage, split, words
):
    run, preset = own_run
    monkeypatch.setattr("vqbeam.pipelines.evaluation.features._MOST_STEPS", 4)
    shard = damaged_shard(run, stage, split)
    before = times(run.folder(stage))
    message = failure(words[0], run.root, *words[1:], alone=False)
    assert f"a record in {shard} is damaged" in message and f"delete {shard}" in message
    # The report has all else.
    assert cli.main(["report", str(run.root)]) == 0
    assert f"a record in {shard} is damaged" in (run.root / "report.html").read_text()
    shard.unlink()
    assert cli.main([stage, str(preset), "--run-dir", str(run.root)]) == 0
    after = times(run.folder(stage))
    assert [path for path in after if after[path] != before[path]] == [shard]
    assert cli.main([words[0], str(run.root), *words[1:]]) == 0


@pytest.mark.parametrize(
    ("stage", "following"),
    [("prepare", "train-vqvae"), ("prepare", "encode"), ("encode", "train-prior")],
)
def test_a_damaged_record(failure, own_run, stage, following):
    run, preset = own_run
    run.folder(following).rmtree()
    shard = damaged_shard(run, stage, "train")
    message = failure(following, preset, "--run-dir", run.root, alone=False)
    assert f"a record in {shard} is damaged" in message and f"delete {shard}" in message
    assert not run.is_done(following)
    # What it says helps.
    shard.unlink()
    assert cli.main([stage, str(preset), "--run-dir", str(run.root)]) == 0
    assert run.is_done(stage)


@pytest.mark.parametrize("stage", ["train-vqvae", "encode"])
def test_a_manifest_edited_by_hand(failure, own_run, stage):
    run, preset = own_run
    path = run.folder(stage) / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["outputs"] = dict.fromkeys(manifest["outputs"], 0)
    path.write_text(json.dumps(manifest))
    message = failure("run", preset, "--run-dir", run.root)
    assert f"{path} is not as vqbeam writes it" in message
    assert f"delete it and run vqbeam {stage} PRESET --run-dir {run.root} again" in message
    # What it says helps.
    path.unlink()
    assert cli.main(["run", str(preset), "--run-dir", str(run.root)]) == 0
    assert all(run.is_done(name) for name in STAGES)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_codes", 16, "2×2 grid, K = 12, the run's config says 2×2 grid, K = 16; delete"),
        ("downsampling", 2, "2×2 grid, K = 12, the run's config says 4×4 grid, K = 12; delete"),
    ],
)
def test_a_model_that_does_not_match(failure, own_run, field, value, message):
    run, _ = own_run
    config = json.loads((run.root / "config.json").read_text())
    config["vqvae"][field] = value
    (run.root / "config.json").write_text(json.dumps(config))
    assert message in failure("sample", run.root)
    assert message in failure("reconstruct", run.root, "--output", run.root / "x.png")


def test_a_run_of_another_config(failure, own_run):
    run, preset = own_run
    words = ("run", preset, "--run-dir", run.root, "--vqvae.num-codes", 16, "--prior.layers", 2)
    message = failure(*words)
    assert "a different config (vqvae.num_codes: 12 → 16; prior.layers: 1 → 2)" in message
    assert all(run.is_done(stage) for stage in STAGES)


def test_a_stage_that_is_not_there(failure, own_run):
    run, preset = own_run
    run.folder("train-prior").rmtree()
    message = failure("sample", run.root)
    assert "has no finished train-prior stage; run vqbeam train-prior PRESET" in message
    run.folder("train-vqvae").rmtree()
    message = failure("encode", preset, "--run-dir", run.root)
    assert "has no finished train-vqvae stage" in message
    for verb in (("sample",), ("inspect",), ("reconstruct", "--output", "x.png")):
        message = failure(verb[0], run.root / "nowhere", *verb[1:])
        assert "nowhere is not a run folder" in message
