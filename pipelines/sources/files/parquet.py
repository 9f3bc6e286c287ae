"""Parquet files, with the columns that datasets of Hugging Face have."""

import contextlib
import itertools
import json
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from vqbeam.configs import VqbeamError
from vqbeam.pipelines.sources.files.base import FilesSource

# Of images more would take memory, since they may be large.
_LABELS_AT_ONCE, _IMAGES_AT_ONCE = 4096, 16
# Arrow would hold a whole row group, which may be the whole file, without this.
_BUFFER = 2**18


class ParquetSource(FilesSource):
    """`parquet:PATH`: rows with a column of encoded images, and possibly one of classes.

    A value of the image column is the bytes, or a struct with a field `bytes`. A class is an
    integer or a string.
    """

    endings = (".parquet",)
    damage = (*FilesSource.damage, pa.ArrowException)

    def class_names(self, path: epath.Path) -> Sequence[str] | None:
        """Checks the columns; returns the names in the metadata of Hugging Face."""
        with _opened(path) as file:
            schema = file.schema_arrow
        label = self.label_feature(path, schema.names)
        kind = schema.field(self.data.image_key).type
        if not _is_binary(_field_type(kind, "bytes") or kind):
            raise VqbeamError(
                f"column {self.data.image_key!r} of {path} is of type {kind}, which holds no "
                "encoded images; set data.image_key"
            )
        if label is None:
            return None
        kind = schema.field(label).type
        values = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_integer(values) or _is_string(values)):
            raise VqbeamError(
                f"column {label!r} of {path} is of type {kind}, not integer or string; set "
                "data.label_key to another, or to none"
            )
        told = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        return told.get("info", {}).get("features", {}).get(label, {}).get("names")

    def rows(self, path: epath.Path) -> Iterator[tuple[int, int | str | None]]:
        """Yields number and label of each row; reads the column of labels only."""
        with _opened(path) as file:
            label = self.label_feature(path, file.schema_arrow.names)
            if label is None:
                yield from ((row, None) for row in range(file.metadata.num_rows))
                return
            batches = file.iter_batches(_LABELS_AT_ONCE, columns=[label], use_threads=False)
            columns = (batch.column(0).to_pylist() for batch in batches)
            yield from enumerate(itertools.chain.from_iterable(columns))

    def images(self, path: epath.Path, rows: Sequence[int]) -> Iterator[bytes]:
        """Yields the encoded images of some rows, from the row groups that hold them."""
        with _opened(path) as file:
            column = self.data.image_key
            if _field_type(file.schema_arrow.field(column).type, "bytes"):
                column += ".bytes"
            wanted, first = set(rows), 0
            for group in range(file.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                if not wanted.isdisjoint(range(first, first + count)):
                    yield from _of_group(file, group, column, first, wanted)
                first += count


def _of_group(
    file: pq.ParquetFile, group: int, column: str, first: int, wanted: set[int]
) -> Iterator[bytes]:
    """Yields the wanted images of a row group, whose first row has the number `first`."""
    last = max(wanted)
    batches = file.iter_batches(
        _IMAGES_AT_ONCE, row_groups=[group], columns=[column], use_threads=False
    )
    for batch in batches:
        for place, row in enumerate(range(first, first + len(batch))):
            if row in wanted:
                value = batch.column(0)[place].as_py()
                yield (value.get("bytes") if isinstance(value, dict) else value) or b""
        first += len(batch)
        if first > last:
            return


@contextlib.contextmanager
def _opened(path: epath.Path) -> Iterator[pq.ParquetFile]:
    with path.open("rb") as file:
        if not hasattr(file, "closed"):  # TensorFlow's files in a bucket, which Arrow asks
            file.closed = False
        yield pq.ParquetFile(file, buffer_size=_BUFFER, pre_buffer=False)


def _field_type(kind: pa.DataType, name: str) -> pa.DataType | None:
    """Returns the type of a field of a struct; None if there is no such field."""
    index = kind.get_field_index(name) if pa.types.is_struct(kind) else -1
    return kind.field(index).type if index >= 0 else None


def _is_binary(kind: pa.DataType) -> bool:
    types = pa.types
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


def _is_string(kind: pa.DataType) -> bool:
    types = pa.types
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
