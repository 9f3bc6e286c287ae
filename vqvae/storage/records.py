"""The image and code record formats, as TFDS datasets that can be read without vqbeam.

The records are written by `pipelines` and read by training. They have these features:

    images: image uint8 [H, W, C] as PNG; key string; and, depending on the source, label (a class)
            or attributes uint8 [A] of zeros and ones
    codes:  codes uint16 or uint32 [h, w], [h, w, depth] for several codes per position, or [T] for
            several grids (vqvae/layout.py); key string; and label or attributes as for images

`key` identifies an image in its source: the TFDS example id, or the path relative to the folder.
For codes of an augmented view (vqvae/augmentation.py), the name of the view is appended to the key:
`a/1.png#flip`.
"""

import contextlib
import json
import math
import os
import uuid
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from etils import epath

from vqbeam.configs import VqbeamError
from vqbeam.vqvae.layout import CodeLayout
from vqbeam.vqvae.storage.files import matching
from vqbeam.vqvae.storage.labels import NO_CLASS, Labels
from vqbeam.vqvae.storage.run_folder import MANIFEST

# With JAX, TensorFlow only reads and writes records; on a GPU, it would take JAX's memory.
if keras.backend.backend() == "jax":
    tf.config.set_visible_devices([], "GPU")

# Maximum bytes of images being decoded at once. On a GPU, decoding is most of the work of the
# encode stage and needs all cores.
_DECODED = 2**29

# The options of every tf.data pipeline here. The thread with which TensorFlow tunes a pipeline can
# miss that its iterator is deleted; the deletion, and with it the end of a training, would then
# wait for the next time that the thread wakes, up to a minute.
UNTUNED = tf.data.Options()
UNTUNED.autotune.enabled = False

IMAGES_VERSION = "1.0.0"
CODES_VERSION = "1.0.0"


# TFDS template for the shards of a dataset to which shards may be added later.
GROWING = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}"


class Shard(NamedTuple):
    """One file of a dataset: file `index`, counted from 0, of the `count` files of `split`.

    `count` is None if shards may be added later; the file name then does not contain it.
    """

    dataset: str
    split: str
    index: int
    count: int | None

    @property
    def filename(self) -> str:
        """The file name that TFDS expects."""
        if self.count is None:
            return f"{self.dataset}-{self.split}.tfrecord-{self.index:05d}"
        width = max(5, len(str(self.count)))
        place = f"{self.index:0{width}d}-of-{self.count:0{width}d}"
        return f"{self.dataset}-{self.split}.tfrecord-{place}"


def image_features(image_shape: Sequence[int], labels: Labels) -> Any:
    """Returns the TFDS features of an image record, which has no label if `labels` has no names."""
    image = tfds.features.Image(shape=tuple(image_shape), dtype=np.uint8, encoding_format="png")
    return _features({"image": image}, labels)


def code_features(layout: CodeLayout, labels: Labels) -> Any:
    """Returns the TFDS features of a code record; see `code_dtype` for the dtype of the codes."""
    tensor = tfds.features.Tensor(shape=layout.shape, dtype=code_dtype(layout.num_codes))
    return _features({"codes": tensor}, labels)


def code_dtype(num_codes: int) -> type[np.unsignedinteger]:
    """Returns the NumPy dtype in which codes in [0, num_codes) are stored."""
    return np.uint16 if num_codes <= 2**16 else np.uint32


def _features(content: dict[str, Any], labels: Labels) -> Any:
    names = list(labels.names)
    if names and labels.kind == "attributes":
        # A tensor feature has no names, so they are stored as JSON in its description.
        description = tfds.features.Documentation(desc=json.dumps(names, ensure_ascii=False))
        content["attributes"] = tfds.features.Tensor(
            shape=(len(names),), dtype=np.uint8, doc=description
        )
    elif names:
        content["label"] = tfds.features.ClassLabel(names=names)
    return tfds.features.FeaturesDict({**content, "key": tfds.features.Text()})


