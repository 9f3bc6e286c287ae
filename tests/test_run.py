import math
import os
import shutil
import subprocess
import sys
import threading
import time

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from pipeline_fixtures import small_config, write_images, write_preset

from vqbeam.configs import VqbeamError
from vqbeam.pipelines import budget
from vqbeam.pipelines import run as run_module
from vqbeam.pipelines.lock import locked
from vqbeam.pipelines.run import run_stages
from vqbeam.pipelines.stages import transforms as stages_module
from vqbeam.vqvae.storage.run_folder import MANIFEST, STAGES, RunFolder

ALL = tuple(STAGES)
BEAM = ["--runner=FnApiRunner"]
DONE = {
    "counts": {"train": 1900, "validation": 100},
    "failed": 0,
    "measures": {"psnr": 25.13, "nats_per_code": 1.234},
    "codes_used": 11,
}


@pytest.fixture
def source(tmp_path):
    write_images(tmp_path / "source", 4)
    return f"folder:{tmp_path / 'source'}"


class Ran:
    """The stages that ran, in order; kept in a file, since workers get copies of all else."""

    def __init__(self, path):
        self.path = path
        self.clear()

    def add(self, stage):
        with self.path.open("a") as file:
            file.write(f"{stage}\n")

    def clear(self):
        self.path.write_text("")

    def names(self):
        return self.path.read_text().split()


@pytest.fixture
def ran(monkeypatch, tmp_path):
    """Replaces each stage by one that only writes its manifest; returns what ran."""
    ran = Ran(tmp_path / "ran.txt")

    def transform(stage, gpu_hint):
        def finish(run_path):
            ran.add(stage)
            run = RunFolder(run_path)
            run.begin(stage)
            run.finish(stage, [], **DONE, attempt=time.time())
            return run_path

        return beam.Map(finish)

    monkeypatch.setattr(stages_module, "transform", transform)
    return ran


def go(run_dir, source, stages=ALL, beam_args=BEAM, retrain=(), minutes=None, **changes):
    extend = changes.pop("extend", False)
    config = small_config(source, **changes)
    run_stages(config, str(run_dir), stages, beam_args, retrain, minutes, extend)


@pytest.mark.slow
def test_a_run_that_training_starts_from(ran, tmp_path, source, capsys):
    parent, child = RunFolder(tmp_path / "parent"), RunFolder(tmp_path / "child")
    given = {f"{section}__init_from": str(parent.root) for section in ("vqvae", "prior")}
    with pytest.raises(VqbeamError, match="parent has no finished train-vqvae stage to start from"):
        go(child.root, source, **given)
    assert not child.exists()
    # A run that lacks the prior, which is no fault if it is meant for both.
    go(parent.root, source, ALL[:2])
    model = parent.result_hash("train-vqvae")[:16]
    with pytest.raises(VqbeamError, match="parent has no finished train-prior stage to start from"):
        go(child.root, source, prior__init_from=str(parent.root))
    go(child.root, source, **given)
    config = child.load_config()
    assert config.vqvae.init_from == f"{parent.root}@{model}" and config.prior.init_from is None
    # The same command later, whatever has become of the parent.
    go(parent.root, source, ALL[:2], retrain=["train-vqvae"])
    go(child.root, source, **given)
    go(child.root, source, vqvae__init_from=config.vqvae.init_from)
    parent.root.rmtree()
    go(child.root, source, **given)
    assert child.load_config() == config
    assert capsys.readouterr().out.count("train-prior: done already") == 3
    with pytest.raises(VqbeamError, match=r"vqvae.init_from: .*@.{16} → None.*; choose another"):
        go(child.root, source)


