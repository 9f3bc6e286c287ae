import pathlib

import pytest
from commands import status_of
from engine_servers import ENGINES
from pipeline_fixtures import assert_same_run, small_config, write_images, write_preset

from vqbeam.vqvae.storage.run_folder import STAGES, RunFolder

pytestmark = pytest.mark.engines


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preset")
    write_images(folder / "source", 120)
    config = small_config(f"folder:{folder / 'source'}", data__images_per_shard=20)
    return write_preset(folder / "small.py", config)


def run_on(engine, folder, preset):
    """Takes the preset to new images by the real command; returns the run."""
    with ENGINES[engine](folder) as flags:
        words = ("run", preset, "--run-dir", "run", *flags)
        status = status_of(folder / "command.log", *words, cwd=folder)
    logs = [f"{path.name}:\n{path.read_text()[-3000:]}" for path in folder.glob("*.log")]
    assert status == 0, "\n".join(logs)
    assert "Traceback" not in (folder / "command.log").read_text()
    return RunFolder(pathlib.Path(folder) / "run")


@pytest.fixture(scope="module")
def expected(preset, tmp_path_factory):
    return run_on("one process", tmp_path_factory.mktemp("expected"), preset)


@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "one process"])
def test_a_run_is_the_same_on_every_engine(engine, expected, preset, tmp_path):
    run = run_on(engine, tmp_path, preset)
    assert all(run.is_done(stage) for stage in STAGES)
    assert_same_run(run, expected)
