import dataclasses
import re
import shutil
import threading
import types

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from pipeline_fixtures import CLASSES, SIDE, small_config, write_images, write_tfds

from vqbeam.configs import VqbeamError
from vqbeam.pipelines.sources import open_source
from vqbeam.pipelines.sources.glyphs import LETTERS, Glyphs, draw_glyph
from vqbeam.pipelines.sources.images import decode_image
from vqbeam.pipelines.sources.source import in_order
from vqbeam.pipelines.sources.tfds import _labels as tfds_labels
from vqbeam.pipelines.sources.tfds import _labels_of
from vqbeam.vqvae.storage.labels import Labels

BEAM = ["--runner=FnApiRunner"]


def plan(data):
    return open_source(data).plan()


def check_source(data):
    open_source(data).check()


def prepare_source(data, beam_args):
    open_source(data).download(beam_args)


def data(source, **changes):
    return small_config(source, **{f"data__{k}": v for k, v in changes.items()}).data


def read_all(data):
    """Returns all images of a source as (split, key, label, bytes), in order."""
    return [
        (unit.shard.split, *raw[:1], raw.label, raw.data)
        for unit in plan(data)
        for raw in open_source(data).read(unit)
    ]


@pytest.fixture
def folder(tmp_path):
    write_images(tmp_path / "pictures", 25)
    return tmp_path / "pictures"


def test_the_units_of_a_folder_hold_each_file_once(folder):
    settings = data(f"folder:{folder}", validation_share=0.3, images_per_shard=4)
    units = plan(settings)
    images = read_all(settings)
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.png")}
    assert sorted(key for _, key, _, _ in images) == sorted(files)
    for _, key, label, content in images:
        assert content == files[key]
        assert CLASSES[label] == key.partition("/")[0]
    assert {unit.labels for unit in units} == {(CLASSES, "classes")}
    assert {unit.total for unit in units} == {25}
    for split in ("train", "validation"):
        of_split = [unit for unit in units if unit.shard.split == split]
        sizes = [len(unit.images) for unit in of_split]
        assert set(sizes[:-1]) <= {4} and 1 <= sizes[-1] <= 4
        assert [unit.shard.index for unit in of_split] == list(range(len(sizes)))
        assert {unit.shard.count for unit in of_split} == {len(sizes)}
        assert 0 < sum(sizes) < 25
    # Again, the same in the same order.
    assert plan(settings) == units and read_all(settings) == images


def test_limits_each_split(folder):
    images = read_all(data(f"folder:{folder}", validation_share=0.5, max_images=5))
    everything = read_all(data(f"folder:{folder}", validation_share=0.5))
    for split in ("train", "validation"):
        limited, whole = ([i for i in some if i[0] == split] for some in (images, everything))
        assert len(limited) == 5 and limited == whole[:5]


