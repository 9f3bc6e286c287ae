import os

import pytest

from vqbeam.configs import DataConfig, VqbeamError
from vqbeam.pipelines.paths import (
    absolute,
    check_output,
    check_shared,
    is_supported,
    runs_here,
    source_paths,
    with_absolute_paths,
)


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("run", "/here/run"),
        ("../run/", "/run"),
        ("~/run", "/home/me/run"),
        ("/there/run", "/there/run"),
        ("gs://bucket/run", "gs://bucket/run"),
    ],
)
def test_absolute(path, place, monkeypatch):
    monkeypatch.setattr(os, "getcwd", lambda: "/here")
    monkeypatch.setenv("HOME", "/home/me")
    assert absolute(path) == place


@pytest.mark.parametrize(
    ("path", "known"),
    [
        ("gs://bucket/run", True),
        ("runs/a:b", True),
        ("/a b/c", True),
        ("gs:/bucket/run", False),
        ("s3://bucket/run", False),
        ("hdfs://host/run", False),
        ("file:///run", False),
    ],
)
def test_paths_that_can_be_used(path, known):
    assert is_supported(path) == known
    if not known:
        for data in ({"source": f"folder:{path}"}, {"source": "glyphs", "data_dir": path}):
            with pytest.raises(VqbeamError, match=f"is {path}; paths are those of this machine, o"):
                with_absolute_paths(DataConfig(**data))


def test_sources(monkeypatch):
    monkeypatch.setattr(os, "getcwd", lambda: "/here")

    def moved(source, data_dir=None):
        found = with_absolute_paths(
            DataConfig(source=source, data_dir=data_dir, manual_dir=data_dir)
        )
        assert found.manual_dir == found.data_dir
        return found.source, found.data_dir

    assert moved("folder:photos") == ("folder:/here/photos", None)
    assert moved("folder:gs://bucket/photos") == ("folder:gs://bucket/photos", None)
    assert moved("parquet:data/*.parquet") == ("parquet:/here/data/*.parquet", None)
    assert moved("array:gs://bucket/a.npz") == ("array:gs://bucket/a.npz", None)
    assert moved("tfds:cifar10", "datasets") == ("tfds:cifar10", "/here/datasets")
    assert moved("glyphs") == ("glyphs", None)


def test_files_got_by_hand_lie_where_they_can_be_found():
    data = DataConfig(source="glyphs", manual_dir="s3://bucket/raw")
    with pytest.raises(VqbeamError, match="--data.manual-dir is s3://bucket/raw; paths are those"):
        with_absolute_paths(data)


@pytest.mark.parametrize("name", ["FnApiRunner", "DirectRunner", "direct", "DIRECTRUNNER"])
def test_runners_of_this_machine_in_any_spelling(name):
    assert runs_here([f"--runner={name}"]) and runs_here([])
    assert not runs_here([f"--runner={name}", "--runner=FlinkRunner"])


def test_endings():
    for name in ("a.png", "b/a.npz", "a", "gs://b/a", "runs/v1.2", "a.new"):
        check_output(name, [".png", ".npz", ""])
    message = r"--output is 'a.jpeg'; give a name that ends in .png or .npz, or a folder$"
    with pytest.raises(VqbeamError, match=message):
        check_output("a.jpeg", [".png", ".npz", ""])
    with pytest.raises(VqbeamError, match=r"'a'; give a name that ends in .png$"):
        check_output("a", [".png"])


def test_a_folder_where_a_file_would_be_written(tmp_path):
    (tmp_path / "new.png").mkdir()
    with pytest.raises(VqbeamError, match="new.png', which is a folder; give the name of a file"):
        check_output(str(tmp_path / "new.png"), [".png", ""])
    check_output(str(tmp_path), [".png", ""])


def test_what_other_machines_cannot_reach():
    check_shared({"--run-dir": "gs://bucket/run", "--data.data-dir": "gs://bucket/data"})
    with pytest.raises(VqbeamError, match="cannot reach /here/run; give a gs:// path by --run-dir"):
        check_shared({"--data.data-dir": "gs://bucket/data", "--run-dir": "/here/run"})


def test_where_the_images_of_a_section_are():
    def places(source, data_dir=None):
        return source_paths(DataConfig(source=source, data_dir=data_dir))

    assert places("folder:/photos") == {"--data.source": "/photos"}
    assert places("folder:gs://bucket/photos") == {"--data.source": "gs://bucket/photos"}
    assert places("webdataset:/a.tar", "/data") == {"--data.source": "/a.tar"}
    assert places("tfds:cifar10", "/data") == {"--data.data-dir": "/data"}
    for source, owner in (("glyphs", "TFDS"), ("hf:me/set", "Hugging Face")):
        (place,) = places(source).values()
        assert owner in place and "://" not in place