@pytest.mark.slow
def test_more_steps(ran, tmp_path, source):
    go(tmp_path / "run", source)
    ran.clear()
    with pytest.raises(VqbeamError, match="a different config .vqvae.steps: 4 → 8"):
        go(tmp_path / "run", source, vqvae__steps=8)
    run = RunFolder(tmp_path / "run")
    place = run.folder("train-vqvae") / "checkpoints" / run.fingerprint("train-vqvae")
    place.mkdir(parents=True)
    (place / "step-00000004.weights.h5").write_text("")
    go(tmp_path / "run", source, vqvae__steps=8, extend=True)
    assert ran.names() == ["train-vqvae", "encode", "train-prior", "sample"]
    # A prior of the codes of before is not replaced unasked, nor are its checkpoints.
    place = run.folder("train-prior") / "checkpoints" / run.fingerprint("train-prior")
    place.mkdir(parents=True)
    (place / "step-00000004.weights.h5").write_text("")
    with pytest.raises(VqbeamError, match="both vqvae.steps and prior.steps are higher.*--retrain"):
        go(tmp_path / "run", source, vqvae__steps=12, prior__steps=8, extend=True)
    assert run.is_done("train-prior") and run.load_config().vqvae.steps == 8


def test_all_stages_in_their_order(ran, tmp_path, source, capsys):
    go(tmp_path / "run", source)
    assert ran.names() == list(ALL)
    run = RunFolder(tmp_path / "run")
    assert all(run.is_done(stage) for stage in ALL)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("prepare → train-vqvae → encode → train-prior → sample: done in ")
    assert lines[1] == f"images: 1,900 train, 100 validation, in {tmp_path}/run/images"
    codes = small_config(source).vqvae.num_codes
    assert lines[2:] == [
        f"held-out reconstructions: {tmp_path}/run/vqvae/reconstructions.png",
        "their PSNR: 25.1 dB (20 is blurry, 30 is close to the original)",
        f"codes in use: 11 of {codes}",
        f"prior: 1.23 nats per code (guessing evenly costs {np.log(codes):.2f}; less is better)",
        f"new images: {tmp_path}/run/samples/samples.png",
        f"next: vqbeam sample {tmp_path}/run --output samples.png",
    ]


def test_what_was_left_out_is_told(ran, tmp_path, source, capsys, monkeypatch):
    monkeypatch.setitem(DONE, "left_out", {"files that end in .psd": 1200, "linked folders": 1})
    go(tmp_path / "run", source, ("prepare",))
    told = "left out: files that end in .psd (1,200), linked folders (1)\n"
    assert told in capsys.readouterr().out


def test_images_without_a_class_are_told(ran, tmp_path, source, capsys, monkeypatch):
    counts = {"images_per_label": {"-1": 1200, "0": 3, "1": 2}}
    monkeypatch.setitem(DONE, "label_names", ["a", "b"])
    monkeypatch.setitem(DONE, "statistics", counts)
    go(tmp_path / "run", source, ("prepare",))
    told = "classes, 2: a 3, b 2, without a class 1,200 (training images)\n"
    assert told in capsys.readouterr().out


def test_a_finished_run_is_left_alone(ran, tmp_path, source, capsys):
    go(tmp_path / "run", source)
    ran.clear()
    capsys.readouterr()
    go(tmp_path / "run", source)
    assert ran.names() == []
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": done already, in ")[0] for line in lines[:5]] == list(ALL)
    assert lines[-1].startswith("next: vqbeam sample")


@pytest.mark.slow
def test_a_finished_run_may_be_in_use(ran, tmp_path, source, capsys):
    go(tmp_path / "run", source)
    run = RunFolder(tmp_path / "run")
    with locked(run.root, "--run-dir"):
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
        capsys.readouterr()
        go(tmp_path / "run", source)
        assert capsys.readouterr().out.count("done already") == len(ALL)
        # Nothing is written for it either: the folder may be one that only others may write to.
        assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before
        with pytest.raises(VqbeamError, match=f"in use by process {os.getpid()} on"):
            go(tmp_path / "run", source, sample__num=3)


@pytest.mark.slow
def test_stage_by_stage(ran, tmp_path, source, capsys):
    for stage in ALL:
        go(tmp_path / "run", source, (stage,))
        out = capsys.readouterr().out
        assert f"{stage}: done in" in out and "next: vqbeam" in out
    assert ran.names() == list(ALL)
    go(tmp_path / "run", source)
    assert ran.names() == list(ALL)


