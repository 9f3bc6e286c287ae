"""Images in files of each kind that holds many of them, written by the kind's own library."""

import io

import numpy as np
import pandas as pd
import tensorflow as tf
import webdataset
from PIL import Image
from pipeline_fixtures import CLASSES

SIZE = (10, 12)  # not that of the configs
ENDINGS = {"parquet": ".parquet", "webdataset": ".tar", "tfrecord": ".tfrecord", "array": ".npz"}
KINDS = tuple(ENDINGS)


def encoded_images(count, *, first=0):
    """Returns PNG and JPEG files of noise in turn, each as bytes."""
    numbers = np.random.default_rng(first)
    images = []
    for index in range(count):
        data = io.BytesIO()
        pixels = numbers.integers(0, 256, (*SIZE, 3), np.uint8)
        Image.fromarray(pixels).save(data, ("PNG", "JPEG")[index % 2])
        images.append(data.getvalue())
    return images


def names_of(count):
    """Returns the name of the class of each image, the classes in turn."""
    return [CLASSES[index % len(CLASSES)] for index in range(count)]


def ending_of(image):
    """Returns the ending of an image file."""
    return "png" if image.startswith(b"\x89PNG") else "jpg"


def write_folder(folder, images, labels):
    """Writes an image file each, the classes being subfolders."""
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = folder / str(label) / f"{index:03d}.{ending_of(image)}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)


def write_file(kind, path, images, labels=None):
    """Writes a file of a kind, with the labels if there are any; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _WRITERS[kind](path, images, labels)
    return path


def _write_parquet(path, images, labels):
    columns = {"image": [{"bytes": image, "path": None} for image in images]}
    table = pd.DataFrame(columns | ({"label": labels} if labels else {}))
    table.to_parquet(path, row_group_size=7)


def _write_webdataset(path, images, labels):
    with webdataset.TarWriter(str(path)) as writer:
        for index, image in enumerate(images):
            label = {"cls": str(labels[index])} if labels else {}
            writer.write({"__key__": f"{index:03d}", ending_of(image): image} | label)


def _write_tfrecord(path, images, labels):
    train = tf.train
    with tf.io.TFRecordWriter(str(path)) as writer:
        for index, image in enumerate(images):
            features = {"image": train.Feature(bytes_list=train.BytesList(value=[image]))}
            if labels and isinstance(labels[index], str):
                content = train.BytesList(value=[labels[index].encode()])
                features["label"] = train.Feature(bytes_list=content)
            elif labels:
                content = train.Int64List(value=[labels[index]])
                features["label"] = train.Feature(int64_list=content)
            example = train.Example(features=train.Features(feature=features))
            writer.write(example.SerializeToString())


def _write_array(path, images, labels):
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(image))) for image in images])
    np.savez(path, images=pixels, **({"labels": labels} if labels else {}))


_WRITERS = {
    "parquet": _write_parquet,
    "webdataset": _write_webdataset,
    "tfrecord": _write_tfrecord,
    "array": _write_array,
}
