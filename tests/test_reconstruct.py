import shutil

import numpy as np
import pytest
from PIL import Image
from pipeline_fixtures import read_records

from vqbeam.configs import VqbeamError
from vqbeam.pipelines.evaluation.reconstructions import reconstruct
from vqbeam.vqvae.storage.run_folder import RunFolder
from vqbeam.vqvae.training import load_vqvae

pytestmark = pytest.mark.slow


def validation_images(run):
    return np.stack([e["image"] for e in read_records(run.folder("prepare"))["validation"]])


def test_originals_above_reconstructions(finished_run, tmp_path, capsys):
    images = validation_images(finished_run)
    count = min(2, len(images))
    path = tmp_path / "new" / "pairs.png"
    reconstruct(str(finished_run.root), str(path), num=count)
    assert (
        capsys.readouterr().out
        == f"originals above their reconstructions, {count} of each: {path}\n"
    )
    with Image.open(path) as figure:
        assert figure.size == (count * 68 + 4, 2 * 68 + 4)
        shown = np.asarray(figure)
    model = load_vqvae(finished_run)
    copies = np.asarray(model.decode(model.encode(images)))
    for row, some in enumerate((images, copies)):
        for column in range(count):
            top, left = 4 + row * 68, 4 + column * 68
            tile = some[column].repeat(8, 0).repeat(8, 1)
            # Decoded in a batch of another size, a pixel may round in another way.
            found = shown[top : top + 64, left : left + 64]
            assert np.abs(found.astype(int) - tile).max() <= 1


def test_no_more_than_there_are(finished_run, tmp_path):
    count = len(validation_images(finished_run))
    path = tmp_path / "pairs.png"
    reconstruct(str(finished_run.root), str(path), num=1000)
    with Image.open(path) as figure:
        assert figure.size[0] == min(count, 16) * 68 + 4


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("vqvae", "no finished train-vqvae stage; run vqbeam train-vqvae"),
        ("images", "no finished prepare stage; run vqbeam prepare"),
        ("config.json", "is not a run folder"),
    ],
)
def test_what_a_run_lacks(finished_run, tmp_path, lost, message):
    run = RunFolder(shutil.copytree(finished_run.root, tmp_path / "run"))
    path = run.root / lost
    path.rmtree() if path.is_dir() else path.unlink()
    with pytest.raises(VqbeamError, match=message):
        reconstruct(str(run.root), str(tmp_path / "pairs.png"))
    assert not (tmp_path / "pairs.png").exists()


def test_a_truncated_shard(finished_run, tmp_path):
    run = RunFolder(shutil.copytree(finished_run.root, tmp_path / "run"))
    shard = next(run.folder("prepare").glob("images-validation.tfrecord-*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(VqbeamError, match=f"{shard.name} has .* bytes instead of"):
        reconstruct(str(run.root), str(tmp_path / "pairs.png"))
