"""Where images come from: TFDS datasets (glyphs among them) and folders of files."""

import difflib
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from etils import epath

from vqbeam.configs import DataConfig, VqbeamError, first_line
from vqbeam.pipelines.sources.folder import list_folder
from vqbeam.pipelines.sources.images import ImageError, decode_image
from vqbeam.vqvae.storage.labels import Labels
from vqbeam.vqvae.storage.records import Shard, damaged_records

DATASET = "images"
_SPLITS = ("train", "validation")
_READ_AT_ONCE = 16  # more is no faster, and photographs may be large


class RawImage(NamedTuple):
    """An image as its source has it.

    Attributes:
        key: Its name in the source.
        data: The encoded bytes, or why there are none.
        label: The class, −1 for none; or for each attribute 1 where the image has it, else 0.
    """

    key: str
    data: bytes | OSError
    label: int | tuple[int, ...]


class Unit(NamedTuple):
    """The part of a source that becomes one shard.

    Attributes:
        shard: The shard to write.
        images: The range of numbers in a TFDS split, or (key, label) of each file of a folder.
        labels: What the images of the source are labelled with.
        total: Images in the whole source, for progress.
    """

    shard: Shard
    images: Sequence[Any]
    labels: Labels
    total: int


def check_source(data: DataConfig) -> None:
    """Finds what is wrong with a source before anything is written or downloaded for it.

    Raises:
        VqbeamError: As `plan` does, as far as it can be told of a dataset not prepared yet.
    """
    if data.source.startswith("folder:"):
        plan(data)
        return
    builder = builder_of(data)
    if builder.is_prepared():
        plan(data)
    else:
        _tfds_labels(data, builder.info)


def plan(data: DataConfig) -> list[Unit]:
    """Divides a source into units of `data.images_per_shard` images.

    Raises:
        VqbeamError: The source is not there, holds no image, or lacks a split or feature.
    """
    if data.source.startswith("folder:"):
        listing = list_folder(
            data.source.removeprefix("folder:"),
            validation_share=data.validation_share,
            max_images=data.max_images,
        )
        if not listing.splits["validation"]:
            raise VqbeamError(
                f"{data.source} has no image to hold out; it takes two images or more, and "
                "data.validation_share above 0"
            )
        return _units(data, listing.splits, listing.labels)
    info = builder_of(data).info
    splits = {split: _images_of(info, data, split)[: data.max_images] for split in _SPLITS}
    if _split_of(data, "train") == _split_of(data, "validation") and _overlap(*splits.values()):
        raise VqbeamError(
            f"data.train_split {data.train_split} and data.validation_split "
            f"{data.validation_split} share images; take parts that do not, such as "
            "train[:90%] and train[90%:]"
        )
    return _units(data, splits, _tfds_labels(data, info))


def read_unit(data: DataConfig, unit: Unit) -> Iterator[RawImage]:
    """Yields the images of a unit, always in the same order, not yet decoded."""
    if data.source.startswith("folder:"):
        root = epath.Path(data.source.removeprefix("folder:")).expanduser()
        for key, label in unit.images:
            yield RawImage(key, _bytes_of(root / key), label)
        return
    yield from _read_tfds(data, unit)


def _bytes_of(file: epath.Path) -> bytes | OSError:
    try:
        return file.read_bytes()
    # One of a million files that may not be read, or is gone by now, is no reason to end.
    except (PermissionError, FileNotFoundError) as error:
        return error


def decode(raw: RawImage, data: DataConfig) -> np.ndarray:
    """Returns an image in the shape that the section asks for: uint8 [H, W, C].

    Raises:
        ImageError: It cannot be used.
    """
    if isinstance(raw.data, OSError):
        raise ImageError(f"the file cannot be read: {raw.data.strerror or raw.data}")
    shape = {"height": data.height, "width": data.width, "channels": data.channels}
    return decode_image(raw.data, **shape, fit=data.fit)


def _split_of(data: DataConfig, split: str) -> str:
    """Returns the split of a TFDS dataset that one of the two is, or is a part of."""
    return getattr(data, f"{split}_split").partition("[")[0]


def _images_of(info, data: DataConfig, split: str) -> range:
    """Returns the numbers that the images of one of the two have in their split."""
    wanted, theirs = getattr(data, f"{split}_split"), _split_of(data, split)
    try:
        (part,) = tfds.core.ReadInstruction.from_spec(wanted).to_absolute(info.splits)
    except (ValueError, AssertionError) as error:
        raise VqbeamError(
            f"{info.full_name} has no split {wanted!r}; set data.{split}_split to one of "
            f"{', '.join(info.splits)}, or to a part of one, such as train[:90%]"
        ) from error
    return range(info.splits[theirs].num_examples)[part.from_ : part.to]


def _overlap(one: range, other: range) -> bool:
    return max(one.start, other.start) < min(one.stop, other.stop)


