import os

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from etils import epath
from shard_files import write_shard

from vqbeam.configs import VqbeamError
from vqbeam.vqvae.layout import CodeLayout
from vqbeam.vqvae.storage.labels import Labels
from vqbeam.vqvae.storage.records import (
    CODES_VERSION,
    Shard,
    batches_at_once,
    code_dtype,
    code_features,
    damaged_records,
    image_batches,
    image_features,
    label_of,
    labels_of,
    open_dataset,
    read_split,
    serialize,
    training_batches,
    write_metadata,
)

ABC = Labels(("a", "b", "c"))


def write_dataset(folder, features, examples, per_shard=4):
    """Writes the examples of one split after another, in shards of `per_shard`."""
    folder = epath.Path(folder)
    folder.mkdir(parents=True)
    splits = {}
    for split, of_split in examples.items():
        parts = [of_split[i : i + per_shard] for i in range(0, len(of_split), per_shard)]
        for index, part in enumerate(parts):
            shard = Shard(folder.name, split, index, len(parts))
            records = [serialize(example) for example in part]
            size = write_shard(folder / shard.filename, records)
            splits.setdefault(split, []).append((len(part), size))
    files = write_metadata(
        folder,
        features,
        splits,
        name=folder.name,
        version=CODES_VERSION,
        description="What it is.",
    )
    return folder, files


def encoded(image):
    return tf.io.encode_png(image).numpy()


def code_examples(count, shape=(2, 3), num_codes=500, label=True):
    numbers = np.random.default_rng(0)
    dtype = code_dtype(num_codes)
    return [
        {"codes": numbers.integers(0, num_codes, shape).astype(dtype), "key": f"key-{i}"}
        | ({"label": i % 3} if label else {})
        for i in range(count)
    ]


@pytest.fixture
def codes(tmp_path):
    features = code_features(CodeLayout(500, ((2, 3),)), ABC)
    examples = {"train": code_examples(10), "validation": code_examples(3)}
    return (*write_dataset(tmp_path / "codes", features, examples), examples)


@pytest.mark.parametrize(("names", "channels"), [((), 1), (("hut", "schuhe"), 3)])
def test_images_round_trip(tmp_path, names, channels):
    shape = (6, 5, channels)
    images = np.random.default_rng(0).integers(0, 256, (9, *shape), np.uint8)
    examples = [
        {"image": encoded(image), "key": f"ordner/bild {i}.png"}
        | ({"label": i % 2} if names else {})
        for i, image in enumerate(images)
    ]
    features = image_features(shape, Labels(names))
    folder, _ = write_dataset(tmp_path / "images", features, {"train": examples})
    builder = tfds.builder_from_directory(os.fspath(folder))
    assert builder.info.splits["train"].num_examples == 9
    assert labels_of(builder) == (names, "classes")
    for i, found in enumerate(tfds.as_numpy(builder.as_dataset(split="train"))):
        np.testing.assert_array_equal(found["image"], images[i])
        assert found["image"].dtype == np.uint8
        assert found["key"].decode() == f"ordner/bild {i}.png"
        assert ("label" in found) == bool(names) and found.get("label", i % 2) == i % 2


@pytest.mark.parametrize("content", ["image", "codes"])
def test_attributes_round_trip(tmp_path, content):
    labels = Labels(("with, comma", "größe", "c"), "attributes")
    values = np.random.default_rng(0).integers(0, 2, (5, 3), np.uint8)
    if content == "image":
        features = image_features((4, 4, 1), labels)
        some = encoded(np.zeros((4, 4, 1), np.uint8))
    else:
        features, some = code_features(CodeLayout(9, ((2, 2),)), labels), np.zeros((2, 2), "uint16")
    examples = [{content: some, "key": "k", "attributes": row} for row in values]
    folder, _ = write_dataset(tmp_path / "set", features, {"train": examples})
    builder = open_dataset(folder)
    assert labels_of(builder) == labels
    found = list(read_split(builder, "train").as_numpy_iterator())
    assert all(set(example) == {content, "key", "attributes"} for example in found)
    stacked = np.stack([example["attributes"] for example in found])
    assert stacked.dtype == np.uint8
    np.testing.assert_array_equal(stacked, values)