def test_a_time_becomes_steps_which_the_same_command_keeps(
    ran, tmp_path, source, monkeypatch, capsys
):
    titles = ("train vqvae", "features", "decoder", "train prior")
    trials, measured = dict.fromkeys(titles, budget.Trial(0.01, 0.5, 100)), []
    monkeypatch.setattr(budget, "measure", lambda *_, **__: measured.append(1) or trials)
    finetuning = {"vqvae__finetune_steps": 2, "vqvae__perceptual": 1.0}
    go(tmp_path / "run", source, minutes=0.05, **finetuning)
    config = RunFolder(tmp_path / "run").load_config()
    said = capsys.readouterr().out
    assert len(measured) == 1
    for count, name in (
        (config.vqvae.steps, "train vqvae"),
        (math.ceil(config.vqvae.finetune_steps / 2), "features"),
        (config.vqvae.finetune_steps, "decoder"),
        (config.prior.steps, "train prior"),
    ):
        assert f"{name}: {count:,} steps (" in said
    # Starting up alone takes longer.
    assert "0.05 minutes are too few" in said
    go(tmp_path / "run", source, minutes=0.05, **finetuning)
    assert len(measured) == 1
    assert RunFolder(tmp_path / "run").load_config() == config
    with pytest.raises(VqbeamError, match="--minutes is for training on this machine"):
        go("gs://b/run", source, beam_args=["--runner=DataflowRunner"], minutes=1)


@pytest.mark.slow
def test_a_finished_model_is_replaced_only_when_asked(ran, tmp_path, source):
    go(tmp_path / "run", source)
    run = RunFolder(tmp_path / "run")
    run.begin("prepare")
    run.finish("prepare", [], **DONE, attempt="other images")
    ran.clear()
    with pytest.raises(VqbeamError, match="vqvae holds a finished model.*add --retrain train-vqva"):
        go(tmp_path / "run", source)
    assert ran.names() == []
    go(tmp_path / "run", source, retrain=["train-vqvae", "train-prior"])
    assert ran.names() == list(ALL[1:])
    # A prior of the model of before would be left, and refused after stage 1 has been trained.
    ran.clear()
    with pytest.raises(VqbeamError, match="prior of the model that .* add --retrain train-prior"):
        go(tmp_path / "run", source, retrain=["train-vqvae"])
    assert run.is_done("train-vqvae") and ran.names() == []
    # Nor is it deleted if only the other model is to be trained again.
    run.begin("prepare")
    run.finish("prepare", [], **DONE, attempt="yet other images")
    for alone, other in (("train-vqvae", "train-prior"), ("train-prior", "train-vqvae")):
        with pytest.raises(VqbeamError, match=f"holds a finished model.* --retrain {other}"):
            go(tmp_path / "run", source, retrain=[alone])
        assert run.manifest("train-vqvae") and run.manifest("train-prior")
    go(tmp_path / "run", source, retrain=["train-vqvae", "train-prior"])
    # Nothing is deleted if what the stage reads is not there.
    (run.folder("encode") / MANIFEST).rename(tmp_path / "away")
    with pytest.raises(VqbeamError, match="has no finished encode stage"):
        go(tmp_path / "run", source, ["train-prior"], retrain=["train-prior"])
    assert run.manifest("train-prior")
    (tmp_path / "away").rename(run.folder("encode") / MANIFEST)
    # Also where nothing has changed.
    ran.clear()
    go(tmp_path / "run", source, retrain=["train-prior"])
    assert ran.names() == list(ALL[3:])


