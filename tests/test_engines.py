import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from engine_servers import ENGINES, ROOT
from pipeline_fixtures import read_records, small_config, write_preset

from vqvae.run_folder import STAGES, RunFolder

pytestmark = pytest.mark.engines


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    config = small_config("glyphs", data__max_images=60, data__images_per_shard=20)
    return write_preset(tmp_path_factory.mktemp("preset") / "small.py", config)


def run_on(engine, folder, preset):
    """Takes the preset to new images by the real command; returns the run."""
    with ENGINES[engine](folder) as flags:
        done = subprocess.run(
            [sys.executable, "-m", "pipelines", "run", preset, "--run-dir", "run", *flags],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=300,
        )
    logs = [f"{path.name}:\n{path.read_text()[-3000:]}" for path in folder.glob("*.log")]
    assert done.returncode == 0, "\n".join([done.stderr, *logs])
    assert "Traceback" not in done.stderr
    return RunFolder(pathlib.Path(folder) / "run")


@pytest.fixture(scope="module")
def expected(preset, tmp_path_factory):
    return run_on("one process", tmp_path_factory.mktemp("expected"), preset)


@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "one process"])
def test_a_run_is_the_same_on_every_engine(engine, expected, preset, tmp_path):
    run = run_on(engine, tmp_path, preset)
    assert all(run.is_done(stage) for stage in STAGES)
    for stage in ("prepare", "encode"):
        found, wanted = (read_records(which.folder(stage)) for which in (run, expected))
        assert found.keys() == wanted.keys()
        for split, examples in wanted.items():
            assert len(found[split]) == len(examples) > 0
            for ours, theirs in zip(found[split], examples, strict=True):
                assert ours.keys() == theirs.keys()
                for name, value in theirs.items():
                    np.testing.assert_array_equal(ours[name], value, err_msg=name)
    pictures = [which.folder("sample") / "samples.png" for which in (run, expected)]
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