def serialize(example: dict[str, Any]) -> bytes:
    """Returns an example as a serialized `tf.train.Example`; the bytes are deterministic.

    The record has the same content as with TFDS's serializer and takes a fifth of the time. The
    features are sorted by name, whereas TFDS leaves their order to protobuf.

    Args:
        example: Values by feature name: images as PNG bytes, strings, and integers of any shape.
    """
    record = tf.train.Example()
    features = record.features.feature  # filling it in place is twice as fast as assigning messages
    for name, value in example.items():
        if isinstance(value, str | bytes):
            content = value.encode() if isinstance(value, str) else value
            features[name].bytes_list.value.append(content)
        else:
            features[name].int64_list.value.extend(np.asarray(value).ravel().tolist())
    return record.SerializeToString(deterministic=True)


@contextlib.contextmanager
def open_shard(path: epath.Path) -> Iterator[tf.io.TFRecordWriter]:
    """Yields a TFRecord writer for `path`; the file appears only once the block has succeeded.

    The temporary name starts with a dot, so that it is not mistaken for a shard, and is unique, so
    that two workers with the same shard do not write to the same file.
    """
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}"
    try:
        with tf.io.TFRecordWriter(os.fspath(temporary)) as writer:
            yield writer
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    temporary.replace(path)


def write_metadata(
    folder: epath.Path,
    features: Any,
    splits: dict[str, list[tuple[int, int]]],
    *,
    name: str,
    version: str,
    description: str,
    names: str | None = None,
) -> list[epath.Path]:
    """Writes the metadata files that turn a folder of shards into a TFDS dataset.

    Args:
        folder: The folder with the shards.
        features: TFDS features of a record.
        splits: For each split, the number of records and bytes of each shard, in order.
        name: Name of the dataset, which is the prefix of its shards' file names.
        version: Version of the record format.
        description: TFDS description of the dataset.
        names: TFDS template of the shards' file names, such as `GROWING`; None for TFDS's default.

    Returns:
        The paths of the metadata files, sorted.
    """
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name=name, filetype_suffix="tfrecord", template=names
    )
    infos = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=[records for records, _ in shards],
            num_bytes=sum(size for _, size in shards),
            filename_template=template.replace(split=split),
        )
        for split, shards in splits.items()
    ]
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=features,
        split_infos=infos,
        filename_template=template,
        version=version,
        description=description,
        check_data=False,
    )
    return sorted(
        path
        for path in folder.iterdir()
        # The manifest is in the same folder if the stage has finished before.
        if path.suffix in (".json", ".txt") and path.name != MANIFEST
    )


def open_dataset(folder: epath.Path) -> Any:
    """Returns the TFDS builder for a folder with shards and metadata."""
    return tfds.builder_from_directory(os.fspath(folder))


def keys_in(shards: Sequence[epath.Path]) -> set[str]:
    """Returns the keys of all records in the given shards of images or codes."""
    spec = {"key": tf.io.FixedLenFeature((), tf.string)}
    records = tf.data.TFRecordDataset([os.fspath(path) for path in shards]).with_options(UNTUNED)
    parsed = records.batch(4096).map(lambda batch: tf.io.parse_example(batch, spec)["key"])
    return {key.decode() for batch in parsed.as_numpy_iterator() for key in batch}


def labels_of(builder: Any) -> Labels:
    """Returns the labels of an image or code dataset."""
    features = builder.info.features
    if "attributes" in features:
        return Labels(tuple(json.loads(features["attributes"].doc.desc)), "attributes")
    return Labels(tuple(features["label"].names)) if "label" in features else Labels()


def label_of(example: dict[str, Any]):
    """Returns the label of an example, for use in tf.data.

    Returns:
        An int32 tensor: the class as a scalar, −1 for data without labels; or attributes [A] of
        zeros and ones.
    """
    if "attributes" in example:
        return tf.cast(example["attributes"], tf.int32)
    return tf.cast(example["label"], tf.int32) if "label" in example else tf.constant(NO_CLASS)


def read_split(builder: Any, split: str, *, first: int = 0, last: int | None = None):
    """Returns the examples of a split in the order on disk.

    Args:
        builder: From `open_dataset`.
        split: Name of the split.
        first: Index of the first example.
        last: Index after the last example; None for all.

    Returns:
        A tf.data.Dataset of dictionaries with the features described in the module docstring.
    """
    instruction = tfds.core.ReadInstruction(split, from_=first, to=last, unit="abs")
    config = tfds.ReadConfig(
        interleave_cycle_length=1, try_autocache=False, enable_ordering_guard=True
    )
    examples = builder.as_dataset(split=instruction, shuffle_files=False, read_config=config)
    return examples.with_options(UNTUNED)


