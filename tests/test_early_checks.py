import subprocess
import sys

import pytest
from pipeline_fixtures import small_config, write_preset

from vqbeam.configs import VqbeamError
from vqbeam.pipelines.cli.main import check, parse
from vqbeam.vqvae.storage.run_folder import RunFolder

NAMES = ["Banana", "apple"]


@pytest.fixture
def run(tmp_path):
    """A run whose models are manifests alone."""
    run = RunFolder(tmp_path / "run")
    run.start(small_config("glyphs"))
    for stage in ("prepare", "train-vqvae", "encode", "train-prior"):
        run.begin(stage)
        run.finish(stage, [], label_names=NAMES)
    return run


GOOD = {
    "sample": ["--label", "apple", "0", "--output", "a.npz"],
    "generate": ["--num", "3", "--label", "banana", "--output", "a.b"],
    "complete": ["--input", "x.png", "--keep", "top-half", "--output", "folder"],
    "interpolate": ["--from", "apple", "--to", "1", "--output", "a.png"],
    "reconstruct": ["--output", "a.png"],
    "score": ["--input", "x.png", "--label", "apple"],
    "export": ["--output", "1"],
    "export-codes": ["--output", "a.parquet"],
    "evaluate": [],
    "inspect": [],
}


@pytest.mark.parametrize("verb", GOOD)
def test_what_is_right_passes(run, verb):
    check(*parse([verb, str(run.root), *GOOD[verb]]))


@pytest.mark.parametrize(
    ("verb", "words", "message"),
    [
        ("sample", ["--output", "a.jpg"], "--output is 'a.jpg'; give a name that ends in .png or"),
        ("complete", ["--output", "a.npz"], "a name that ends in .png, or a folder"),
        ("interpolate", ["--output", "a"], "--output is 'a'; give a name that ends in .png"),
        ("reconstruct", ["--output", "a.gif"], "--output is 'a.gif'; give a name that ends in"),
        ("sample", ["--label", "apple", "plum"], "the run has no label 'plum'; it has Banana, ap"),
        ("generate", ["--label", "2"], "no label '2'; it has Banana, apple, or by number 0 to 1"),
        ("interpolate", ["--to", "plum"], "the run has no label 'plum'"),
        ("score", ["--label", "plum"], "the run has no label 'plum'"),
    ],
)
def test_what_is_wrong_is_told(run, verb, words, message):
    with pytest.raises(VqbeamError, match=message):
        check(*parse([verb, str(run.root), *GOOD[verb], *words]))


@pytest.mark.parametrize(
    "verb, name", [("sample", "a.png"), ("complete", "b"), ("score", "c.jsonl")]
)
def test_what_is_replaced_is_told_before(run, verb, name, tmp_path, capsys):
    output = tmp_path / name
    words = [verb, str(run.root), *GOOD[verb], "--output", str(output)]
    check(*parse(words))
    assert capsys.readouterr().err == ""
    if output.suffix:
        output.write_text("")
        told = f"{output} exists: it will be replaced\n"
    else:
        (output / "of mine").mkdir(parents=True)
        told = (
            f"{output} is not empty: files of the same names will be replaced, and images that an "
            "earlier command listed there\n"
        )
    check(*parse(words))
    assert capsys.readouterr().err == told


@pytest.mark.parametrize("verb", ["sample", "generate", "complete", "interpolate", "score"])
def test_what_is_not_trained_yet(run, verb):
    (run.folder("train-prior") / "manifest.json").unlink()
    with pytest.raises(VqbeamError, match="has no finished train-prior stage; run vqbeam train-p"):
        check(*parse([verb, str(run.root), *GOOD[verb]]))
    (run.folder("prepare") / "manifest.json").unlink()
    with pytest.raises(VqbeamError, match="has no finished prepare stage; run vqbeam prepare"):
        check(*parse(["evaluate", str(run.root)]))
    with pytest.raises(VqbeamError, match="nowhere is not a run folder"):
        check(*parse([verb, f"{run.root}/nowhere", *GOOD[verb]]))


def test_stages(tmp_path):
    def stages(verb, source, folder):
        preset = write_preset(tmp_path / "preset.py", small_config(source))
        return parse([verb, str(preset), "--run-dir", str(folder)])

    (tmp_path / "file").write_text("")
    check(*stages("run", f"folder:{tmp_path}", tmp_path / "new"))
    check(*stages("train-prior", "folder:/nowhere", tmp_path / "new"))  # has its images already
    with pytest.raises(VqbeamError, match="there is no folder '/nowhere'; check the path in data"):
        check(*stages("run", "folder:/nowhere", tmp_path / "new"))
    with pytest.raises(VqbeamError, match="file is a file, not a folder; choose another --run-dir"):
        check(*stages("run", "glyphs", tmp_path / "file"))


def test_images_are_not_asked_for_again(run):
    words = ["run", "glyphs", "--run-dir", str(run.root), "--data.source", "folder:/nowhere"]
    check(*parse(words))
    run.begin("prepare")  # its manifest is gone
    with pytest.raises(VqbeamError, match="there is no folder"):
        check(*parse(words))


def test_nothing_heavy_is_loaded_for_it(run):
    code = """
import sys
from vqbeam.pipelines.cli.main import main
run, lines = sys.argv[1], []
lines.append(["sample", run, "--label", "plum"])
lines.append(["sample", run, "--output", "a.jpg"])
lines.append(["export", run + "/nowhere", "--output", "1"])
lines.append(["run", "glyphs", "--run-dir", run + "-new", "--data.source", "folder:/nowhere"])
print([main(line) for line in lines])
sys.exit(", ".join({"tensorflow", "keras", "apache_beam"} & set(sys.modules)) or 0)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(run.root)], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "[1, 1, 1, 1]\n"), done.stderr
    assert done.stderr.count("vqbeam: ") == done.stderr.count("\n") == 4
