import pathlib
import re
import shutil
import subprocess
import sys

import pytest
from pipeline_fixtures import finish_again, small_config

import vqbeam
from vqbeam.configs import VqbeamError
from vqbeam.pipelines.inspect import describe
from vqbeam.vqvae.storage.run_folder import MANIFEST, STAGES, RunFolder

pytestmark = pytest.mark.slow


@pytest.fixture
def run(finished_run, tmp_path):
    """A copy of a finished run, to be changed."""
    return RunFolder(shutil.copytree(finished_run.root, tmp_path / "run"))


def states(run):
    """Returns the first line of each stage's paragraph, without the name."""
    paragraphs = describe(str(run.root)).split("\n\n")[1:]
    assert [p.split()[0] for p in paragraphs] == list(STAGES)
    return {p.split()[0]: p.splitlines()[0].partition(" ")[2].strip() for p in paragraphs}


def test_a_finished_run(finished_run):
    text = describe(str(finished_run.root))
    head = text.partition("\n\n")[0].splitlines()
    assert head[0] == f"run      {finished_run.root}"
    assert head[1] == "preset   small, seed 0"
    assert head[2].startswith("data     folder:") and head[2].endswith(", 8×8×3")
    assert head[3] == "codes    2×2 grid, K = 12, vector quantizer, D = 4, codebook by ema"
    done = re.compile(r"done in [\d.]+ m?i?n? ?s?.*, \d{4}-\d\d-\d\d \d\d:\d\d")
    assert all(done.fullmatch(state) for state in states(finished_run).values())
    counts = finished_run.manifest("prepare")["counts"]
    shown = f"{counts['train']} train, {counts['validation']} validation"
    assert sum(counts.values()) == 24
    assert f"  24 images: {shown}\n  3 classes\n  could not be decoded: 1\n" in text
    assert f"  24 grids: {shown}\n" in text
    manifests = {stage: finished_run.manifest(stage) for stage in STAGES}
    vqvae, prior = (manifests[stage]["measures"] for stage in ("train-vqvae", "train-prior"))
    for fact in (
        f"MSE {vqvae['mse']:.1f} of 255²",
        f"PSNR {vqvae['psnr']:.2f} dB",
        f"perplexity {vqvae['perplexity']:.0f}",
        f"perplexity {manifests['encode']['perplexity']:.0f}",
        f"{manifests['encode']['codes_used']} codes",
        f"{prior['nats_per_code']:.3f} nats per code",
        f"{prior['bits_per_dim']:.4f} bits per dimension",
        f"{manifests['train-prior']['parameters']:,} parameters",
        f"last losses {manifests['train-prior']['history'][-1]['loss']:.4f} in training, "
        f"{manifests['train-prior']['history'][-1]['val_loss']:.4f} held out",
        "guidance 2.0",
    ):
        assert fact in text, fact
    size = sum(
        path.stat().st_size
        for path in pathlib.Path(finished_run.folder("encode")).rglob("*")
        if path.name != MANIFEST and path.is_file()
    )
    unit = f"{size} bytes" if size < 1000 else f"{size / 1000:.0f} kB"
    assert f"{finished_run.folder('encode')}, {unit}" in text