@pytest.mark.slow
def test_an_interrupted_retraining_goes_on(ran, tmp_path, source, monkeypatch):
    go(tmp_path / "run", source)
    run, models = RunFolder(tmp_path / "run"), ["train-vqvae", "train-prior"]

    def interrupted(*_):
        run.begin("train-vqvae")
        run.finish("train-vqvae", [], **DONE, attempt="new")
        (run.folder("train-prior") / "checkpoint").mkdir(parents=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(run_module, "_run_pipeline", interrupted)
        with pytest.raises(KeyboardInterrupt):
            go(run.root, source, retrain=models)
    ran.clear()
    go(run.root, source, retrain=models)
    assert run.manifest("train-vqvae")["attempt"] == "new"
    assert (run.folder("train-prior") / "checkpoint").exists()
    assert ran.names() == list(ALL[2:])
    # Once it has finished, the same command trains them once more.
    ran.clear()
    go(run.root, source, retrain=models)
    assert ran.names() == list(ALL[1:])


@pytest.mark.parametrize("folder", ["images", "codes"])
def test_other_files_in_the_folder_of_a_stage_are_not_deleted(ran, tmp_path, folder):
    write_images(tmp_path / folder)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(VqbeamError, match=f"{folder} has files in it, and .* has no config.json"):
        go(tmp_path, f"folder:{tmp_path / folder}")
    assert sorted(tmp_path.rglob("*")) == before and ran.names() == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lost", "again"),
    [
        ("prepare", ALL),
        ("encode", ALL[2:]),
        ("sample", ALL[4:]),
    ],
)
def test_what_was_made_from_a_lost_result_is_made_again(ran, tmp_path, source, lost, again):
    go(tmp_path / "run", source)
    ran.clear()
    (RunFolder(tmp_path / "run").folder(lost) / MANIFEST).unlink()
    go(tmp_path / "run", source)
    assert ran.names() == list(again)


@pytest.mark.slow
def test_what_was_made_from_an_older_result_is_made_again(ran, tmp_path, source):
    go(tmp_path / "run", source)
    run = RunFolder(tmp_path / "run")
    (run.folder("train-vqvae") / MANIFEST).unlink()
    go(tmp_path / "run", source, ("train-vqvae",))
    ran.clear()
    # The codes are of the model of before: neither a new prior nor new images may use them.
    for stages in (("train-prior",), ("sample",)):
        with pytest.raises(VqbeamError, match="was made from inputs that have changed since; run"):
            go(tmp_path / "run", source, stages)
    assert ran.names() == []
    go(tmp_path / "run", source, retrain=["train-prior"])
    assert ran.names() == ["encode", "train-prior", "sample"]


def test_models_alone_are_enough_to_sample(ran, tmp_path, source):
    go(tmp_path / "run", source)
    run = RunFolder(tmp_path / "run")
    for stage in ("prepare", "encode", "sample"):
        run.folder(stage).rmtree()
    assert run.require("train-prior") and run.require("train-vqvae")


@pytest.mark.parametrize("stage", ALL[1:])
def test_a_stage_needs_those_before_it(ran, tmp_path, source, stage):
    with pytest.raises(VqbeamError, match="has no finished .* stage; run vqbeam .* PRESET --run"):
        go(tmp_path / "run", source, (stage,))
    assert ran.names() == [] and not (tmp_path / "run").exists()


def test_a_damaged_result_is_named(ran, tmp_path, source):
    both = ("prepare", "train-vqvae")
    go(tmp_path / "run", source, both)
    run = RunFolder(tmp_path / "run")
    model = run.folder("train-vqvae") / "model"
    model.write_text("whole")
    run.begin("train-vqvae")
    run.finish("train-vqvae", [model], **DONE)
    model.write_text("hal")
    with pytest.raises(VqbeamError, match="model has 3 bytes instead of 5; delete .*/manifest.js"):
        go(tmp_path / "run", source)
    assert ran.names() == list(both)


def test_another_config_is_refused(ran, tmp_path, source):
    go(tmp_path / "run", source, ("prepare",))
    with pytest.raises(VqbeamError, match="a different config .data.max_failed: .*; choose"):
        go(tmp_path / "run", source, data__max_failed=0.5)
    assert ran.names() == ["prepare"]


def test_a_stage_that_is_not_done_takes_new_settings(ran, tmp_path, source):
    go(tmp_path / "run", source, ("prepare",))
    go(tmp_path / "run", source, ("prepare", "train-vqvae"), vqvae__num_codes=16)
    assert ran.names() == ["prepare", "train-vqvae"]
    assert RunFolder(tmp_path / "run").load_config().vqvae.num_codes == 16


def test_a_command_that_is_refused_changes_nothing(ran, tmp_path, source):
    run = RunFolder(tmp_path / "run")
    run.start(small_config(source))
    before = {path.name: path.read_bytes() for path in run.root.iterdir()}
    with locked(run.root, "--run-dir"):
        with pytest.raises(VqbeamError, match="run is in use by process"):
            go(tmp_path / "run", source, vqvae__num_codes=16, data__height=16)
    assert {path.name: path.read_bytes() for path in run.root.iterdir()} == before
    assert ran.names() == []


