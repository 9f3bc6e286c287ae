import dataclasses
import json
import shutil

import numpy as np
import pytest
import tensorflow as tf
from image_files import ENDINGS, encoded_images, names_of, write_file
from pipeline_fixtures import TWO_THREADS, gathered, read_records, shard_contents, write_images

from vqbeam.configs import DataConfig, VqbeamError
from vqbeam.pipelines.beam import Gathered
from vqbeam.pipelines.sources.images import decode_image
from vqbeam.pipelines.stages import encode_source as stage
from vqbeam.pipelines.stages.encode_source import EncodeJob, encode_source
from vqbeam.vqvae.storage.records import keys_in
from vqbeam.vqvae.training import load_vqvae

pytestmark = pytest.mark.slow


@pytest.fixture
def images(tmp_path):
    """The pixels of a folder of images in three classes, by key."""
    return write_images(tmp_path / "images", 15, seed=5)


@pytest.fixture
def encode(finished_run, tmp_path):
    """Encodes a source with the model of a finished run into `tmp_path / "codes"`."""

    def run(source=f"folder:{tmp_path / 'images'}", *flags, output="codes", **settings):
        settings = {"validation_share": 0.0, "images_per_shard": 6} | settings
        return encode_source(
            str(finished_run.root),
            output=str(tmp_path / output),
            data=DataConfig(source=source, **settings),
            beam_args=["--runner=FnApiRunner", *flags],
        )

    return run


@pytest.fixture
def encoded(monkeypatch):
    """The number of images in each batch that has been encoded."""
    counts, in_batches = [], stage.in_batches

    def watched(function, images, batch_size):
        counts.append(len(images))
        return in_batches(function, images, batch_size)

    monkeypatch.setattr(stage, "in_batches", watched)
    return counts


def examples(tmp_path, split="train"):
    return {e["key"].decode(): e for e in read_records(tmp_path / "codes")[split]}


def test_codes_are_those_of_the_model(encode, images, finished_run, tmp_path):
    (tmp_path / "images" / "apple" / "broken.png").write_bytes(b"no image")
    said = encode(max_failed=0.1)
    model, found = load_vqvae(finished_run), examples(tmp_path)
    assert found.keys() == images.keys()
    wanted = np.asarray(model.encode(np.stack([images[key] for key in found])))
    hash = finished_run.result_hash("train-vqvae")
    for example, codes in zip(found.values(), wanted, strict=True):
        assert example.keys() == {"codes", "key", "label", "model"}
        np.testing.assert_array_equal(example["codes"], codes)
        assert example["codes"].dtype == np.uint16
        assert example["model"].decode() == hash[:16]
    names = ("Banana", "apple", "cherry")
    assert {key: names[e["label"]] for key, e in found.items()} == {
        key: key.partition("/")[0] for key in found
    }
    (line,) = (tmp_path / "codes" / "dead_letters.jsonl").read_text().splitlines()
    assert json.loads(line)["key"] == "apple/broken.png"
    assert "codes: 15 new, 0 there before" in said
    assert "could not be decoded: 1 image" in said


def test_a_single_image_is_encoded_and_none_held_out(encode, tmp_path):
    write_images(tmp_path / "images", 1, classes=())
    encode()
    assert {split: len(some) for split, some in read_records(tmp_path / "codes").items()} == {
        "train": 1
    }


def test_two_workers_write_the_same(encode, images, tmp_path):
    encode()
    one = shard_contents(tmp_path / "codes")
    encode(f"folder:{tmp_path / 'images'}", *TWO_THREADS, output="again")
    assert shard_contents(tmp_path / "again") == one and len(one) == 3


