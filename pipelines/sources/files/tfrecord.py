"""TFRecord files of `tf.train.Example`."""

import os
from collections.abc import Iterator, Sequence

import tensorflow as tf
from etils import epath
from google.protobuf.message import DecodeError

from vqbeam.configs import VqbeamError
from vqbeam.pipelines.sources.files.base import FilesSource
from vqbeam.vqvae.storage.records import UNTUNED


class TfrecordSource(FilesSource):
    """`tfrecord:PATH`: examples with a feature of encoded images, and possibly one of classes.

    A class is an integer or a string.
    """

    endings = (".tfrecord", ".tfrecords", ".tfrec")
    damage = (*FilesSource.damage, tf.errors.DataLossError, DecodeError)

    def is_named(self, file: str) -> bool:
        """Returns whether a file belongs to the source, by its name without `-00000-of-00001`."""
        place = file.rpartition("-of-")
        name = place[0].rpartition("-")[0] if place[2].isdecimal() else file
        return super().is_named(name)

    def class_names(self, path: epath.Path) -> None:
        """Checks the features of the first example."""
        for record in _records(path, first=0, count=1):
            features = tf.train.Example.FromString(record).features.feature
            label = self.label_feature(path, sorted(features))
            image = features[self.data.image_key].WhichOneof("kind")
            if image != "bytes_list":
                raise VqbeamError(
                    f"feature {self.data.image_key!r} of {path} is a {image}, not encoded images; "
                    "set data.image_key"
                )
            if label is not None:
                self._label(path, features)

    def rows(self, path: epath.Path) -> Iterator[tuple[int, int | str | None]]:
        """Yields number and label of each example; reads the whole file, as it has no index."""
        for row, record in enumerate(_records(path)):
            features = tf.train.Example.FromString(record).features.feature
            yield row, self._label(path, features)

    def images(self, path: epath.Path, rows: Sequence[int]) -> Iterator[bytes]:
        """Yields the encoded images of some examples."""
        first, wanted = rows[0], set(rows)
        for row, record in enumerate(_records(path, first, rows[-1] + 1 - first), first):
            if row in wanted:
                features = tf.train.Example.FromString(record).features.feature
                yield next(iter(features[self.data.image_key].bytes_list.value), b"")

    def _label(self, path: epath.Path, features) -> int | str | None:
        if self.data.label_key not in features:
            return None
        feature = features[self.data.label_key]
        kind = feature.WhichOneof("kind")
        values = getattr(feature, kind).value if kind else []
        if kind == "float_list" or len(values) > 1:
            raise VqbeamError(
                f"feature {self.data.label_key!r} of {path} is a {kind} of {len(values)}, not one "
                "integer or string; set data.label_key to another, or to none"
            )
        return next((v.decode() if kind == "bytes_list" else v for v in values), None)


def _records(path: epath.Path, first: int = 0, count: int = -1) -> Iterator[bytes]:
    dataset = tf.data.TFRecordDataset(os.fspath(path)).skip(first).take(count)
    return dataset.with_options(UNTUNED).as_numpy_iterator()