def test_a_folder_in_the_home_directory(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert len(read_all(data("folder:~/pictures"))) == 25


def test_a_folder_with_attributes(tmp_path):
    keys = sorted(write_images(tmp_path, 6))
    rows = [f"{key},{i % 2},{i // 2 % 2}" for i, key in enumerate(keys)]
    (tmp_path / "attributes.csv").write_text("\n".join(["path,young,hat", *rows]))
    settings = data(f"folder:{tmp_path}")
    assert {unit.labels for unit in plan(settings)} == {(("young", "hat"), "attributes")}
    found = {key: label for _, key, label, _ in read_all(settings)}
    assert found == {key: (i % 2, i // 2 % 2) for i, key in enumerate(keys)}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["flags", "list"])
def test_attributes_of_tfds(tmp_path, kind):
    names = ("b", "a", "c")
    splits = {"train": 8, "test": 2}
    write_tfds(tmp_path, "faces", "1.0.0", (SIDE, SIDE, 3), splits, names, kind=kind)
    settings = data("tfds:faces", data_dir=str(tmp_path))
    ((found, of),) = {unit.labels for unit in plan(settings)}
    assert of == "attributes" and sorted(found) == ["a", "b", "c"]
    for split, count in (("train", 8), ("validation", 2)):
        labels = [label for of_split, _, label, _ in read_all(settings) if of_split == split]
        assert labels == [tuple(i >> names.index(n) & 1 for n in found) for i in range(count)]


def test_a_folder_without_classes(tmp_path):
    write_images(tmp_path, 6, classes=())
    units = plan(data(f"folder:{tmp_path}"))
    assert {unit.labels for unit in units} == {((), "classes")}
    assert {label for _, _, label, _ in read_all(data(f"folder:{tmp_path}"))} == {-1}


@pytest.mark.parametrize(
    ("count", "share", "message"),
    [
        (0, 0.1, "holds no image"),
        (1, 0.1, "has no image to hold out; it takes two images or more"),
    ],
)
def test_a_folder_with_too_few_images(tmp_path, count, share, message):
    write_images(tmp_path, count)
    settings = data(f"folder:{tmp_path}", validation_share=share)
    for look in (plan, check_source):
        with pytest.raises(VqbeamError, match=message):
            look(settings)


@pytest.fixture
def few_glyphs(monkeypatch, tmp_path):
    monkeypatch.setattr(Glyphs, "COUNTS", {"train": 30, "test": 8})
    return data("glyphs", data_dir=str(tmp_path))


@pytest.mark.slow
def test_glyphs_are_prepared_once_and_read_whole(few_glyphs, capsys):
    check_source(few_glyphs)  # before it is there
    prepare_source(few_glyphs, BEAM)
    said = capsys.readouterr().out  # and nothing of a download
    assert said.startswith("drawing the 38 letters of glyphs/1.0.0, once, into ")
    assert said.count("\n") == 1
    prepare_source(few_glyphs, BEAM)
    assert capsys.readouterr().out == ""
    check_source(few_glyphs)
    images = read_all(few_glyphs)
    assert [split for split, *_ in images] == ["train"] * 30 + ["validation"] * 8
    assert len({key for _, key, _, _ in images}) == 38
    assert all(re.fullmatch(r"glyphs-\w+\.tfrecord-\d+-of-\d+__\d+", i[1]) for i in images)
    # TFDS puts them in an order of its own: compare by content.
    drawn = [draw_glyph(0, index) for index in range(38)]
    found = [
        (decode_image(content, height=32, width=32, channels=3, fit="crop"), label)
        for _, _, label, content in images
    ]
    for some in (drawn, found):
        some.sort(key=lambda pair: pair[0].tobytes())
    for (image, label), (expected, letter) in zip(found, drawn, strict=True):
        np.testing.assert_array_equal(image, expected)
        assert label == letter
    assert plan(few_glyphs)[0].labels.names == tuple(LETTERS)


@pytest.fixture
def prepared(tmp_path):
    """A dataset that TFDS knows by its files alone; returns its settings and its content."""
    splits = {"train": 13, "test": 5, "extra": 2}
    written = write_tfds(tmp_path, "own_set", "1.2.3", (5, 6, 3), splits, ["no", "yes"])
    return data("tfds:own_set", data_dir=str(tmp_path), images_per_shard=5), written


def test_a_prepared_dataset_is_read_in_its_order(prepared):
    settings, written = prepared
    prepare_source(settings, BEAM)
    images = read_all(settings)
    expected = [*written["train"], *written["test"]]
    for index, (split, key, label, content) in enumerate(images):
        number = index if split == "train" else index - 13
        theirs = "train" if split == "train" else "test"
        assert key == f"own_set-{theirs}.tfrecord-00000-of-00001__{number}"
        image = decode_image(content, height=5, width=6, channels=3, fit="crop")
        np.testing.assert_array_equal(image, expected[index][0])
        assert label == expected[index][1]
    assert len(images) == 18
    assert [len(unit.images) for unit in plan(settings)] == [5, 5, 3, 5]
    assert {unit.total for unit in plan(settings)} == {18}


def test_other_splits_and_no_label(prepared, tmp_path):
    settings = data(
        "tfds:own_set",
        data_dir=str(tmp_path),
        validation_split="extra",
        label_key="none",
        max_images=4,
    )
    assert [split for split, *_ in read_all(settings)] == ["train"] * 4 + ["validation"] * 2
    assert {label for _, _, label, _ in read_all(settings)} == {-1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_split": "trian"}, "own_set/1.2.3 has no split 'trian'; set data.train_split to"),
        ({"validation_split": "val"}, "set data.validation_split to one of .*test"),
        ({"image_key": "picture"}, "no feature 'picture'; set data.image_key to one of .*image"),
        ({"label_key": "lable"}, "no feature 'lable'; set data.label_key to one of .*, or to none"),
        ({"validation_split": "train+test"}, "no split 'train.test'; set data.validation_split"),
        ({"validation_split": "train[x"}, "has no split 'train\\[x'; set data.validation_split to"),
        ({"image_key": "label"}, "feature 'label' of own_set/1.2.3 holds no image"),
        ({"label_key": "image"}, "feature 'image' .* holds neither classes nor attributes; set"),
    ],
)
def test_what_a_dataset_lacks(prepared, tmp_path, changes, message):
    settings = data("tfds:own_set", data_dir=str(tmp_path), **changes)
    for look in (plan, check_source):
        with pytest.raises(VqbeamError, match=message):
            look(settings)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fashion_mnits", "^TFDS has no dataset 'fashion_mnits'; did you mean 'fashion_mnist'\\?$"),
        ("zzzzzzzzz", "^TFDS has no dataset 'zzzzzzzzz'; see tfds.list_builders"),
        ("fashion_mnist:9.9.9", "^TFDS refuses 'fashion_mnist:9.9.9': .*only: 3.0.1"),
        ("no such name!", "^TFDS refuses 'no such name!'"),
    ],
)
def test_datasets_that_tfds_does_not_have(name, message, tmp_path):
    settings = data(f"tfds:{name}", data_dir=str(tmp_path))
    for look in (check_source, plan, lambda settings: prepare_source(settings, BEAM)):
        with pytest.raises(VqbeamError, match=message) as caught:
            look(settings)
        assert "\n" not in str(caught.value)