def image_batches(builder: Any, split: str, shard: int, batch_size: int):
    """Returns batches of one shard of images, in the order on disk.

    This is twice as fast as TFDS, which parses one example at a time instead of a batch.

    Args:
        builder: From `open_dataset`, for images.
        split: Name of the split.
        shard: Index of the shard.
        batch_size: Images in a batch; the last batch may be smaller.

    Returns:
        A tf.data.Dataset of dictionaries: image uint8 [B, H, W, C], key [B], and label [B] or
        attributes [B, A], int64.
    """
    features = builder.info.features
    shape = features["image"].shape
    own = {"image": tf.string, "key": tf.string, "label": tf.int64, "attributes": tf.int64}
    spec = {
        name: tf.io.FixedLenFeature(() if name == "image" else features[name].shape, own[name])
        for name in features
    }

    def decode(records):
        batch = tf.io.parse_example(records, spec)
        batch["image"] = tf.map_fn(
            lambda png: tf.ensure_shape(tf.io.decode_png(png, shape[-1]), shape),
            batch["image"],
            fn_output_signature=tf.TensorSpec(shape, tf.uint8),
        )
        return batch

    records = tf.data.TFRecordDataset(os.fspath(builder.info.splits[split].filepaths[shard]))
    calls = batches_at_once(batch_size * math.prod(shape))
    batches = records.batch(batch_size).map(decode, num_parallel_calls=calls).prefetch(2)
    return batches.with_options(UNTUNED)


def batches_at_once(size: int) -> int:
    """Returns how many batches of `size` bytes are decoded at once: up to one per core.

    There are at least two, so that one is decoded while another is encoded.
    """
    return max(2, min(os.cpu_count(), _DECODED // size))


def training_batches(dataset, *, size: int, batch_size: int, first_step: int, seed: int):
    """Returns an endless dataset of shuffled batches, starting with the batch of `first_step`.

    The order depends only on `seed` and TensorFlow's global seed: pass p over the data is shuffled
    with `seed + p`, and batches can span passes. Resuming skips examples of at most one pass.

    Args:
        dataset: tf.data.Dataset of `size` examples.
        size: Number of examples.
        batch_size: Examples in a batch.
        first_step: Index of the first batch.
        seed: Seed of the shuffle.
    """
    first_pass, offset = divmod(first_step * batch_size, size)
    # The shuffle buffer has at most 512 MB, enough for tens of thousands of small images.
    example_bytes = sum(
        spec.shape.num_elements() * spec.dtype.size
        for spec in tf.nest.flatten(dataset.element_spec)
        if spec.shape.is_fully_defined() and spec.dtype != tf.string
    )
    buffer = min(size, max(batch_size, 2**29 // example_bytes))

    def shuffled(index):
        return dataset.shuffle(buffer, seed=seed + index, reshuffle_each_iteration=False)

    passes = tf.data.Dataset.range(first_pass, np.iinfo(np.int64).max)
    examples = passes.flat_map(shuffled).skip(offset)
    return examples.batch(batch_size, drop_remainder=True).with_options(UNTUNED)


@contextlib.contextmanager
def damaged_records(folder: epath.Path):
    """Converts TensorFlow's error for a damaged record into a VqbeamError that names its shard."""
    try:
        yield
    except tf.errors.DataLossError as error:
        damaged = [path for path in matching(folder, "*.tfrecord-*") if not _is_sound(path)]
        # Only the shards of a run can be rewritten one by one.
        is_of_run = damaged and (folder / MANIFEST).exists()
        what = " and ".join(map(str, damaged)) if is_of_run else folder
        raise VqbeamError(
            f"a record in {what} is damaged ({error.message.splitlines()[0]}); delete {what} and "
            f"run its stage again{', which writes only what is missing' if is_of_run else ''}"
        ) from error


def _is_sound(path: epath.Path) -> bool:
    """Returns whether all checksums in a shard are right, which takes reading all of it."""
    try:
        for _ in tf.data.TFRecordDataset(os.fspath(path)).with_options(UNTUNED):
            pass
    except tf.errors.DataLossError:
        return False
    return True
