import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from vqbeam.pipelines.cli import main as cli
from vqbeam.pipelines.cli.main import main
from vqbeam.pipelines.sampling.api import Run
from vqbeam.vqvae.storage.records import open_dataset, read_split

pytestmark = pytest.mark.slow

# Prints what a program without TensorFlow and vqbeam reads, in one form for both kinds of files.
READS = """
import io, json, sys
import numpy as np

class Forbid:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"tensorflow", "keras", "vqbeam", "tensorflow_datasets"}:
            raise ImportError(f"{name} is forbidden")

sys.meta_path.insert(0, Forbid())
path, names = sys.argv[1], ("key", "split", "label", "codes")
if path.endswith(".npz"):
    arrays = np.load(path)
    columns = {name: arrays[name] for name in names}
    facts, codebook = json.loads(str(arrays["vqbeam"])), arrays["codebook"]
else:
    import pyarrow.parquet
    table = pyarrow.parquet.read_table(path)
    facts = json.loads(table.schema.metadata[b"vqbeam"])
    codebook = np.load(io.BytesIO(table.schema.metadata[b"codebook"]))
    columns = {name: np.array(table[name].to_pylist()) for name in names}
    columns["codes"] = columns["codes"].reshape(-1, *facts["shape"])
found = {name: values.tolist() for name, values in columns.items()}
print(json.dumps(found | {"facts": facts, "codebook": codebook.tolist()}))
"""


@pytest.fixture(autouse=True)
def loud(monkeypatch):
    monkeypatch.setattr(cli, "_be_quiet", lambda: None)


def read_elsewhere(path):
    words = [sys.executable, "-c", READS, str(path)]
    result = subprocess.run(words, cwd=path.parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout)


def recorded(folder):
    """The columns as the dataset of codes has them."""
    columns = {"key": [], "split": [], "label": [], "codes": []}
    for split in ("train", "validation"):
        for example in read_split(open_dataset(folder), split).as_numpy_iterator():
            columns["key"].append(example["key"].decode())
            columns["split"].append(split)
            columns["label"].append(example["label"].tolist())
            columns["codes"].append(example["codes"].tolist())
    return columns


@pytest.mark.parametrize("name", ["codes.npz", "new/codes.parquet"])
def test_programs_without_tensorflow_read_the_codes(finished_run, tmp_path, capsys, name):
    path = tmp_path / name
    assert main(["export-codes", str(finished_run.root), "--output", str(path)]) == 0
    assert capsys.readouterr().out == f"codes of 24 images: {path}\n"
    assert [file.name for file in path.parent.iterdir()] == [pathlib.Path(name).name]
    found = read_elsewhere(path)
    expected = recorded(finished_run.folder("encode"))
    assert {column: found[column] for column in expected} == expected
    run = Run(finished_run.root)
    np.testing.assert_array_equal(np.float32(found["codebook"]), run.codebook)
    facts = found["facts"]
    assert facts["label_names"] == list(run.labels) and facts["label_kind"] == "classes"
    assert facts["shape"] == [2, 2] and facts["num_codes"] == 12
    assert facts["vqvae"] == finished_run.result_hash("train-vqvae")


def test_batches_follow_each_other(finished_run, tmp_path, monkeypatch):
    from vqbeam.pipelines.sampling import export

    monkeypatch.setattr(export, "_ROWS", 5)
    for name in ("codes.npz", "codes.parquet"):
        export.export_codes(str(finished_run.root), str(tmp_path / name))
    assert read_elsewhere(tmp_path / "codes.npz") == read_elsewhere(tmp_path / "codes.parquet")
    assert (
        read_elsewhere(tmp_path / "codes.npz")["key"]
        == recorded(finished_run.folder("encode"))["key"]
    )


def test_other_endings_are_refused(failure, finished_run, tmp_path):
    said = failure("export-codes", finished_run.root, "--output", tmp_path / "codes.csv")
    assert "give a name that ends in .npz or .parquet" in said
