import subprocess
import sys

import pytest
import tensorflow_datasets as tfds
from commands import ROOT
from pipeline_fixtures import small_config

from vqbeam.configs import VqbeamError
from vqbeam.pipelines.sources import open_source
from vqbeam.pipelines.sources.glyphs import Glyphs

BEAM = ["--runner=FnApiRunner"]


def data(source, **changes):
    return small_config(source, **{f"data__{k}": v for k, v in changes.items()}).data


def test_a_host_that_cannot_be_reached(tmp_path, monkeypatch, capsys):
    settings = data("tfds:fashion_mnist", data_dir=str(tmp_path))

    def unreachable(self, **_):
        # What to do is said before TFDS begins its retries, which take minutes.
        said = capsys.readouterr().out
        assert "fashion_mnist/3.0.1 is not in" in said and "--data.data-dir" in said
        raise ConnectionError("Max retries exceeded\nwith url: /x")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", unreachable)
    open_source(settings).check()  # says nothing of a dataset that is only not there yet
    with pytest.raises(VqbeamError) as caught:
        open_source(settings).download(BEAM)
    assert str(caught.value) == (
        "TFDS could not prepare fashion_mnist/3.0.1 (Max retries exceeded); where its host cannot "
        "be reached, prepare it elsewhere and give its folder by --data.data-dir"
    )


@pytest.mark.slow
def test_another_command_prepares_it_at_the_same_time(tmp_path, monkeypatch):
    monkeypatch.setattr(Glyphs, "COUNTS", {"train": 10, "test": 4})
    prepare = tfds.core.DatasetBuilder.download_and_prepare

    def twice(self, **options):
        prepare(self, **options)
        raise OSError("Cannot rename incomplete. Destination already exists.")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", twice)
    source = open_source(data("glyphs", data_dir=str(tmp_path)))
    source.download(BEAM)
    assert source.builder().is_prepared()


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device", "/a/b"),
        RuntimeError("KeyboardInterrupt [while running 'Glyphs/Map']"),
    ],
    ids=["full disk", "Ctrl-C within Beam"],
)
def test_what_is_not_the_hosts_fault(tmp_path, monkeypatch, error):
    def fail(self, **_):
        raise error

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fail)
    with pytest.raises(type(error)) as caught:
        open_source(data("tfds:fashion_mnist", data_dir=str(tmp_path))).download(BEAM)
    assert caught.value is error


INTERRUPTED = """
import os, signal, sys, threading, time
import tensorflow_datasets as tfds
from vqbeam.pipelines.sources import open_source
from vqbeam.pipelines.sources.glyphs import Glyphs
from vqbeam.configs import DataConfig

def download(self, **_):
    # A thread that Python would wait for, as it waits for a host.
    threading.Thread(target=time.sleep, args=(300,)).start()
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    time.sleep(300)

tfds.core.DatasetBuilder.download_and_prepare = download
open_source(DataConfig(source="tfds:fashion_mnist", data_dir=sys.argv[1])).download([])
"""


@pytest.mark.system
def test_ctrl_c_does_not_wait_for_a_host(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=200,
    )
    assert done.returncode == 130
    assert done.stderr.endswith("\nvqbeam: interrupted; run the same command to go on\n")