def test_new_images_cost_only_themselves(encode, images, encoded, tmp_path):
    encode()
    assert sum(encoded) == 15
    before, were = shard_contents(tmp_path / "codes"), examples(tmp_path)
    # A class whose name comes before those that are there.
    more = write_images(tmp_path / "images", 4, classes=("Ananas", "cherry"), seed=6)
    encoded.clear()
    assert "codes: 4 new, 15 there before" in encode()
    assert sum(encoded) == 4
    assert before.items() < shard_contents(tmp_path / "codes").items()
    found = examples(tmp_path)
    assert found.keys() == images.keys() | more.keys()
    for key, example in were.items():
        assert found[key]["label"] == example["label"]
    names = (tmp_path / "codes" / "label.labels.txt").read_text().split()
    assert names == ["Banana", "apple", "cherry", "Ananas"]
    for key in more:
        assert names[found[key]["label"]] == key.partition("/")[0]
    encoded.clear()
    assert "codes: 0 new, 19 there before" in encode()
    assert not encoded


def test_rows_of_files_are_known_by_their_keys(encode, encoded, tmp_path):
    kind = "parquet"
    folder, ending = tmp_path / "files", ENDINGS[kind]
    write_file(kind, folder / f"a{ending}", encoded_images(7), names_of(7))
    encode(f"{kind}:{folder}")
    write_file(kind, folder / f"b{ending}", encoded_images(3, first=7), names_of(3))
    encoded.clear()
    assert "codes: 3 new, 7 there before" in encode(f"{kind}:{folder}")
    assert sum(encoded) == 3


def job_of(run, tmp_path):
    data = DataConfig(
        source=f"folder:{tmp_path / 'images'}",
        validation_share=0.0,
        images_per_shard=6,
        height=8,
        width=8,
    )
    model = run.result_hash("train-vqvae")
    return EncodeJob(str(run.root), model, str(tmp_path / "codes"), data, 4)


def test_goes_on_where_it_was_killed(encode, images, encoded, finished_run, tmp_path):
    encode(output="unbroken")
    job = job_of(finished_run, tmp_path)
    job.folder.mkdir()
    job = job.bind_folder()
    for _, addition in list(stage.plan_additions(job))[:2]:
        stage.encode_addition(job, addition)
    # Of another source with the same names nothing is taken over.
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "images", elsewhere)
    other = dataclasses.replace(
        job, data=dataclasses.replace(job.data, source=f"folder:{elsewhere}")
    )
    assert other.fingerprint != job.fingerprint
    encoded.clear()
    encode()
    assert sum(encoded) == 3
    assert shard_contents(tmp_path / "codes") == shard_contents(tmp_path / "unbroken")
    left = {path.name for path in (tmp_path / "codes").iterdir()}
    assert left == {path.name for path in (tmp_path / "unbroken").iterdir()}


def test_killed_before_the_manifest_and_repeated_after_it(encode, images, finished_run, tmp_path):
    encode()
    more = write_images(tmp_path / "images", 4, classes=("Ananas",), seed=6)
    job = job_of(finished_run, tmp_path).bind_folder()
    reports = [stage.encode_addition(*planned) for planned in stage.plan_additions(job)]
    found = gathered(stage.add_facts, [("", report) for report in reports])
    manifest = (tmp_path / "codes" / "manifest.json").read_bytes()
    stage.finish_additions(found, job)
    (tmp_path / "codes" / "manifest.json").write_bytes(manifest)
    assert "codes: 4 new, 15 there before" in encode()
    assert examples(tmp_path).keys() == images.keys() | more.keys()
    # An engine may repeat the steps of a call that has ended.
    done = shard_contents(tmp_path / "codes")
    assert list(stage.plan_additions(job)) == []
    stage.finish_additions(Gathered([], None), job)
    assert shard_contents(tmp_path / "codes") == done


def test_what_fails_again_adds_no_shards(encode, images, tmp_path):
    (tmp_path / "images" / "apple" / "broken.png").write_bytes(b"no image")
    encode(max_failed=0.1)
    before = shard_contents(tmp_path / "codes")
    encode(max_failed=0.1)
    assert shard_contents(tmp_path / "codes") == before
    # A new image in one shard, the broken one alone in another.
    pixels = write_images(tmp_path / "images", 1, classes=("cherry",), seed=7)
    encode(max_failed=0.1, images_per_shard=1)
    assert examples(tmp_path).keys() == images.keys() | pixels.keys()


