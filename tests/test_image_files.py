import io
import json
import os
import re
import tarfile
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf
from commands import status_of
from hub_server import files_in, hub
from image_files import (
    ENDINGS,
    KINDS,
    encoded_images,
    names_of,
    write_file,
    write_folder,
)
from pipeline_fixtures import (
    CLASSES,
    SIDE,
    gathered,
    read_records,
    shard_contents,
    small_config,
)

from vqbeam.configs import VqbeamError
from vqbeam.pipelines.sources import open_source
from vqbeam.pipelines.sources.listing import split_by_name
from vqbeam.pipelines.stages.prepare import (
    DEAD_LETTERS,
    STAGE,
    add_facts,
    finish_images,
    prepare_shard,
)
from vqbeam.vqvae.storage.files import modified
from vqbeam.vqvae.storage.run_folder import RunFolder

COUNT = 44


def data(source, **changes):
    return small_config(source, **{f"data__{k}": v for k, v in changes.items()}).data


def listed(source, **changes):
    """Returns the units of a source as split: [(key, label)], and the names of its classes."""
    opened = open_source(data(source, **changes))
    opened.check()
    found, names = {}, set()
    for unit in opened.plan():
        found.setdefault(unit.shard.split, []).extend((f"{i[0]}/{i[1]}", i[2]) for i in unit.images)
        names.add(unit.labels.names)
    (names,) = names
    return found, names


def prepared(path, source, **changes):
    """Returns a run whose first stage is done."""
    run = RunFolder(path)
    run.start(small_config(source, **{f"data__{k}": v for k, v in changes.items()}))
    do_stage(run)
    return run


def do_stage(run):
    run.begin(STAGE)
    units = open_source(run.load_config().data).plan()
    shards = [prepare_shard(str(run.root), unit) for unit in units]
    finish_images(str(run.root), gathered(add_facts, shards))


def by_number(run):
    """Returns pixels and class of each image, by its number in the source."""
    names, found = run.manifest(STAGE)["label_names"], {}
    for examples in read_records(run.folder(STAGE)).values():
        for example in examples:
            number = int(example["key"].decode().rpartition("/")[2].partition(".")[0])
            assert number not in found
            label = names[example["label"]] if names else None
            found[number] = example["image"], label
    return found


@pytest.fixture(scope="module")
def images():
    return encoded_images(COUNT)


@pytest.fixture(scope="module")
def expected(images, tmp_path_factory):
    """The records that a folder of the same images gives."""
    place = tmp_path_factory.mktemp("expected")
    write_folder(place / "source", images, names_of(COUNT))
    return by_number(prepared(place / "run", f"folder:{place / 'source'}"))


