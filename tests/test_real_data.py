import numpy as np
import pytest
import tensorflow_datasets as tfds
from pipeline_fixtures import read_records, run_transform

from vqbeam.configs import load_preset, override
from vqbeam.pipelines.stages.prepare import PrepareImages
from vqbeam.vqvae.storage.run_folder import RunFolder

pytestmark = pytest.mark.slow

IMAGES = 2000


@pytest.fixture
def fashion_mnist():
    # TFDS looks in TFDS_DATA_DIR by itself.
    builder = tfds.builder("fashion_mnist")
    if not builder.is_prepared():
        pytest.skip(f"fashion_mnist is not prepared in {builder.data_dir}; set TFDS_DATA_DIR")
    return builder


def test_fashion_mnist_is_as_tfds_gives_it(fashion_mnist, tmp_path):
    run = RunFolder(tmp_path / "run")
    changes = {"data.max_images": IMAGES, "data.images_per_shard": 700}
    run.start(override(load_preset("fashion_mnist"), changes))
    run_transform(PrepareImages(), run)
    assert run.manifest("prepare")["label_names"] == fashion_mnist.info.features["label"].names
    records = read_records(run.folder("prepare"))
    for split, theirs in (("train", "train"), ("validation", "test")):
        examples = fashion_mnist.as_dataset(split=f"{theirs}[:{IMAGES}]").as_numpy_iterator()
        for number, (ours, expected) in enumerate(zip(records[split], examples, strict=True)):
            np.testing.assert_array_equal(ours["image"], expected["image"])
            assert ours["label"] == expected["label"]
            key = f"fashion_mnist-{theirs}.tfrecord-00000-of-00001__{number}"
            assert ours["key"].decode() == key
        assert number == IMAGES - 1