@pytest.mark.slow
def test_a_folder_that_is_removed_while_a_command_is_at_work(tmp_path):
    write_images(tmp_path / "source", 300)

    def remove():
        while not list((tmp_path / "run").glob("images/.reports-*/*.json")):
            time.sleep(0.001)
        shutil.rmtree(tmp_path / "run", ignore_errors=True)

    remover = threading.Thread(target=remove)
    remover.start()
    with pytest.raises(VqbeamError, match="run was removed while this command was at work in it"):
        go(
            tmp_path / "run",
            f"folder:{tmp_path / 'source'}",
            ("prepare",),
            data__images_per_shard=1,
        )
    remover.join()


def test_a_mistyped_source_binds_no_folder(ran, tmp_path, source):
    for wrong in ("folder:/nowhere", "tfds:fashion_mnits"):
        with pytest.raises(VqbeamError, match="there is no folder|did you mean 'fashion_mnist'"):
            go(tmp_path / "run", wrong)
        assert not (tmp_path / "run").exists()
    go(tmp_path / "run", source)
    assert ran.names() == list(ALL)


def test_no_folder_can_be_made(ran, tmp_path, source):
    (tmp_path / "file").write_text("")
    with pytest.raises(VqbeamError, match="cannot write to .*; choose another --run-dir"):
        go(tmp_path / "file" / "run", source)
    assert ran.names() == []


def test_failed_images_are_named_at_the_end(ran, tmp_path, source, capsys, monkeypatch):
    monkeypatch.setitem(DONE, "failed", 3)
    go(tmp_path / "run", source, ("prepare",))
    letters = f"{tmp_path}/run/images/dead_letters.jsonl"
    assert f"could not be decoded: 3 images, listed in {letters}\n" in capsys.readouterr().out


@pytest.mark.slow
def test_dataflow_is_asked_for_a_gpu(ran, tmp_path, source, monkeypatch):
    asked, checked = [], []

    def transform(stage, gpu_hint):
        asked.append(gpu_hint)
        return beam.Map(str)

    pipeline = beam.Pipeline
    go(tmp_path / "run", source, ("prepare",))
    monkeypatch.setattr(stages_module, "transform", transform)
    monkeypatch.setattr(run_module, "check_shared", checked.append)
    # Beam's own would look for a project on Google Cloud.
    monkeypatch.setattr(beam, "Pipeline", lambda options: pipeline(runner=FnApiRunner()))
    for runner in ("FnApiRunner", "DataflowRunner"):
        go(tmp_path / "run", source, ("train-vqvae",), [f"--runner={runner}"])
    assert asked == [False, True]
    # What is prepared already may have come from anywhere.
    assert [list(places) for places in checked] == [["--run-dir"]]


def test_dataflow_cannot_reach_this_machine(tmp_path, source, monkeypatch):
    message = "workers of Dataflow cannot reach .*/run; give a gs:// path by --run-dir"
    with pytest.raises(VqbeamError, match=message):
        go(tmp_path / "run", source, beam_args=["--runner=DataflowRunner"])
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(RunFolder, "is_done", lambda self, stage: False)  # or it asks Google
    with pytest.raises(VqbeamError, match="give a gs:// path by --data.source"):
        go("gs://bucket/run", source, beam_args=["--runner=DataflowRunner"])


DONE_AGAIN = """
import sys
from vqbeam.pipelines.cli.main import main
status = main(["run", sys.argv[1], "--run-dir", sys.argv[2]])
heavy = {"tensorflow", "keras", "apache_beam", "tensorflow_datasets"} & set(sys.modules)
print(", ".join(heavy) or "nothing heavy", file=sys.stderr)
sys.exit(status)
"""


@pytest.mark.slow
def test_done_again_ends_at_once(ran, tmp_path, source):
    go(tmp_path / "run", source)
    preset = write_preset(tmp_path / "preset.py", small_config(source))
    done = subprocess.run(
        [sys.executable, "-c", DONE_AGAIN, str(preset), str(tmp_path / "run")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "nothing heavy\n"
    assert done.stdout.count("done already") == 5