def test_codes_of_several_levels(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.start(small_config("glyphs", vqvae__quantizer="residual", vqvae__depth=2))
    counts = {"train": 3, "validation": 2}
    measures = dict(mse=1, psnr=48, reconstruction=0.1, perplexity=5, codes_used=0.5)
    history = [{"loss": 1, "val_loss": 1}]
    for stage, facts in {
        "prepare": dict(counts=counts, label_names=["a", "b"], label_kind="attributes", failed=0),
        "train-vqvae": dict(parameters=9, measures=measures, history=history),
        "encode": dict(counts=counts, perplexity=[6.3, 8.8], codes_used=[7, 10]),
    }.items():
        run.begin(stage)
        run.finish(stage, [], **facts)
    lines = describe(str(run.root)).splitlines()
    wanted = "codes    2×2 grid of 2 codes each, K = 12, residual quantizer, D = 4, codebook by ema"
    assert wanted in lines
    uses = [line.strip() for line in lines if line.startswith("  codebook use")]
    assert uses == [
        "codebook use, level 0: perplexity 6, 7 of 12 codes",
        "codebook use, level 1: perplexity 9, 10 of 12 codes",
    ]
    assert "  2 attributes" in lines


def test_a_run_that_was_only_started(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.start(small_config("glyphs"))
    assert set(states(run).values()) == {"not begun"}


def test_begun_stages(run):
    (run.folder("train-prior") / MANIFEST).unlink()
    (run.folder("encode") / MANIFEST).unlink()
    (run.folder("sample")).rmtree()
    reports = run.folder("encode") / f".reports-{run.fingerprint('encode')}"
    reports.rmtree()  # of the finished stage
    reports.mkdir()
    older = run.folder("encode") / ".reports-of-other-settings"
    older.mkdir()
    (older / "codes-0.json").write_text("{}")
    found = states(run)
    assert found["train-prior"] == "begun, 4 steps done"
    assert found["encode"] == "begun" and found["sample"] == "not begun"
    assert found["train-vqvae"].startswith("done in")
    for shard in range(3):
        (reports / f"codes-{shard}.json").write_text("{}")
    assert states(run)["encode"] == "begun, 3 shards written"
    reports.rmtree()


def test_stale_stages(run):
    # Trained anew, with the same result and with another.
    finish_again(run, "train-vqvae")
    assert all(state.startswith("done") for state in states(run).values())
    measures = run.manifest("train-vqvae")["measures"]
    finish_again(run, "train-vqvae", measures=measures | {"mse": 0.0})
    found = states(run)
    stale = {stage for stage, state in found.items() if state.startswith("stale: made from inputs")}
    assert stale == {"encode", "train-prior", "sample"}


def test_a_run_that_is_handed_over(run, capsys):
    for stage in ("prepare", "encode", "sample"):
        for path in run.folder(stage).iterdir():
            if path.name != MANIFEST:
                path.rmtree() if path.is_dir() else path.unlink()
    shutil.rmtree(run.folder("train-vqvae") / "logs")
    (run.folder("train-vqvae") / "reconstructions.png").unlink()
    found = states(run)
    for stage in STAGES:
        is_here = stage in ("train-vqvae", "train-prior")
        assert found[stage].startswith("done in")
        assert found[stage].endswith("; its files are not here") != is_here
    for stage in ("prepare", "encode", "sample"):
        shutil.rmtree(run.folder(stage))
    assert states(run)["train-prior"].startswith("done in")
    assert len(vqbeam.open(run.root).sample(3).images) == 3


def test_a_damaged_stage_does_not_hide_the_others(run):
    shard = next(run.folder("encode").glob("codes-train.tfrecord-*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    found = states(run)
    assert re.match(
        f"damaged: .*{shard.name} has .* bytes instead of .*; run vqbeam", found["encode"]
    )
    assert found["train-vqvae"].startswith("done in")


def test_a_manifest_changed_by_hand_does_not_hide_the_others(run):
    manifest = run.folder("train-prior") / MANIFEST
    manifest.write_text(manifest.read_text().replace('"parameters": ', '"parameters": 1'))
    found = states(run)
    assert re.match("damaged: .*manifest.json is not as vqbeam writes it", found["train-prior"])
    assert found["train-vqvae"].startswith("done in") and found["encode"].startswith("done in")


def test_no_run(tmp_path):
    with pytest.raises(VqbeamError, match="is not a run folder: it has no config.json"):
        describe(str(tmp_path / "nowhere"))


def test_starts_without_the_heavy_libraries(finished_run):
    code = """
import sys
from vqbeam.pipelines.cli.main import main
main(["inspect", sys.argv[1]])
sys.exit(", ".join({"tensorflow", "keras", "apache_beam"} & set(sys.modules)) or 0)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(finished_run.root)], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "bits per dimension" in done.stdout