def assert_same(found, expected, label=lambda name: name):
    assert found.keys() == expected.keys() and len(found) == COUNT
    for number, (pixels, name) in expected.items():
        np.testing.assert_array_equal(found[number][0], pixels, err_msg=str(number))
        assert found[number][1] == label(name)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_records_are_those_of_a_folder(kind, images, expected, tmp_path):
    path = write_file(kind, tmp_path / f"some{ENDINGS[kind]}", images, names_of(COUNT))
    run = prepared(tmp_path / "run", f"{kind}:{path}")
    assert run.manifest(STAGE)["label_names"] == list(CLASSES)
    assert_same(by_number(run), expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_classes(kind, images, expected, tmp_path):
    numbers = [CLASSES.index(name) for name in names_of(COUNT)]
    path = write_file(kind, tmp_path / f"some{ENDINGS[kind]}", images, numbers)
    run = prepared(tmp_path / "run", f"{kind}:{path}")
    assert run.manifest(STAGE)["label_names"] == ["0", "1", "2"]
    assert_same(by_number(run), expected, lambda name: str(CLASSES.index(name)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_images_without_labels(kind, images, expected, tmp_path):
    path = write_file(kind, tmp_path / f"some{ENDINGS[kind]}", images)
    assert_same(by_number(prepared(tmp_path / "run", f"{kind}:{path}")), expected, lambda _: None)


@pytest.mark.parametrize("kind", KINDS)
def test_labels_that_are_not_wanted(kind, images, tmp_path):
    path = write_file(kind, tmp_path / f"some{ENDINGS[kind]}", images, names_of(COUNT))
    found, names = listed(f"{kind}:{path}", label_key="none")
    assert names == () and {label for _, label in sum(found.values(), [])} == {-1}


def test_arrays_of_the_right_size_keep_their_pixels(tmp_path):
    numbers = np.random.default_rng(0)
    for channels, shape in ((3, (9, 8, 8, 3)), (1, (9, 8, 8)), (1, (9, 8, 8, 1))):
        pixels = numbers.integers(0, 256, shape, np.uint8)
        np.savez_compressed(tmp_path / "some.npz", images=pixels)
        run = prepared(tmp_path / str(shape), f"array:{tmp_path / 'some.npz'}", channels=channels)
        found = by_number(run)
        for number, image in enumerate(pixels):
            np.testing.assert_array_equal(found[number][0], image.reshape(8, 8, channels))


@pytest.mark.parametrize("kind", KINDS)
def test_files_without_names_of_splits_are_divided_by_hash(kind, images, tmp_path):
    folder = tmp_path / "training_set"
    for part in ("a", "b"):
        write_file(kind, folder / f"{part}{ENDINGS[kind]}", images)
    found, _ = listed(f"{kind}:{folder}", validation_share=0.25)
    train, validation = ([key for key, _ in found[split]] for split in ("train", "validation"))
    keys = sorted(train + validation)
    assert len(set(keys)) == len(keys) == 2 * COUNT
    assert all(key.startswith((f"a{ENDINGS[kind]}/", f"b{ENDINGS[kind]}/")) for key in keys)
    # Four standard deviations of a binomial: 4 · sqrt(88 · 0.25 · 0.75) = 16.
    assert abs(len(validation) - 22) < 16
    # In the order of the files, so that each shard reads few of them.
    number = {key: int(key.rpartition("/")[2]) for key in keys}
    for some in (train, validation):
        assert some == sorted(some, key=lambda key: (key[0], number[key]))
    # One split more or less with further files moves no image.
    write_file(kind, folder / f"c{ENDINGS[kind]}", images)
    again, _ = listed(f"{kind}:{folder}", validation_share=0.25)
    assert set(train) <= {key for key, _ in again["train"]}
    assert set(validation) <= {key for key, _ in again["validation"]}


@pytest.mark.parametrize("kind", KINDS)
def test_splits_by_name(kind, images, tmp_path):
    ending = ENDINGS[kind]
    for name in ("train-0", "train-1", "test", "more/validation_0", "other"):
        write_file(kind, tmp_path / "data" / f"{name}{ending}", images[:4], names_of(4))
    # A class that only an image to be left out has.
    write_file(kind, tmp_path / "data" / f"test{ending}", images[:4], ["x"] * 4)
    found, names = listed(f"{kind}:{tmp_path / 'data'}")
    files = {split: {key.rpartition("/")[0] for key, _ in some} for split, some in found.items()}
    assert files == {
        "train": {f"train-0{ending}", f"train-1{ending}"},
        "validation": {f"more/validation_0{ending}"},
    }
    assert {split: len(some) for split, some in found.items()} == {"train": 8, "validation": 4}
    assert names == CLASSES
    # By a pattern, the test images are held out instead.
    found, names = listed(f"{kind}:{tmp_path / 'data' / 't*'}")
    assert {key.partition("/")[0] for key, _ in found["validation"]} == {f"test{ending}"}
    assert names == (*CLASSES, "x")


def split(files, **changes):
    return split_by_name(files, data("parquet:x", **changes), Counter())


def test_names_of_splits():
    train, held_out = ["a/train/0.x", "Train.x", "train0.x"], ["val/b-1.x", "dev", "valid_1"]
    other = ["trainer.x", "a.train.x", "tests-0.x"]
    named = {"train": train, "validation": held_out}
    assert split([*train, *held_out, *other, "test-0.x"]) == named
    # The name of the file goes before those of its folders.
    assert split(["train/val.x", "val/train.x"]) == {
        "train": ["val/train.x"],
        "validation": ["train/val.x"],
    }
    assert split(["train.x", "test.x"])["validation"] == ["test.x"]
    # Without one of both, all is divided; files beside a held-out part are to train on.
    for files in (["a.x", "b.x"], ["test.x"], ["train.x"]):
        assert split(files) == {"all": files}
    assert split(["train.x", "other.x"]) == {"all": ["train.x"]}
    assert split(["train.x", "val.x"], train_split="none") == {"all": ["train.x", "val.x"]}
    assert split(["test.x", "other.x"]) == {"train": ["other.x"], "validation": ["test.x"]}


@pytest.mark.parametrize("names", [("train-0", "data-1", "data-2"), ("train", "val", "test", "x")])
def test_files_that_are_left_out_are_counted(names, tmp_path):
    for name in names:
        write_file("parquet", tmp_path / f"{name}.parquet", encoded_images(4))
    (tmp_path / "notes.md").write_text("")
    source = open_source(data(f"parquet:{tmp_path}"))
    source.check()
    assert sum(len(unit.images) for unit in source.plan()) == 4 * (len(names) - 2)
    assert +source.left_out == {"files of other splits": 2, "files that end in .md": 1}


def tar_of(path, members):
    """Writes a tar file with members of these names and contents, in their order."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_members_of_a_key_that_are_apart(tmp_path):
    one, two = encoded_images(2)
    members = [("1.png", one), ("2.jpg", two), ("1.cls", b"0"), ("2.cls", b"1")]
    with pytest.raises(VqbeamError, match="has members of '1' in two places; .*--sort=name does"):
        listed(f"webdataset:{tar_of(tmp_path / 'a.tar', members)}")


def test_members_that_macos_adds_are_left_out(tmp_path):
    one, two = encoded_images(2)
    members = [("./1.cls", b"5"), ("./._1.png", b"x"), ("./1.png", one), ("2.cls", b"6")]
    path = tar_of(tmp_path / "a.tar", [*members, ("._2.jpg", b"x"), ("2.jpg", two)])
    found, names = listed(f"webdataset:{path}", validation_share=0.0)
    assert {key.rpartition("/")[2] for key, _ in found["train"]} == {"1", "2"}
    assert sorted(label for _, label in found["train"]) == [5, 6]


def test_splits_of_other_names():
    files = ["train.x", "extra-0.x", "val.x", "test.x"]
    assert split(files, train_split="extra")["train"] == ["extra-0.x"]
    assert split(files, validation_split="val")["validation"] == ["val.x"]
    assert split(files, train_split="test") == {"train": ["test.x"], "validation": ["val.x"]}
    for setting in ("train_split", "validation_split"):
        message = f"has no files of a split 'train.:90%.'; set data.{setting} to what the names of"
        with pytest.raises(VqbeamError, match=message):
            split(files, **{setting: "train[:90%]"})


@pytest.mark.parametrize("names", ["train", "part"])
def test_a_limit_takes_a_fair_sample(names, images, tmp_path):
    # Sorted by class, as it may be.
    for part, label in enumerate("abcd"):
        path = tmp_path / f"{names}-{part}.parquet"
        write_file("parquet", path, images[:1] * 250, [label] * 250)
    if names == "train":
        write_file("parquet", tmp_path / "test.parquet", images[:1] * 9, ["a"] * 9)
    found, _ = listed(f"parquet:{tmp_path}", max_images=200)
    labels = [label for _, label in found["train"]]
    assert len(labels) == 200 and labels == sorted(labels)
    assert all(30 <= labels.count(label) <= 70 for label in range(4))
    assert len(listed(f"parquet:{tmp_path}", max_images=5)[0]["validation"]) == 5


def test_names_of_hugging_face(images, tmp_path):
    told = {
        "info": {"features": {"label": {"names": ["cat", "dog", "owl"], "_type": "ClassLabel"}}}
    }
    values = [{"bytes": image, "path": "x.png"} for image in images[:4]]
    table = pa.table({"image": values, "label": [1, 0, -1, None]})
    table = table.replace_schema_metadata({"huggingface": json.dumps(told)})
    pq.write_table(table, tmp_path / "some.parquet")
    found, names = listed(f"parquet:{tmp_path}")
    assert names == ("cat", "dog", "owl")
    labels = {key.rpartition("/")[2]: label for some in found.values() for key, label in some}
    assert labels == {"0": 1, "1": 0, "2": -1, "3": -1}
    table = table.set_column(1, "label", pa.array([0, 1, 2, 3]))
    pq.write_table(table, tmp_path / "some.parquet")
    with pytest.raises(VqbeamError, match="has a label 3, and names for 3 classes; set data.label"):
        listed(f"parquet:{tmp_path}")


def test_other_types_of_columns(images, expected, tmp_path):
    table = pa.table(
        {
            "photo": pa.array(images, pa.large_binary()),
            "kind": pa.array(names_of(COUNT)).dictionary_encode(),
        }
    )
    pq.write_table(table, tmp_path / "some.parquet")
    keys = {"image_key": "photo", "label_key": "kind"}
    run = prepared(tmp_path / "run", f"parquet:{tmp_path / 'some.parquet'}", **keys)
    assert_same(by_number(run), expected)


def write_tar(path, members):
    with tarfile.open(path, "w:gz" if path.suffix == ".tgz" else "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def test_labels_in_json_and_compressed_tars(images, tmp_path):
    members = []
    for index, (image, name) in enumerate(zip(images[:6], names_of(6), strict=True)):
        told = {"kind": name, "caption": "a.b"} if index else {"kind": None}
        members += [
            (f"./in.dir/{index}.json", json.dumps(told).encode()),
            (f"./in.dir/{index}.mask.png", b"no image of its own"),
            (f"./in.dir/{index}.JPG", image),
            (f"./in.dir/{index}.cls", b"unused"),
        ]
    write_tar(tmp_path / "some.tgz", members)
    settings = {"label_key": "kind", "validation_share": 0.5}
    found, names = listed(f"webdataset:{tmp_path}", **settings)
    assert names == tuple(sorted(CLASSES))
    labels = {key: label for some in found.values() for key, label in some}
    expected = [-1, *map(names.index, names_of(6)[1:])]
    assert labels == {f"some.tgz/in.dir/{i}": label for i, label in enumerate(expected)}
    source = open_source(data(f"webdataset:{tmp_path}", **settings))
    read = {raw.key: raw.data for unit in source.plan() for raw in source.read(unit)}
    assert read == {f"some.tgz/in.dir/{i}": image for i, image in enumerate(images[:6])}


@pytest.mark.parametrize("kind", ["parquet", "webdataset", "tfrecord"])
def test_a_damaged_image_is_a_dead_letter_until_it_is_mended(kind, images, expected, tmp_path):
    path = tmp_path / f"some{ENDINGS[kind]}"
    damaged = [*images[:5], images[5][:300], b"", *images[7:]]
    write_file(kind, path, damaged, names_of(COUNT))
    with pytest.raises(VqbeamError, match="^2 of 44 images could not be decoded"):
        prepared(tmp_path / "run", f"{kind}:{path}")
    run = RunFolder(tmp_path / "run")
    lines = (run.folder(STAGE) / DEAD_LETTERS).read_text().splitlines()
    rows = ["005", "006"] if kind == "webdataset" else ["5", "6"]
    assert [json.loads(line)["key"] for line in lines] == [f"{path.name}/{row}" for row in rows]
    write_file(kind, path, images, names_of(COUNT))
    do_stage(run)
    assert_same(by_number(run), expected)


def written_at(run):
    """Returns when each shard was written."""
    return {path.name: modified(path) for path in run.folder(STAGE).glob("*.tfrecord-*")}


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_goes_on_after_a_kill(kind, images, tmp_path):
    path = write_file(kind, tmp_path / f"some{ENDINGS[kind]}", images, names_of(COUNT))
    whole = prepared(tmp_path / "whole", f"{kind}:{path}")
    run = RunFolder(tmp_path / "run")
    run.start(whole.load_config())
    run.begin(STAGE)
    units = open_source(run.load_config().data).plan()
    for unit in units[:3]:
        prepare_shard(str(run.root), unit)
    before = written_at(run)
    assert len(before) == 3 < len(units)
    do_stage(run)
    after = written_at(run)
    assert before.items() <= after.items()
    assert shard_contents(run.folder(STAGE)) == shard_contents(whole.folder(STAGE))


@pytest.mark.slow
def test_labels_that_were_mended_are_written_anew(images, tmp_path):
    kind = "tfrecord"
    path = write_file(kind, tmp_path / f"some{ENDINGS[kind]}", images, names_of(COUNT))
    run = RunFolder(tmp_path / "run")
    run.start(small_config(f"{kind}:{path}"))
    run.begin(STAGE)
    for unit in open_source(run.load_config().data).plan():
        prepare_shard(str(run.root), unit)
    mended = names_of(COUNT)[::-1]
    write_file(kind, path, images, mended)
    do_stage(run)
    assert {number: name for number, (_, name) in by_number(run).items()} == dict(enumerate(mended))


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_that_is_gone(kind, images, tmp_path):
    path = write_file(kind, tmp_path / f"some{ENDINGS[kind]}", images)
    source = open_source(data(f"{kind}:{path}", images_per_shard=100))
    unit = source.plan()[0]
    write_file(kind, path, images[:30])
    with pytest.raises(VqbeamError, match=r"has no image 0?\d+ any more; put back|cannot be read"):
        list(source.read(unit))


def refused(source, **changes):
    """Returns the one line that a source is refused with, before anything is written."""
    with pytest.raises(VqbeamError) as caught:
        open_source(data(source, **changes)).check()
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("kind", KINDS)
def test_paths_without_files(kind, tmp_path):
    ending = ENDINGS[kind]
    for path in (tmp_path / "missing", tmp_path / "*.x"):
        message = f"there is no file or folder '{path}', and as a pattern it matches no file; check"
        assert message in refused(f"{kind}:{path}")
    (tmp_path / f".hidden{ending}").write_text("x")
    (tmp_path / "other.txt").write_text("x")
    message = refused(f"{kind}:{tmp_path}")
    assert f"the folder '{tmp_path}' holds no file for {kind}; a file counts whose" in message
    assert ending in message


def test_a_check_reads_the_first_file_only(images, tmp_path):
    write_file("tfrecord", tmp_path / "a.tfrecord", images)
    (tmp_path / "b.tfrecord").write_bytes(b"nothing of that kind")
    source = open_source(data(f"tfrecord:{tmp_path}"))
    source.check()
    with pytest.raises(VqbeamError, match="b.tfrecord cannot be read"):
        source.plan()


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files(kind, images, tmp_path):
    path = write_file(kind, tmp_path / f"some{ENDINGS[kind]}", images, names_of(COUNT))
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"nothing of that kind " * 99):
        path.write_bytes(content)
        source = open_source(data(f"{kind}:{path}"))
        with pytest.raises(VqbeamError, match=f"^{path} cannot be read .*; replace it$") as caught:
            for unit in source.plan():
                list(source.read(unit))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_only_regular_files_are_read(kind, tmp_path):
    path = tmp_path / f"some{ENDINGS[kind]}"
    os.mkfifo(path)  # would be waited for without end
    for given in (path, tmp_path):
        source = open_source(data(f"{kind}:{given}"))
        for read in (source.check, source.plan):
            with pytest.raises(OSError, match=f"not a regular file: '{path}'"):
                read()


@pytest.mark.parametrize("kind", ["webdataset", "tfrecord"])
def test_a_file_damaged_in_the_middle(kind, images, tmp_path):
    path = tmp_path / f"some{ENDINGS[kind]}"
    if kind == "webdataset":
        # `tarfile` itself takes such a header for the end of the file.
        write_tar(path, [(f"{index}.png", image) for index, image in enumerate(images)])
        place = b"20.png"
    else:
        write_file(kind, path, images)
        place = b"image"
    content = bytearray(path.read_bytes())
    first = content.rindex(place)
    content[first : first + 3] = b"\xff\xff\xff"
    path.write_bytes(content)
    with pytest.raises(VqbeamError, match=f"^{path} cannot be read"):
        open_source(data(f"{kind}:{path}")).plan()


@pytest.mark.parametrize("kind", ["parquet", "tfrecord", "array"])
def test_features_that_are_not_there(kind, images, tmp_path):
    path = write_file(kind, tmp_path / f"some{ENDINGS[kind]}", images, names_of(COUNT))
    image = "images" if kind == "array" else "image"
    told = refused(f"{kind}:{path}", image_key="img")
    assert told == f"{path} has no 'img'; set data.image_key to one of {image}, label"
    label = "labels" if kind == "array" else "label"
    told = refused(f"{kind}:{path}", label_key="kind")
    assert told == f"{path} has no 'kind'; set data.label_key to one of image, {label} or none"


def test_labels_that_no_json_has(images, tmp_path):
    write_tar(tmp_path / "some.tar", [("0.png", images[0]), ("0.json", b'{"a": 1, "b": [2]}')])
    source = f"webdataset:{tmp_path}"
    told = refused(source, label_key="kind")
    place = f"'0' in {tmp_path / 'some.tar'}"
    assert told == f"{place} has no 'kind'; set data.label_key to one of a, b, or to none"
    told = refused(source, label_key="b")
    assert told.startswith(f"label of {place} is [2], not an integer or string; set data.label_key")


def test_two_images_of_one_key(images, tmp_path):
    members = [("0.png", images[0]), ("0.cls", b"1"), ("1.png", images[2]), ("0.png", images[4])]
    write_tar(tmp_path / "some.tar", members)
    with pytest.raises(VqbeamError, match="has members of '0' in two places; rename some, or"):
        open_source(data(f"webdataset:{tmp_path}")).plan()


@pytest.mark.parametrize("kind", KINDS)
def test_files_without_images(kind, tmp_path):
    path = tmp_path / f"some{ENDINGS[kind]}"
    if kind == "array":
        np.savez(path, images=np.zeros((0, 8, 8, 3), np.uint8))
    elif kind == "parquet":
        pq.write_table(pa.table({"image": pa.array([], pa.binary())}), path)
    else:
        write_file(kind, path, [])
    with pytest.raises(VqbeamError, match=f"^{kind}:{path} has no image to train on$"):
        open_source(data(f"{kind}:{path}")).plan()


@pytest.mark.parametrize("kind", KINDS)
def test_files_with_one_image(kind, images, tmp_path):
    path = write_file(kind, tmp_path / f"some{ENDINGS[kind]}", images[:1])
    with pytest.raises(VqbeamError, match="has no image to hold out; it takes two images or more"):
        open_source(data(f"{kind}:{path}")).plan()


def test_columns_of_other_types(tmp_path):
    path = tmp_path / "some.parquet"
    columns = {"image": [b"x"], "pixels": [[1, 2]], "share": [0.5], "label": [True]}
    pq.write_table(pa.table(columns), path)
    told = refused(f"parquet:{path}", image_key="pixels")
    assert told == (
        f"column 'pixels' of {path} is of type list<element: int64>, which holds no encoded "
        "images; set data.image_key"
    )
    for label, kind in (("share", "double"), ("label", "bool")):
        told = refused(f"parquet:{path}", label_key=label)
        assert told == (
            f"column '{label}' of {path} is of type {kind}, not integer or string; set "
            "data.label_key to another, or to none"
        )


def test_features_of_other_types(tmp_path):
    train = tf.train
    features = {
        "image": train.Feature(bytes_list=train.BytesList(value=[b"x"])),
        "raw": train.Feature(int64_list=train.Int64List(value=[1, 2])),
        "share": train.Feature(float_list=train.FloatList(value=[0.5])),
    }
    path = tmp_path / "some.tfrecord-00000-of-00001"
    with tf.io.TFRecordWriter(str(path)) as writer:
        example = train.Example(features=train.Features(feature=features))
        writer.write(example.SerializeToString())
    source = f"tfrecord:{tmp_path}"
    told = refused(source, image_key="raw")
    assert told == (
        f"feature 'raw' of {path} is a int64_list, not encoded images; set data.image_key"
    )
    for label, kind in (("share", "float_list of 1"), ("raw", "int64_list of 2")):
        assert refused(source, label_key=label) == (
            f"feature '{label}' of {path} is a {kind}, not one integer or string; set "
            "data.label_key to another, or to none"
        )


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((5, 8, 8, 3)), None, r"'image' of .* is float64 \[5, 8, 8, 3\]; give uint8 \["),
        (np.zeros((5, 3, 8, 8), "u1"), None, r"is uint8 \[5, 3, 8, 8\]; give .* 1 to 4 channels"),
        (np.zeros((8, 8), "u1"), None, r"is uint8 \[8, 8\]; give"),
        (np.zeros((5, 8, 8), "u1", "F"), None, "in Fortran order; give uint8 .* in C order"),
        (np.zeros((5, 8, 8), "u1"), np.zeros(4, int), r"'label' of .* is int64 \[4\]; give 5 int"),
        (np.zeros((5, 8, 8), "u1"), np.zeros(5), r"is float64 \[5\]; give 5 integers or strings"),
    ],
)
def test_arrays_of_other_types(images, labels, message, tmp_path):
    labels = {} if labels is None else {"labels": labels}
    np.savez(tmp_path / "some.npz", images=images, **labels)
    assert re.search(message, refused(f"array:{tmp_path / 'some.npz'}"))


def test_labels_that_are_no_classes(images, tmp_path):
    path = write_file("parquet", tmp_path / "some.parquet", images[:3], [10**12, 2, 3])
    message = "^'label' of parquet:.* would have 1,000,000,000,001 classes; set data.label_key to"
    with pytest.raises(VqbeamError, match=message):
        open_source(data(f"parquet:{path}")).plan()


@pytest.mark.system
def test_a_dataset_on_the_hub(images, expected, tmp_path):
    write_file("parquet", tmp_path / "hub" / "data" / "some.parquet", images, names_of(COUNT))
    (tmp_path / "hub" / "README.md").write_text("Some images.")
    flags = [f"--data.{side}={SIDE}" for side in ("height", "width")]

    def say(run, name, endpoint, status=0):
        log = tmp_path / f"{run}.txt"
        words = ("prepare", "glyphs", "--data.source", f"hf:{name}", "--run-dir", tmp_path / run)
        where = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "*"}
        assert status_of(log, *words, *flags, environment=where) == status, log.read_text()
        return log.read_text()

    with hub("me/set", files_in(tmp_path / "hub"), "datasets") as repository:
        endpoint = repository.endpoint
        assert f"hf:me/set is not in {tmp_path / 'home'}" in say("first", "me/set", endpoint)
        told = say("wrong", "me/sett", endpoint, status=1)
        assert told.startswith("vqbeam: hf:me/sett cannot be downloaded (404 Client Error")
        assert told.count("\n") == 1
        assert "check the name and the connection, or download its Parquet files elsewhere" in told
        assert not (tmp_path / "wrong").exists()
        # As if another program had downloaded a part of it.
        (stored,) = (tmp_path / "home").rglob("snapshots/*/data/some.parquet")
        stored.unlink()
        say("part", "me/set", endpoint)
    assert_same(by_number(RunFolder(tmp_path / "part")), expected)
    assert_same(by_number(RunFolder(tmp_path / "first")), expected)
    assert {p.suffix for p in (tmp_path / "home").rglob("snapshots/*/*/*")} == {".parquet"}
    # By now, nothing answers there.
    assert "is not in" not in say("second", "me/set", endpoint)
    told = say("third", "me/other", endpoint, status=1)
    assert told.startswith("vqbeam: hf:me/other cannot be downloaded ([Errno 111] Connection ref")
    assert told.count("\n") == 1
