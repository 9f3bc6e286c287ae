import os

import pytest

from configs import DataConfig
from pipelines.places import absolute, located


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


def test_sources(monkeypatch):
    monkeypatch.setattr(os, "getcwd", lambda: "/here")

    def moved(source, data_dir=None):
        found = located(DataConfig(source=source, data_dir=data_dir))
        return found.source, found.data_dir

    assert moved("folder:photos") == ("folder:/here/photos", None)
    assert moved("folder:gs://bucket/photos") == ("folder:gs://bucket/photos", None)
    assert moved("tfds:cifar10", "datasets") == ("tfds:cifar10", "/here/datasets")
    assert moved("glyphs") == ("glyphs", None)