def test_a_damaged_record_of_tfds(prepared, tmp_path):
    settings, _ = prepared
    shard = tmp_path / "own_set" / "1.2.3" / "own_set-train.tfrecord-00000-of-00001"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 255
    shard.write_bytes(bytes(content))
    with pytest.raises(VqbeamError, match="a record in .*own_set/1.2.3 is damaged"):
        read_all(settings)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_only_images_of_integers_are_read_from_tfds(tmp_path, dtype):
    # Of floats, TFDS stores the bytes as if they were colours.
    features = tfds.features.FeaturesDict(
        {"image": tfds.features.Image(shape=(SIDE, SIDE, 1), dtype=dtype)}
    )
    info = types.SimpleNamespace(features=features, full_name="own_set/1.2.3")
    settings = data("tfds:own_set")
    if dtype is np.float32:
        with pytest.raises(VqbeamError, match="own_set/1.2.3 holds images of float32; prepare"):
            tfds_labels(settings, info)
    else:
        assert tfds_labels(settings, info) == Labels()


@pytest.mark.parametrize("name", ["a\nb", "a ", "\ta", "a\x85b", "a\u2028b"])
def test_names_of_classes_that_no_line_can_hold(tmp_path, name):
    write_images(tmp_path / "source", 12, classes=(name, "b"))
    for look in (plan, check_source):
        with pytest.raises(VqbeamError, match="has a class .*; give it a name without line breaks"):
            look(data(f"folder:{tmp_path / 'source'}"))


def test_lists_of_classes_of_one_length():
    labels = Labels(("a", "b", "c"), "attributes")
    lists = tf.ragged.constant([[0, 2], [1]]), tf.constant([[0, 2], [1, 1]])
    for values in lists:
        assert _labels_of(values, labels) == [(1, 0, 1), (0, 1, 0)]


