import subprocess
import sys

import numpy as np
import pytest
from measured_run import add_models

from vqbeam.configs import VqbeamError
from vqbeam.pipelines.cli import main as cli
from vqbeam.pipelines.cli.main import main
from vqbeam.pipelines.sampling.api import Run
from vqbeam.pipelines.sampling.export import export
from vqbeam.pipelines.sampling.sample import sample

pytestmark = pytest.mark.slow

# TensorFlow imports Keras by itself where it is there: it is taken away again.
LOADS = """
import sys
import tensorflow as tf
import numpy as np

FORBIDDEN = {"vqbeam", "keras", "keras_nlp", "keras_hub"}
for name in [name for name in sys.modules if name.partition(".")[0] in FORBIDDEN]:
    del sys.modules[name]

class Forbid:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in FORBIDDEN:
            raise ImportError(f"{name} is forbidden")

sys.meta_path.insert(0, Forbid())
signatures = tf.saved_model.load(sys.argv[1]).signatures
with np.load(sys.argv[2]) as arrays:
    labels, images = arrays["labels"], arrays["images"]
drawn = signatures["sample"](labels=tf.constant(labels), seed=tf.constant(5, tf.int64))
codes = signatures["encode"](images=tf.constant(images))["codes"]
decoded = signatures["decode"](codes=drawn["codes"])["images"]
np.savez(sys.argv[3], encoded=codes, decoded=decoded, **drawn)
assert not FORBIDDEN & {name.partition(".")[0] for name in sys.modules}
"""


@pytest.fixture(scope="module")
def run(prepared_run, tiny_config):
    config = tiny_config(sample__guidance=2.0, sample__temperature=0.9, sample__batch_size=4)
    run, pixels = prepared_run(config)
    return run, add_models(run, pixels)[0]


@pytest.fixture(autouse=True)
def loud(monkeypatch):
    monkeypatch.setattr(cli, "_be_quiet", lambda: None)


@pytest.mark.system
def test_draws_the_same_images_without_vqbeam_and_keras(run, tmp_path, capsys):
    run, vqvae = run
    folder = tmp_path / "models" / "1"
    assert main(["export", str(run.root), "--output", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split(maxsplit=1) == ["encode", "images uint8 [?, 8, 8, 1]"]
    assert lines[1].split() == ["→", "codes", "int32", "[?,", "2,", "2]"]
    assert [line.split()[0] for line in lines[::2]] == [
        "encode",
        "decode",
        "sample",
        "sample_with_settings",
        "SavedModel:",
    ]
    assert [path.name for path in folder.parent.iterdir()] == ["1"]
    drawn, found = tmp_path / "drawn.npz", tmp_path / "found.npz"
    sample(str(run.root), num=6, seed=5, output=str(drawn))
    words = [sys.executable, "-c", LOADS, str(folder), str(drawn), str(found)]
    result = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    with np.load(drawn) as expected, np.load(found) as arrays:
        np.testing.assert_array_equal(arrays["codes"], expected["codes"])
        for name in ("images", "decoded"):
            difference = arrays[name].astype(int) - expected["images"]
            assert np.abs(difference).max() <= 1
        encoded = np.asarray(vqvae.encode(expected["images"]))
        np.testing.assert_array_equal(arrays["encoded"], encoded)


def test_in_the_precision_of_the_run(run, tmp_path):
    import tensorflow as tf

    opened = Run(run[0].root)
    stored = opened.store_default_settings(opened.settings(precision="fast"))
    try:
        export(str(run[0].root), str(tmp_path / "fast"))
    finally:
        stored.unlink()
    weights = tf.saved_model.load(str(tmp_path / "fast")).weights
    assert {weight.dtype for weight in weights} >= {tf.bfloat16, tf.float32}


def test_a_folder_that_is_not_empty(run, tmp_path, capsys):
    (tmp_path / "kept.txt").write_text("kept")
    assert main(["export", str(run[0].root), "--output", str(tmp_path)]) == 1
    message = f"vqbeam: {tmp_path} is there already; choose another --output, or delete it\n"
    assert capsys.readouterr().err == message
    assert (tmp_path / "kept.txt").read_text() == "kept"


def test_nothing_is_left_of_half_an_export(run, tmp_path, monkeypatch):
    import tensorflow as tf

    def fail(module, path, signatures):
        tf.io.gfile.makedirs(path)
        raise OSError("no space")

    monkeypatch.setattr(tf.saved_model, "save", fail)
    with pytest.raises(OSError, match="no space"):
        export(str(run[0].root), str(tmp_path / "new"))
    assert not list(tmp_path.iterdir())


def test_another_backend(monkeypatch):
    import keras

    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(VqbeamError, match="KERAS_BACKEND is 'jax'; unset it"):
        export("d", "o")
