import json
import struct
import sys

import pytest
from etils import epath

from vqbeam.configs import VqbeamError, override
from vqbeam.pipelines.cli.main import main
from vqbeam.vqvae.fitting.metric_writers import CsvFile, WandbRun, metric_writers


@pytest.fixture
def path(tmp_path):
    return epath.Path(tmp_path / "metrics.csv")


def row(epoch, **metrics):
    return {"epoch": epoch, "step": 10 * epoch, **metrics}


def write(path, epochs, *rows):
    file = CsvFile(path)
    file.start(epochs)
    for each in rows:
        file.write(each)
    file.close()


def test_lines_of_epochs_that_come_once_more_are_replaced(path):
    write(path, 0, row(1, loss=0.1), row(2, loss=1e-7), row(3, loss=0.25))
    write(path, 2, row(3, loss=0.5))
    assert path.read_text() == "epoch,step,loss\n1,10,0.1\n2,20,1e-07\n3,30,0.5\n"
    write(path, 0, row(1, loss=2.0))
    assert path.read_text() == "epoch,step,loss\n1,10,2.0\n"


def test_a_metric_that_not_all_epochs_have(path):
    write(path, 0, row(1, loss=0.1), row(2, loss=0.2, images_per_second=7.5))
    assert path.read_text() == "epoch,step,loss,images_per_second\n1,10,0.1,\n2,20,0.2,7.5\n"


@pytest.mark.parametrize(
    "content", [b"a,b\n1,2\n", b"epoch\nfirst\n", b"\xff\xfe", b"epoch\n\n,3\n"]
)
def test_a_file_of_somebody_else_is_left_alone(path, content):
    path.write_bytes(content)
    with pytest.raises(VqbeamError, match="metrics.csv is not as vqbeam writes it; move it else"):
        write(path, 1, row(2, loss=0.1))
    assert path.read_bytes() == content


def test_all_are_used_that_are_named(tmp_path, tiny_config):
    def kinds(log):
        config = override(tiny_config(), {"log": log})
        folder = epath.Path(tmp_path)
        return [type(writer).__name__ for writer in metric_writers(config, "t", folder, folder)]

    assert kinds(None) == ["TensorBoard"]
    assert kinds("csv") == ["TensorBoard", "CsvFile"]
    assert kinds("wandb:a") == ["TensorBoard", "WandbRun"]
    assert kinds("csv,wandb:a") == ["TensorBoard", "CsvFile", "WandbRun"]


class WithoutWandb:
    """An import hook for an environment in which wandb is not installed."""

    def find_spec(self, name, path=None, target=None):
        if name == "wandb":
            raise ModuleNotFoundError("No module named 'wandb'")


def test_a_missing_package_is_told_before_any_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "meta_path", [WithoutWandb(), *sys.meta_path])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    run = tmp_path / "run"
    assert main(["run", "glyphs", "--run-dir", str(run), "--log", "wandb:letters"]) == 1
    told = "vqbeam: --log wandb needs the package wandb: pip install wandb\n"
    assert capsys.readouterr().err == told
    assert not run.exists()


@pytest.fixture
def wandb(monkeypatch):
    wandb = pytest.importorskip("wandb", reason="needs pip install -e .[wandb]")
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.teardown()  # it reads the environment once
    return wandb


def rows_of(folder):
    """Returns the rows in the file of a run that was offline, which has one block of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("run-*.wandb")
    data, rows, place = file.read_bytes(), [], 7  # after the head of the file
    assert len(data) < 2**15
    while place < len(data):
        _, length, _ = struct.unpack_from("<IHB", data, place)
        record = Record.FromString(data[place + 7 : place + 7 + length])
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({i.key or i.nested_key[0]: json.loads(i.value_json) for i in items})
        place += 7 + length
    return rows


@pytest.mark.slow
def test_a_run_of_weights_and_biases_goes_on_after_a_restart(wandb, tmp_path, tiny_config):
    def part(project, epochs, *rows):
        kept = epath.Path(tmp_path / "wandb.json")
        run = WandbRun(project, "train prior", tiny_config(), epath.Path(tmp_path / "logs"), kept)
        run.start(epochs)
        for each in rows:
            run.write(each)
        run.close()
        return json.loads(kept.read_text())["id"]

    first = part("letters", 0, row(1, loss=0.5), row(2, loss=0.25))
    assert part("letters", 2, row(3, loss=0.125)) == first
    other = part("numbers", 3)
    assert other != first
    folders = sorted((tmp_path / "logs" / "wandb").glob("offline-run-*"))
    assert sorted(folder.name.rpartition("-")[2] for folder in folders) == sorted(
        [first, first, other]
    )
    found = [rows_of(folder) for folder in folders if folder.name.endswith(first)]
    losses = [[(r["_step"], r["epoch"], r["loss"]) for r in rows] for rows in found]
    assert sorted(losses) == [[(10, 1, 0.5), (20, 2, 0.25)], [(30, 3, 0.125)]]


@pytest.mark.slow
def test_weights_and_biases_without_a_login_is_one_line(wandb, tmp_path, tiny_config, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "no key")
    folder = epath.Path(tmp_path)
    run = WandbRun("letters", "train prior", tiny_config(), folder, folder / "wandb.json")
    with pytest.raises(VqbeamError) as caught:
        run.start(0)
    told = str(caught.value)
    assert told.startswith("wandb cannot start a run in the project letters: ")
    assert "wandb login" in told and "\n" not in told
    run.close()