@pytest.mark.slow
def test_parts_of_one_split(prepared, tmp_path):
    # Of a dataset that has no other.
    splits = {"train_split": "train[:70%]", "validation_split": "train[70%:]"}
    settings = data("tfds:own_set", data_dir=str(tmp_path), images_per_shard=4, **splits)
    keys = [(split, int(key.rpartition("_")[2])) for split, key, *_ in read_all(settings)]
    assert keys == [("train", i) for i in range(9)] + [("validation", i) for i in range(9, 13)]
    fewer = dataclasses.replace(settings, max_images=2)
    assert [key.rpartition("_")[2] for _, key, *_ in read_all(fewer)] == ["0", "1", "9", "10"]


@pytest.mark.parametrize("part", ["train", "train[12:]", "train[:1]"])
def test_an_image_is_not_held_out_and_trained_on(prepared, tmp_path, part):
    settings = data("tfds:own_set", data_dir=str(tmp_path), validation_split=part)
    with pytest.raises(VqbeamError, match="data.train_split train and .* share images; take parts"):
        plan(settings)


@pytest.mark.slow
def test_keys_are_known_without_reading(prepared_run, tiny_config, tmp_path):
    # A dataset of TFDS in two files, of 12 and of 8 images.
    run, _ = prepared_run(tiny_config())
    shutil.copytree(run.folder("prepare"), tmp_path / "images" / "1.0.0")
    settings = data(
        "tfds:images",
        data_dir=str(tmp_path),
        train_split="train[3:]",
        validation_split="validation",
        images_per_shard=15,
    )
    source = open_source(settings)
    splits, labels = source.listing()
    for unit in source.plan():
        keys = source.keys(unit.shard.split, unit.images)
        assert [raw.key for raw in source.read(unit)] == keys and len(set(keys)) == len(keys)
    chosen = [4, 11, 12, 19]
    (unit,) = source.units({"train": chosen}, labels)
    assert [raw.key for raw in source.read(unit)] == source.keys("train", chosen)
    assert [raw.label for raw in source.read(unit)] == [0, 1, 0, 1]


def test_work_in_order_is_done_by_several_threads_at_once():
    meeting = threading.Barrier(3, timeout=60)  # three must be at work for any to go on

    def work(number):
        meeting.wait()
        return number * number

    assert list(in_order(work, range(6), threads=3)) == [0, 1, 4, 9, 16, 25]


def test_work_in_order_takes_few_items_ahead():
    taken = []

    def items():
        for number in range(100):
            taken.append(number)
            yield number

    results = in_order(str, items(), threads=4)
    assert next(results) == "0" and taken == [0, 1, 2, 3, 4]
    assert next(results) == "1" and taken == [0, 1, 2, 3, 4, 5]


def test_work_in_order_ends_with_the_first_error():
    done = []

    def work(number):
        if number == 2:
            raise KeyError(number)
        done.append(number)

    with pytest.raises(KeyError, match="2"):
        list(in_order(work, range(1000), threads=2))
    assert {0, 1} <= set(done) and len(done) < 6


def test_large_and_small_images_of_a_unit_stay_in_order(tmp_path):
    sides = [8, 128] * 12
    numbers = np.random.default_rng(0)
    for index, side in enumerate(sides):
        pixels = numbers.integers(0, 256, (side, side, 3), np.uint8)
        tf.io.write_file(str(tmp_path / f"{index}.png"), tf.io.encode_png(pixels))
    settings = data(f"folder:{tmp_path}", validation_share=0.0)
    source = open_source(settings)
    units = source.units(*source.listing())
    raws = [raw for unit in units for raw in source.read(unit)]
    are_small = [len(raw.data) < 8192 for raw in raws]
    found = [
        each for unit in units for each in source.convert(unit, lambda _: threading.get_ident())
    ]
    assert [each.key for each in found] == [raw.key for raw in raws]
    assert sum(are_small) == 12
    assert [each.value == threading.get_ident() for each in found] == are_small
