import dataclasses

import numpy as np
import pytest
from pipeline_fixtures import (
    TWO_THREADS,
    gathered,
    read_records,
    run_transform,
    shard_contents,
    small_config,
)

from vqbeam.configs import VqbeamError
from vqbeam.pipelines.stages import encode
from vqbeam.pipelines.stages.encode import (
    STAGE,
    EncodeStage,
    ImageShard,
    add_facts,
    encode_shard,
    finish_codes,
)
from vqbeam.vqvae.augmentation import variants
from vqbeam.vqvae.building import build_model
from vqbeam.vqvae.fitting.fit import save_model
from vqbeam.vqvae.storage.records import Shard
from vqbeam.vqvae.storage.run_folder import RunFolder
from vqbeam.vqvae.training import MODEL_FILE, load_vqvae

pytestmark = pytest.mark.slow

COUNTS = {"train": 20, "validation": 9}


def finish_vqvae(run, seed=0):
    """Makes the previous stage with an untrained model, whose codes are good enough."""
    config = dataclasses.replace(run.load_config(), seed=seed)
    run.begin("train-vqvae")
    path = run.folder("train-vqvae") / MODEL_FILE
    model = build_model(config, data_variance=1.0)
    # Codes among the vectors that the encoder gives, so that many of them are used.
    noise = np.random.default_rng(seed).uniform(-1, 1, (40, *config.image_shape))
    model.initialize_codebook(noise.astype("float32"), "data", seed)
    save_model(model, path)
    run.finish("train-vqvae", [path], measures={"loss": seed})


@pytest.fixture
def make_run(prepared_run):
    """Makes a run with prepared images and a model; returns it with its pixels by split."""

    def make(settings=(), **options):
        # Shards of 7, 7 and 6: each ends with an odd batch, of 3 or of 2.
        config = small_config("glyphs", data__images_per_shard=7, **dict(settings))
        run, pixels = prepared_run(config, **COUNTS, **options)
        finish_vqvae(run)
        return run, pixels

    return make


@pytest.fixture
def run(make_run):
    return make_run()[0]


def test_codes_are_those_of_the_model(make_run):
    run, pixels = make_run()
    run_transform(EncodeStage(), run)
    model = load_vqvae(run)
    records, images = (read_records(run.folder(stage)) for stage in (STAGE, "prepare"))
    every = []
    for split, count in COUNTS.items():
        assert len(records[split]) == count
        expected = np.asarray(model.encode(pixels[split]))
        found = np.stack([example["codes"] for example in records[split]])
        assert found.dtype == np.uint16 and found.shape == (count, 2, 2)
        np.testing.assert_array_equal(found, expected)
        for example, image in zip(records[split], images[split], strict=True):
            assert example["key"] == image["key"] and example["label"] == image["label"]
        every.append(found.ravel())
    counts = np.bincount(np.concatenate(every))
    share = counts[counts > 0] / counts.sum()
    manifest = run.manifest(STAGE)
    assert manifest["perplexity"] == pytest.approx(np.exp(-(share * np.log(share)).sum()))
    assert manifest["codes_used"] == len(share) > 2
    assert manifest["counts"] == COUNTS and manifest["label_names"] == ["a", "b"]
    assert run.is_done(STAGE)
    found = {path.name for path in run.folder(STAGE).iterdir()}
    assert found == {*manifest["outputs"], "manifest.json", f".reports-{run.fingerprint(STAGE)}"}


def parts(run):
    return [part for _, part in encode.plan_shards(str(run.root))]


def encode_all(run):
    """The steps of the transform without Beam."""
    shards = [encode_shard(str(run.root), part) for part in parts(run)]
    finish_codes(str(run.root), gathered(add_facts, shards))


def test_codes_of_several_levels(make_run):
    run, pixels = make_run(dict(vqvae__grids=2))
    encode_all(run)
    model, records = load_vqvae(run), read_records(run.folder(STAGE))
    for split, count in COUNTS.items():
        found = np.stack([example["codes"] for example in records[split]])
        assert found.dtype == np.uint16 and found.shape == (count, 5)
        np.testing.assert_array_equal(found, np.asarray(model.encode(pixels[split])))
    every = np.stack([example["codes"].ravel() for some in records.values() for example in some])
    manifest = run.manifest(STAGE)
    for number in (0, 1):
        _, counts = np.unique(every[:, np.array([0, 1, 1, 1, 1]) == number], return_counts=True)
        share = counts / counts.sum()
        entropy = -(share * np.log(share)).sum()
        assert manifest["perplexity"][number] == pytest.approx(np.exp(entropy))
        assert manifest["codes_used"][number] == len(counts) > 2
    assert len(manifest["perplexity"]) == len(manifest["codes_used"]) == 2


def test_two_workers_write_the_same(run, tmp_path):
    run_transform(EncodeStage(), run)
    one, manifest = shard_contents(run.folder(STAGE)), run.manifest(STAGE)
    run.folder(STAGE).rmtree()
    run_transform(EncodeStage(), run, *TWO_THREADS)
    assert shard_contents(run.folder(STAGE)) == one and len(one) == 5
    again = run.manifest(STAGE)
    assert {**again, "seconds": 0} == {**manifest, "seconds": 0}