def _units(data: DataConfig, splits: dict[str, Sequence[Any]], labels: Labels) -> list[Unit]:
    total = sum(len(images) for images in splits.values())
    units = []
    for split, images in splits.items():
        firsts = range(0, len(images), data.images_per_shard)
        for index, first in enumerate(firsts):
            shard = Shard(DATASET, split, index, len(firsts))
            images_of_shard = images[first : first + data.images_per_shard]
            units.append(Unit(shard, images_of_shard, labels, total))
    return units


def builder_of(data: DataConfig) -> tfds.core.DatasetBuilder:
    """Returns the builder of a TFDS dataset or of glyphs, prepared or not.

    Raises:
        VqbeamError: TFDS has no such dataset.
    """
    options = {"data_dir": data.data_dir} if data.data_dir else {}
    if data.source == "glyphs":
        from vqbeam.pipelines.sources.glyphs import Glyphs

        return Glyphs(**options)
    name = data.source.removeprefix("tfds:")
    try:
        return tfds.builder(name, **options)
    except tfds.core.DatasetNotFoundError as error:
        known = tfds.list_builders(with_community_datasets=False)
        close = difflib.get_close_matches(name.partition("/")[0].partition(":")[0], known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "see tfds.list_builders()"
        raise VqbeamError(f"TFDS has no dataset {name!r}; {hint}") from error
    except (ValueError, AssertionError) as error:
        raise VqbeamError(f"TFDS refuses {name!r}: {first_line(error)}") from error


def _tfds_labels(data: DataConfig, info) -> Labels:
    if data.image_key not in info.features:
        raise VqbeamError(
            f"{info.full_name} has no feature {data.image_key!r}; set data.image_key to one of "
            f"{', '.join(info.features)}"
        )
    if not isinstance(info.features[data.image_key], tfds.features.Image):
        raise VqbeamError(
            f"feature {data.image_key!r} of {info.full_name} holds no image; set data.image_key"
        )
    # Not of the usual name, which most datasets without classes do not have.
    if data.label_key not in (*info.features, DataConfig.label_key, "none"):
        raise VqbeamError(
            f"{info.full_name} has no feature {data.label_key!r}; set data.label_key to one of "
            f"{', '.join(info.features)}, or to none"
        )
    label = info.features[data.label_key] if data.label_key in info.features else None
    if isinstance(label, tfds.features.ClassLabel):
        return Labels(tuple(label.names))
    if _is_multi_hot(label):
        return Labels(tuple(label.feature.names), "attributes")
    return Labels(tuple(label), "attributes") if _is_flags(label) else Labels()


def _is_multi_hot(label) -> bool:
    """Tells whether a feature lists the classes of an image, of which it may have several."""
    is_list = isinstance(label, tfds.features.Sequence)
    return is_list and isinstance(label.feature, tfds.features.ClassLabel)


def _is_flags(label) -> bool:
    """Tells whether a feature says of each attribute whether an image has it."""
    is_dict = isinstance(label, tfds.features.FeaturesDict)
    return is_dict and all(
        feature.shape == () and feature.np_dtype == np.bool_ for feature in label.values()
    )


def _read_tfds(data: DataConfig, unit: Unit) -> Iterator[RawImage]:
    """Reads a slice of a split, images as their encoded bytes.

    `tfds.beam.ReadFromTFDS` reads the same files, one worker a file, but leaves the examples of a
    one-file dataset in no particular place: putting them in order would shuffle pixels.
    """
    builder = builder_of(data)
    theirs = _split_of(data, unit.shard.split)
    bounds = unit.images[0], unit.images[-1] + 1
    wanted = [data.image_key, *([data.label_key] if unit.labels.names else [])]
    examples = builder.as_dataset(
        split=tfds.core.ReadInstruction(theirs, from_=bounds[0], to=bounds[1], unit="abs"),
        decoders=tfds.decode.PartialDecoding(
            dict.fromkeys(wanted, True), decoders={data.image_key: tfds.decode.SkipDecoding()}
        ),
        read_config=tfds.ReadConfig(
            add_tfds_id=True, interleave_cycle_length=1, try_autocache=False
        ),
    )
    with damaged_records(builder.data_path):
        # Handed over one by one, they would take as long as to decode and encode.
        for batch in examples.ragged_batch(_READ_AT_ONCE).prefetch(2):
            keys, images = batch["tfds_id"].numpy(), batch[data.image_key].numpy()
            labels = _labels_of(batch[data.label_key], unit.labels) if unit.labels.names else None
            for row, image in enumerate(images):
                yield RawImage(os.fsdecode(keys[row]), image, labels[row] if labels else -1)


def _labels_of(values, labels: Labels) -> list[int] | list[tuple[int, ...]]:
    """Returns the labels of a batch as `RawImage` has them, of what TFDS has."""
    if labels.kind == "classes":
        return values.numpy().tolist()
    if isinstance(values, dict):
        columns = [values[name].numpy().astype(int).tolist() for name in labels.names]
        return list(zip(*columns, strict=True))
    numbers = range(len(labels.names))
    lists = values.to_list() if isinstance(values, tf.RaggedTensor) else values.numpy().tolist()
    return [tuple(int(number in of_image) for number in numbers) for of_image in lists]