def test_the_label_of_an_example():
    assert label_of({"label": tf.constant(4, tf.int64)}).numpy() == 4
    assert label_of({"key": "k"}).numpy() == -1
    attributes = label_of({"attributes": tf.constant([0, 1], tf.uint8)})
    assert attributes.dtype == tf.int32 and attributes.numpy().tolist() == [0, 1]


@pytest.mark.parametrize(
    ("names", "num_codes", "dtype"),
    [
        ((), 500, "uint16"),
        (("a", "b", "c"), 2**16, "uint16"),
        (("a", "b", "c"), 2**16 + 1, "uint32"),
    ],
)
def test_codes_round_trip(tmp_path, names, num_codes, dtype):
    examples = code_examples(6, num_codes=num_codes, label=bool(names))
    examples[0]["codes"][:] = num_codes - 1  # the largest must fit
    features = code_features(CodeLayout(num_codes, ((2, 3),)), Labels(names))
    folder, _ = write_dataset(tmp_path / "codes", features, {"validation": examples})
    builder = open_dataset(folder)
    assert builder.info.features["codes"].np_dtype == dtype == np.dtype(code_dtype(num_codes))
    found = list(read_split(builder, "validation").as_numpy_iterator())
    assert len(found) == 6
    for one, example in zip(found, examples, strict=True):
        assert one["codes"].dtype == dtype
        np.testing.assert_array_equal(one["codes"], example["codes"])
        assert one["key"].decode() == example["key"]
        assert one.get("label") == example.get("label")


@pytest.mark.parametrize(
    "layout", [CodeLayout(500, ((2, 3),), depth=4), CodeLayout(500, ((1, 2), (2, 4)))]
)
def test_codes_of_several_levels_round_trip(tmp_path, layout):
    examples = code_examples(3, shape=layout.shape)
    features = code_features(layout, ABC)
    folder, _ = write_dataset(tmp_path / "codes", features, {"train": examples})
    builder = open_dataset(folder)
    assert builder.info.features["codes"].shape == layout.shape
    found = list(read_split(builder, "train").as_numpy_iterator())
    for one, example in zip(found, examples, strict=True):
        np.testing.assert_array_equal(one["codes"], example["codes"])


def test_metadata(codes):
    folder, files, examples = codes
    assert {path.name for path in files} >= {"dataset_info.json", "features.json"}
    info = open_dataset(folder).info
    assert str(info.version) == "1.0.0" and info.description == "What it is."
    assert info.splits["train"].shard_lengths == [4, 4, 2]
    written = sum(path.stat().length for path in folder.glob("codes-*"))
    assert sum(split.num_bytes for split in info.splits.values()) == written


def test_shard_name_is_the_one_that_tfds_looks_for(codes):
    folder, _, _ = codes
    assert Shard("codes", "train", 1, 3).filename == "codes-train.tfrecord-00001-of-00003"
    # As TFDS writes numbers of more than five digits.
    kind = {"dataset_name": "codes", "split": "train", "filetype_suffix": "tfrecord"}
    theirs = tfds.core.ShardedFileTemplate(folder, **kind)
    for count in (99_999, 100_000, 1_234_567):
        name = theirs.sharded_filepath(shard_index=7, num_shards=count).name
        assert Shard("codes", "train", 7, count).filename == name
    assert open_dataset(folder).info.splits["train"].filenames == [
        Shard("codes", "train", i, 3).filename for i in range(3)
    ]


@pytest.mark.parametrize(("first", "last"), [(0, None), (0, 4), (3, 9), (5, 6), (9, None)])
def test_read_split_keeps_the_order_and_slices(codes, first, last):
    folder, _, examples = codes
    found = read_split(open_dataset(folder), "train", first=first, last=last)
    keys = [example["key"].decode() for example in found.as_numpy_iterator()]
    assert keys == [example["key"] for example in examples["train"][first:last]]