def test_the_model_is_loaded_once_and_work_of_another_is_not_taken_over(run, monkeypatch):
    loaded = []

    def load(run):
        loaded.append(run)
        return load_vqvae(run)

    monkeypatch.setattr(encode, "load_vqvae", load)
    before = [encode_shard(str(run.root), part) for part in parts(run)]
    assert len(loaded) == 1
    # Another model in the same process is another.
    finish_vqvae(run, seed=1)
    after = [encode_shard(str(run.root), part) for part in parts(run)]
    assert len(loaded) == 2
    assert [r.facts for _, r in before] != [r.facts for _, r in after]


def test_attributes_go_along(make_run):
    run, _ = make_run(labels=("young", "smiling", "hat"), kind="attributes")
    encode_all(run)
    found = read_records(run.folder(STAGE))
    assert {split: len(some) for split, some in found.items()} == COUNTS
    for some in found.values():
        for i, example in enumerate(some):
            assert example["attributes"].tolist() == [i & 1, i >> 1 & 1, i >> 2 & 1]
    manifest = run.manifest(STAGE)
    assert manifest["label_names"] == ["young", "smiling", "hat"]
    assert manifest["label_kind"] == "attributes"


def test_without_labels(make_run):
    run, _ = make_run(labels=())
    encode_all(run)
    assert set(read_records(run.folder(STAGE))["train"][0]) == {"codes", "key"}
    assert run.manifest(STAGE)["label_names"] == []


def test_variants_of_the_training_images(make_run):
    kind, count = "flip", 2
    run, pixels = make_run({"encode__augment": kind})
    # Broken off after two of the three shards of training images.
    for part in parts(run)[:2]:
        encode_shard(str(run.root), part)
    written = shard_contents(run.folder(STAGE))
    encode_all(run)
    assert written.items() < shard_contents(run.folder(STAGE)).items()
    model, records = load_vqvae(run), read_records(run.folder(STAGE))
    found = {example["key"].decode(): example for example in records["train"]}
    assert len(found) == len(records["train"]) == 20 * count
    for suffix, images in variants(pixels["train"], kind):
        codes = np.asarray(model.encode(images))
        for i in range(20):
            example = found[f"train-{i}{suffix}"]
            np.testing.assert_array_equal(example["codes"], codes[i])
            assert example["label"] == i % 2
    # What is held out stays as it is.
    held_out = np.stack([example["codes"] for example in records["validation"]])
    np.testing.assert_array_equal(held_out, np.asarray(model.encode(pixels["validation"])))
    manifest = run.manifest(STAGE)
    assert manifest["counts"] == {"train": 20 * count, "validation": 9}
    every = np.stack([example["codes"] for some in records.values() for example in some])
    _, counts = np.unique(every, return_counts=True)
    share = counts / counts.sum()
    assert manifest["perplexity"] == pytest.approx(np.exp(-(share * np.log(share)).sum()))
    assert manifest["codes_used"] == len(counts)


def test_goes_on_where_it_was_killed(run, monkeypatch):
    shards = parts(run)
    assert [part.shard.index for part in shards] == [0, 1, 2, 0, 1]
    done = [encode_shard(str(run.root), part) for part in shards[:2]]
    written = shard_contents(run.folder(STAGE))
    encoded = []
    in_batches = encode.in_batches

    def spy(function, images, batch_size):
        encoded.append(len(images))
        return in_batches(function, images, batch_size)

    monkeypatch.setattr(encode, "in_batches", spy)
    again = [encode_shard(str(run.root), part) for part in parts(run)]
    # Only the third shard of the training images and those of the validation images.
    assert sum(encoded) == 6 + 9
    assert again[:2] == done
    finish_codes(str(run.root), gathered(add_facts, again))
    assert written.items() < shard_contents(run.folder(STAGE)).items()
    keys = [e["key"] for some in read_records(run.folder(STAGE)).values() for e in some]
    assert len(set(keys)) == len(keys) == 29


def test_an_empty_shard(run):
    # Of a shard of images none of which could be decoded.
    run.begin(STAGE)
    (run.folder("prepare") / Shard("images", "train", 2, 3).filename).write_bytes(b"")
    shard = Shard("codes", "train", 2, 3)
    _, report = encode_shard(str(run.root), ImageShard(shard, 0, "flip", 29))
    assert report.records == 0 and np.sum(report.facts["code_counts"]) == 0


def test_the_last_step_may_be_done_twice(run):
    reports = gathered(add_facts, [encode_shard(str(run.root), part) for part in parts(run)])
    finish_codes(str(run.root), reports)
    manifest = run.manifest(STAGE)
    finish_codes(str(run.root), reports)
    assert run.manifest(STAGE) == manifest and run.is_done(STAGE)


def test_a_truncated_shard_is_one_line(run):
    shard = run.folder("prepare") / Shard("images", "train", 1, 3).filename
    shard.write_bytes(shard.read_bytes()[:-3])
    with pytest.raises(VqbeamError, match=f"{shard.name} has .* bytes instead of .*; run vqbeam"):
        parts(run)


def test_a_model_of_another_codebook(run, monkeypatch):
    config = small_config("glyphs", data__images_per_shard=7, vqvae__num_codes=16)
    shards = parts(run)
    monkeypatch.setattr(RunFolder, "load_config", lambda self: config)
    with pytest.raises(VqbeamError, match="model.keras has .* K = 12, .* says .* K = 16;"):
        encode_shard(str(run.root), shards[0])
