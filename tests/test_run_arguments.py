import pytest
from argument_checks import refusal

from vqbeam import configs
from vqbeam.pipelines.cli.main import parse


def test_reconstruct_inspect_and_presets():
    given = parse(["reconstruct", "d", "--output", "a.png"])[1]
    assert given == {"run_dir": "d", "output": "a.png", "num": 16}
    assert parse(["inspect", "d"])[1] == {"run_dirs": ["d"], "form": None}
    assert parse(["presets"])[1] == {"preset": None}


def test_gradients_of_a_preset(preset):
    assert parse(["gradients", preset])[1] == {
        "config": configs.load_preset(preset),
        "run_dir": None,
        "output": "gradients.png",
        "straight_through": True,
        "steps": 200,
    }
    words = ["--no-straight-through", "--steps=9", "--output", "a.png"]
    words += ["--seed", "4", "--data.data_dir", "/d", "--vqvae.num-codes", "64"]
    given = parse(["gradients", preset, *words])[1]
    changes = {"seed": 4, "data.data_dir": "/d", "vqvae.num_codes": 64}
    assert given == {
        "config": configs.override(configs.load_preset(preset), changes),
        "run_dir": None,
        "output": "a.png",
        "straight_through": False,
        "steps": 9,
    }


def test_gradients_of_a_run(tmp_path, monkeypatch):
    given = parse(["gradients", str(tmp_path)])[1]
    assert (given["config"], given["run_dir"]) == (None, str(tmp_path))
    said = refusal("gradients", str(tmp_path), "--vqvae.num-codes", "64")
    where = f"--vqvae.num-codes is for presets, and {tmp_path} is a folder"
    assert said == f"vqbeam gradients: {where} (see vqbeam gradients --help)"
    assert parse(["gradients", "gs://bucket/run"])[1]["run_dir"] == "gs://bucket/run"
    # A preset's name is that of the preset, whatever lies beside it.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "glyphs").mkdir()
    assert parse(["gradients", "glyphs"])[1]["config"] == configs.load_preset("glyphs")
    assert parse(["gradients", "./glyphs"])[1]["run_dir"] == "./glyphs"


def test_gradients_of_nothing():
    with pytest.raises(configs.VqbeamError) as caught:
        parse(["gradients", "runs/gone"])
    assert str(caught.value).startswith("there is no folder 'runs/gone', and no preset is named ")
    assert "'s3://bucket/run' cannot be used; paths are" in refusal("gradients", "s3://bucket/run")
    with pytest.raises(configs.VqbeamError, match="^there is no preset file 'gone.py'"):
        parse(["gradients", "gone.py"])
    with pytest.raises(configs.VqbeamError, match="^--vqvae.num-codes is 1; it must be at least 2"):
        parse(["gradients", "glyphs", "--vqvae.num-codes", "1"])