@pytest.mark.parametrize(
    ("megabytes", "cores", "expected"),
    [(3, 16, 16), (100, 16, 5), (100, 2, 2), (600, 16, 2), (3, 1, 2)],
)
def test_every_core_decodes_a_batch_within_bounds(monkeypatch, megabytes, cores, expected):
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    assert batches_at_once(megabytes * 2**20) == expected


@pytest.mark.parametrize(
    ("labels", "channels"), [(Labels(), 1), (ABC, 3), (Labels(("a", "b"), "attributes"), 1)]
)
def test_image_batches_are_what_tfds_reads(tmp_path, labels, channels):
    shape = (6, 5, channels)
    numbers = np.random.default_rng(0)
    kinds = {"classes": lambda: {"label": numbers.integers(3)} if labels.names else {}}
    kinds["attributes"] = lambda: {"attributes": numbers.integers(0, 2, 2, np.uint8)}
    examples = [
        {"image": encoded(numbers.integers(0, 256, shape, np.uint8)), "key": f"größe/{i}.png"}
        | kinds[labels.kind]()
        for i in range(10)
    ]
    features = image_features(shape, labels)
    folder, _ = write_dataset(tmp_path / "images", features, {"train": examples}, per_shard=5)
    builder = open_dataset(folder)
    for shard in (0, 1):
        expected = read_split(builder, "train", first=5 * shard, last=5 * shard + 5)
        found = list(image_batches(builder, "train", shard, 2))
        assert [len(batch["key"]) for batch in found] == [2, 2, 1]
        for theirs, number in zip(expected.as_numpy_iterator(), range(5), strict=True):
            ours = {name: values[number % 2] for name, values in found[number // 2].items()}
            assert ours.keys() == theirs.keys()
            for name, value in theirs.items():
                np.testing.assert_array_equal(ours[name].numpy(), value)


def test_no_iterator_waits_for_tuning_when_it_is_deleted(codes, tmp_path):
    features = image_features((6, 5, 1), Labels())
    content = [{"image": encoded(np.zeros((6, 5, 1), np.uint8)), "key": "a"}]
    images, _ = write_dataset(tmp_path / "images", features, {"train": content}, per_shard=1)
    examples = read_split(open_dataset(codes[0]), "train")
    batches = training_batches(examples, size=10, batch_size=2, first_step=0, seed=0)
    for dataset in (examples, batches, image_batches(open_dataset(images), "train", 0, 1)):
        assert dataset.options().autotune.enabled is False


@pytest.mark.parametrize("kind", ["classes", "attributes"])
@pytest.mark.parametrize("content", ["image", "codes", "levels"])
def test_serialize_writes_what_tfds_writes(content, kind):
    labels = Labels(("a", "b", "größe"), kind)
    if content == "image":
        features = image_features((5, 4, 3), labels)
        own = {"image": encoded(np.random.default_rng(0).integers(0, 256, (5, 4, 3), np.uint8))}
    else:
        shapes = {"codes": ((3, 5),), "levels": ((2, 2), (4, 4))}[content]
        layout = CodeLayout(2**16 + 1, shapes)
        features = code_features(layout, labels)
        own = code_examples(1, layout.shape, layout.num_codes)[0]
        own["codes"] = own["codes"].astype("uint32") + 2**16 - 499
        del own["label"]
    own["key"] = "ordner/größe.png"
    label = {"label": np.int64(2)} if kind == "classes" else {"attributes": np.uint8([0, 1, 1])}
    theirs = features.serialize_example(features.encode_example(own | label))
    found = tf.train.Example.FromString(serialize(own | label))
    assert found == tf.train.Example.FromString(theirs) and len(found.features.feature) == 3


def test_write_shard(tmp_path):
    path = epath.Path(tmp_path) / "x-train.tfrecord-00000-of-00001"
    size = write_shard(path, iter([b"one", b"two"]))
    assert size == path.stat().length
    assert list(tf.data.TFRecordDataset(os.fspath(path)).as_numpy_iterator()) == [b"one", b"two"]
    write_shard(path, [b"three"])
    assert list(tf.data.TFRecordDataset(os.fspath(path)).as_numpy_iterator()) == [b"three"]
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_write_shard_leaves_nothing_of_what_failed(tmp_path):
    path = epath.Path(tmp_path) / "x-train.tfrecord-00000-of-00001"

    def failing():
        yield b"one" * 100
        # The name under which it is written begins with a dot: no glob for shards finds it.
        assert not path.exists()
        assert [p.name[0] for p in path.parent.iterdir()] == ["."]
        raise RuntimeError("gone")

    with pytest.raises(RuntimeError, match="gone"):
        write_shard(path, failing())
    assert list(path.parent.iterdir()) == []
    # A whole shard of before stays.
    write_shard(path, [b"whole"])
    with pytest.raises(RuntimeError, match="gone"):
        write_shard(path, half())
    assert list(tf.data.TFRecordDataset(os.fspath(path)).as_numpy_iterator()) == [b"whole"]


def half():
    yield b"half"
    raise RuntimeError("gone")


def stream(count, *, size=10, batch_size=4, first_step=0, seed=0):
    dataset = tf.data.Dataset.range(size).map(lambda i: tf.cast(i, tf.int32))
    batches = training_batches(
        dataset, size=size, batch_size=batch_size, first_step=first_step, seed=seed
    )
    # A shape known beforehand, so that a training step is compiled once.
    assert batches.element_spec.shape == (batch_size,)
    return [batch.tolist() for batch in batches.take(count).as_numpy_iterator()]


@pytest.fixture(params=[0, 7])
def seed(request):
    # As both stages do before they train: see `build_model`.
    tf.random.set_seed(request.param + 1)
    return request.param


def test_each_pass_holds_each_example_once_in_another_order(seed):
    batches = stream(25, seed=seed)
    assert {len(batch) for batch in batches} == {4}
    numbers = np.ravel(batches)
    passes = [tuple(numbers[i : i + 10]) for i in range(0, 100, 10)]
    assert all(sorted(one) == list(range(10)) for one in passes)
    assert len(set(passes)) == 10


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [4, 10, 13])
def test_begins_at_any_step(seed, batch_size):
    unbroken = stream(12, batch_size=batch_size, seed=seed)
    for first_step in (1, 2, 5, 7, 11):
        rest = stream(12 - first_step, batch_size=batch_size, first_step=first_step, seed=seed)
        assert rest == unbroken[first_step:]


def test_a_late_step_is_reached_at_once(seed):
    # Two thousand million examples on: nothing but the pass at hand may be read.
    assert len(stream(2, first_step=2**31 // 4, seed=seed)) == 2


def test_order_depends_on_the_seed():
    orders = []
    for seed in (0, 1, 2):
        tf.random.set_seed(1)
        orders.append(stream(2, seed=seed))
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_large_examples_are_shuffled_within_bounds():
    # A dataset that says that its examples have 128 MB each, of which four are within bounds.
    class Large:
        element_spec = tf.TensorSpec([2**24], tf.int64)

        def shuffle(self, buffer, **_):
            sizes.append(buffer)
            return tf.data.Dataset.range(100)

    for batch_size, expected in [(2, 4), (8, 8)]:
        sizes = []
        batches = training_batches(Large(), size=100, batch_size=batch_size, first_step=0, seed=0)
        next(iter(batches))
        assert set(sizes) == {expected}


def test_a_damaged_record_is_named(codes):
    folder, _, _ = codes
    shard = folder / Shard("codes", "train", 1, 3).filename
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 255
    shard.write_bytes(bytes(data))
    with pytest.raises(VqbeamError, match="a record in .*codes is damaged .*; delete .*codes and"):
        with damaged_records(folder):
            list(read_split(open_dataset(folder), "train"))


def test_a_truncated_shard_is_named(codes):
    folder, _, _ = codes
    shard = folder / Shard("codes", "train", 2, 3).filename
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(VqbeamError, match="a record in .*codes is damaged"):
        with damaged_records(folder):
            list(read_split(open_dataset(folder), "train"))


def test_other_errors_pass_through(tmp_path):
    with pytest.raises(ZeroDivisionError):
        with damaged_records(epath.Path(tmp_path)):
            _ = 1 / 0
