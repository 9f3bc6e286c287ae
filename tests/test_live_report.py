"""The page of a run while it is trained, and what the page says to programs."""

import csv
import io
import json
import re

import keras
import numpy as np
import pytest
from pipeline_fixtures import small_config
from report_pages import Page, check_self_contained

from vqbeam.pipelines.cli.main import parse
from vqbeam.pipelines.cli.parser import UsageError
from vqbeam.pipelines.report.facts import comparison
from vqbeam.pipelines.report.page import LivePage, written
from vqbeam.vqvae.storage.run_folder import RunFolder
from vqbeam.vqvae.training import train_vqvae


class Reader(keras.callbacks.Callback):
    """Loads the page when an epoch begins, after it was written."""

    def __init__(self, run):
        super().__init__()
        self.path, self.pages = run.root / "report.html", []

    def on_epoch_begin(self, epoch, logs=None):
        self.pages.append(Page(self.path.read_text()))


def reloads(page):
    return [found["content"] for found in page.all("meta", http_equiv="refresh")]


@pytest.mark.backend
@pytest.mark.slow
def test_a_page_shows_training_as_it_goes(prepared_run, tiny_config, monkeypatch):
    monkeypatch.setattr("vqbeam.pipelines.report.page._LARGEST_SHARE", 1e9)
    run, _ = prepared_run(tiny_config(vqvae__steps=4))
    reader = Reader(run)
    train_vqvae(str(run.root), [LivePage(str(run.root), "train-vqvae"), reader])
    assert len(reader.pages) == 2
    history = run.manifest("train-vqvae")["history"]
    assert "No epoch is complete yet" in reader.pages[0].text
    for done, page in enumerate(reader.pages):
        check_self_contained(page)
        assert reloads(page) == ["30"] and "Training is under way" in page.text
        tips = " ".join(found.get("data-tip", "") for found in page.all("g"))
        assert {int(epoch) for epoch in re.findall(r"epoch (\d+)", tips)} == {*range(1, done + 1)}
        assert all(f"{epoch['val_loss']:.4g} held out" in tips for epoch in history[:done])
    first, last = reader.pages[0], reader.pages[-1]
    original, copy = "Held-out image 1", "Reconstruction of held-out image 1"
    np.testing.assert_array_equal(first.picture(original), last.picture(original))
    assert (first.picture(copy) != last.picture(copy)).any()
    assert written(RunFolder(run.root))
    final = Page((run.root / "report.html").read_text())
    assert reloads(final) == [] and "under way" not in final.text


@pytest.mark.slow
def test_short_epochs_leave_pages_out(prepared_run, tiny_config):
    run, _ = prepared_run(tiny_config())
    page = LivePage(str(run.root), "train-prior")
    page.on_epoch_begin(0)
    before = (run.root / "report.html").read_bytes()
    (run.root / "report.html").unlink()
    page.on_epoch_begin(1)
    assert not (run.root / "report.html").exists()
    page.due = 0.0
    page.on_epoch_begin(2)
    assert (run.root / "report.html").read_bytes() == before


@pytest.mark.slow
def test_a_page_that_cannot_be_written_is_one_line(prepared_run, tiny_config, capsys):
    run, _ = prepared_run(tiny_config())
    (run.root / "report.html").mkdir()
    page = LivePage(str(run.root), "train-prior")
    for epoch in range(3):
        page.due = 0.0
        page.on_epoch_begin(epoch)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{run.root}/report.html cannot be written: ")
    assert [path.name for path in (run.root).iterdir() if "report" in path.name] == ["report.html"]


@pytest.fixture
def runs(tmp_path):
    """Two runs that differ in one setting, of which one has figures."""
    one, other = RunFolder(tmp_path / "a"), RunFolder(tmp_path / "b")
    one.start(small_config("glyphs"))
    other.start(small_config("glyphs", vqvae__width=16))
    output = one.folder("encode") / "shard"
    one.begin("encode")
    output.write_text("codes")
    one.finish("encode", [output], counts={"train": 7}, perplexity=[3.5, 4.5], codes_used=[5, 6])
    return [str(run.root) for run in (one, other)]


def test_runs_compared_as_json(runs):
    found = json.loads(comparison(runs, "json"))
    assert found["differing"] == ["vqvae.width"]
    one, other = found["runs"]
    assert [one["run"], other["run"]] == runs
    assert (one["settings"]["vqvae.width"], other["settings"]["vqvae.width"]) == ("8", "16")
    figures = {name: value for name, value in one["figures"].items() if "seconds" not in name}
    assert figures == {
        "encode.counts.train": 7,
        "encode.perplexity.0": 3.5,
        "encode.perplexity.1": 4.5,
        "encode.codes_used.0": 5,
        "encode.codes_used.1": 6,
    }
    assert other["figures"] == {}


def test_runs_compared_as_a_table(runs):
    rows = list(csv.reader(io.StringIO(comparison(runs, "csv"))))
    assert rows[:3] == [["name", *runs], ["preset", "small", "small"], ["vqvae.width", "8", "16"]]
    assert ["encode.counts.train", "7", ""] in rows
    assert len({row[0] for row in rows}) == len(rows)


def test_arguments_of_the_comparison():
    assert parse(["inspect", "d"])[1] == {"run_dirs": ["d"], "form": None}
    assert parse(["inspect", "d", "e", "--csv"])[1] == {"run_dirs": ["d", "e"], "form": "csv"}
    with pytest.raises(UsageError, match="--json and --csv exclude each other"):
        parse(["inspect", "d", "--json", "--csv"])
