import os

# TensorFlow says much at start-up that no test reads.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import pytest

from configs import Config, DataConfig, override


@pytest.fixture
def tiny_config():
    """Makes the smallest config that trains, with the fields of the given names changed."""

    def make(**changes):
        config = Config(
            name="tiny",
            data=DataConfig(source="glyphs", height=8, width=8, channels=1, images_per_shard=12),
        )
        small = {
            "vqvae.num_codes": 12,
            "vqvae.code_dim": 4,
            "vqvae.width": 8,
            "vqvae.residual_layers": 1,
            "vqvae.residual_width": 4,
            "vqvae.batch_size": 8,
            "vqvae.steps": 8,
            "vqvae.steps_per_epoch": 2,
            "encode.batch_size": 4,
        }
        return override(config, small | {k.replace("__", "."): v for k, v in changes.items()})

    return make


@pytest.fixture
def prepared_run(tmp_path):
    """Makes a run folder with a finished prepare stage of random images."""
    from vqvae import records
    from vqvae.run_folder import RunFolder

    def make(config, name="run", train=20, validation=10, labels=("a", "b")):
        run = RunFolder(tmp_path / name)
        run.start(config)
        run.begin("prepare")
        folder = run.folder("prepare")
        features = records.image_features(config.image_shape, labels)

        def label(i):
            return {"label": i % 2} if labels else {}

        numbers = np.random.default_rng(0)
        splits, files, pixels = {}, [], {}
        for split, size in (("train", train), ("validation", validation)):
            images = numbers.integers(0, 256, (size, *config.image_shape), np.uint8)
            pixels[split] = images
            starts = range(0, size, config.data.images_per_shard)
            for index, start in enumerate(starts):
                stop = min(start + config.data.images_per_shard, size)
                examples = [
                    {"image": images[i], "key": f"{split}-{i}"} | label(i)
                    for i in range(start, stop)
                ]
                shard = records.Shard(folder.name, split, index, len(starts))
                path = folder / shard.filename
                written = [records.serialize(features, example) for example in examples]
                size_bytes = records.write_shard(path, written)
                splits.setdefault(split, []).append((len(examples), size_bytes))
                files.append(path)
        files += records.write_metadata(
            folder, features, splits, version=records.IMAGES_VERSION, description="Noise."
        )
        scaled = pixels["train"] / 127.5 - 1
        run.finish(
            "prepare",
            files,
            source=config.data.source,
            counts={"train": train, "validation": validation},
            failed=0,
            label_names=list(labels),
            statistics={"mean": scaled.mean(), "variance": scaled.var(), "images_per_label": {}},
        )
        return run, pixels

    return make
