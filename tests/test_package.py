import json
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest
from pipeline_fixtures import write_tfds

from vqbeam.pipelines.sources.glyphs import LETTERS, SIZE

pytestmark = pytest.mark.system

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGES = ("configs", "vqvae", "prior", "pipelines", "vqbeam")


def run(*words, cwd, **environment):
    done = subprocess.run(
        list(map(str, words)),
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Returns a folder with the source distribution, and the wheel that is built from that."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    build = "from setuptools import build_meta; build_meta.build_sdist('dist')"
    run(sys.executable, "-c", build, cwd=copy)
    (source,) = (copy / "dist").glob("*.tar.gz")
    wheel = ("wheel", "--no-deps", "--no-build-isolation", "-w", source.parent, source)
    run(sys.executable, "-m", "pip", *wheel, cwd=copy)
    return source.parent


def test_the_package_index_takes_both(built):
    pytest.importorskip("twine", reason="needs pip install -e .[test]")
    files = sorted(built.iterdir())
    assert [file.suffix for file in files] == [".whl", ".gz"]
    said = run(sys.executable, "-m", "twine", "check", "--strict", *files, cwd=built)
    assert said.count("PASSED") == 2


def test_the_wheel_has_every_file_of_the_packages(built):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    wanted = set()
    for name in PACKAGES:
        for path in (ROOT / name).rglob("*.*"):
            if path.is_file() and path.suffix != ".pyc":
                place = path.relative_to(ROOT).as_posix()
                wanted.add(place if name == "vqbeam" else f"vqbeam/{place}")
    assert found == wanted


def test_an_installed_wheel_works_without_the_checkout(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    target, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    install = ("install", "-q", "--no-deps", "--target", target, wheel)
    run(sys.executable, "-m", "pip", *install, cwd=elsewhere)
    # Noise in place of all the letters, which take a minute to draw.
    counts = {"train": 70, "test": 20}
    write_tfds(tmp_path / "tfds", "glyphs", "1.0.0", (SIZE, SIZE, 3), counts, LETTERS)
    place = {"PYTHONPATH": str(target), "TFDS_DATA_DIR": str(tmp_path / "tfds")}
    words = ("run", "glyphs", "--smoke", "--run-dir", "runs/glyphs")
    said = run(sys.executable, target / "bin" / "vqbeam", *words, cwd=elsewhere, **place)
    assert "new images: runs/glyphs/samples/samples.png" in said
    manifest = json.loads((elsewhere / "runs/glyphs/images/manifest.json").read_text())
    assert manifest["label_names"] == list(LETTERS) and manifest["counts"]["train"] == 64
    assert (elsewhere / "runs/glyphs/report.html").stat().st_size > 10_000
    # The first example in Python of the README.
    example = """
        import sys, vqbeam
        samples = vqbeam.open("runs/glyphs").sample(labels=["B"] * 8, seed=1)
        print(samples.images.shape)
        ours = [m.__file__ for n, m in sys.modules.items() if n.split(".")[0] == "vqbeam"]
        print(*sorted({file for file in ours if not file.startswith(sys.argv[1])}))
    """
    code = "\n".join(line.strip() for line in example.splitlines())
    said = run(sys.executable, "-c", code, target, cwd=elsewhere, **place)
    assert said.splitlines() == ["(8, 32, 32, 3)", ""]