def test_refusals(encode, images, finished_run, own_run, tmp_path):
    (tmp_path / "codes").mkdir()
    (tmp_path / "codes" / "mine").write_text("")
    with pytest.raises(VqbeamError, match="is not empty; give another --output"):
        encode()
    (tmp_path / "codes" / "mine").unlink()
    (tmp_path / "images" / "apple" / "broken.png").write_bytes(b"no image")
    with pytest.raises(VqbeamError, match="1 of 16 images could not be decoded, more than"):
        encode()
    (tmp_path / "images" / "apple" / "broken.png").unlink()
    encode()
    write_images(tmp_path / "flat", 3, classes=())
    with pytest.raises(VqbeamError, match="has 3 classes .*, and the new images no classes; give"):
        encode(f"folder:{tmp_path / 'flat'}")
    with pytest.raises(VqbeamError, match="there is no folder"):
        encode(f"folder:{tmp_path / 'nowhere'}", output="new")
    assert not (tmp_path / "new").exists()
    model = finished_run.result_hash("train-vqvae")
    job = dataclasses.replace(job_of(finished_run, tmp_path), model="f" * 64)
    with pytest.raises(VqbeamError, match=f"holds codes of {model[:16]}, .* is f{{16}}; give"):
        job.bind_folder()
    with pytest.raises(VqbeamError, match=f"is {model[:16]} and no longer f{{16}}; it was trained"):
        stage.load_encoder(finished_run, job.model)


@pytest.mark.parametrize("damage", ["lost", "truncated", "changed"])
def test_a_damaged_shard_costs_its_images_alone(encode, images, encoded, tmp_path, damage):
    encode()
    before = examples(tmp_path)
    shard = tmp_path / "codes" / "codes-train.tfrecord-00001"
    content, own = bytearray(shard.read_bytes()), keys_in([shard])
    shard.unlink()
    if damage != "lost":
        content[len(content) // 2] ^= 1
        shard.write_bytes(content[: -7 if damage == "truncated" else None])
        with pytest.raises(VqbeamError, match=f"{shard} .*delete (it|{shard}) and run (its|the) s"):
            encode()
        shard.unlink()
    encoded.clear()
    assert f"codes: {len(own)} new, {15 - len(own)} there before" in encode()
    assert sum(encoded) == len(own) == 6
    after = examples(tmp_path)
    assert after.keys() == before.keys()
    for key, example in before.items():
        np.testing.assert_array_equal(after[key]["codes"], example["codes"])
        assert after[key]["label"] == example["label"]


def test_the_command(failure, images, finished_run, tmp_path, capfd):
    from vqbeam.pipelines.cli.main import main

    words = ["encode", "--model", str(finished_run.root), "--output", str(tmp_path / "codes")]
    assert main([*words, "--data.source", f"folder:{tmp_path / 'images'}"]) == 0
    out = capfd.readouterr().out
    hash = finished_run.result_hash("train-vqvae")[:16]
    assert out.splitlines() == [
        f"codes: 15 new, 0 there before, in {tmp_path / 'codes'}",
        f"model: {hash}, the VQ-VAE of {finished_run.root}",
    ]
    assert main(words) == 2
    assert "vqbeam encode: missing --data.source" in capfd.readouterr().err
    assert "there is no folder" in failure(*words, "--data.source", "folder:/nowhere")
    assert "unknown flag --data.height" in failure(*words, "--data.height", "8")


def test_pixels_are_brought_to_the_shape_of_the_model(encode, finished_run, tmp_path):
    (data,) = encoded_images(1)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.png").write_bytes(data)
    encode()
    pixels = decode_image(data, height=8, width=8, channels=3, fit="crop")
    wanted = np.asarray(load_vqvae(finished_run).encode(tf.constant(pixels[None])))[0]
    np.testing.assert_array_equal(examples(tmp_path)["1.png"]["codes"], wanted)
