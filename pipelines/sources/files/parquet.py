"""Parquet files with the columns of Hugging Face datasets, local or on the Hugging Face hub."""

import contextlib
import itertools
import json
from collections.abc import Iterator, Sequence

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from vqbeam.configs import VqbeamError, first_line
from vqbeam.pipelines.sources.files.base import FilesSource

_BYTES = (pa.binary(), pa.large_binary(), pa.binary_view())
_TEXTS = (pa.string(), pa.large_string(), pa.string_view())
# Fewer images than labels, since images may be large.
_LABELS_AT_ONCE, _IMAGES_AT_ONCE = 4096, 16
# Without this, Arrow would hold a whole row group in memory, which may be the whole file.
_BUFFER = 2**18


class ParquetSource(FilesSource):
    """`parquet:PATH`: rows with a column of encoded images, and possibly one of classes.

    A value of the image column is the bytes, or a struct with a field `bytes`. A class is an
    integer or a string.
    """

    endings = (".parquet",)
    damage = (*FilesSource.damage, pa.ArrowException)

    def class_names(self, path: epath.Path) -> Sequence[str] | None:
        """Returns the class names in Hugging Face's metadata, after a check of the columns."""
        with _opened(path) as file:
            schema = file.schema_arrow
        label = self.label_feature(path, schema.names)
        kind = schema.field(self.data.image_key).type
        fields = {field.name: field.type for field in kind} if pa.types.is_struct(kind) else {}
        if fields.get("bytes", kind) not in _BYTES:
            raise VqbeamError(
                f"column {self.data.image_key!r} of {path} is of type {kind}, which holds no "
                "encoded images; set data.image_key"
            )
        if label is None:
            return None
        kind = schema.field(label).type
        values = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_integer(values) or values in _TEXTS):
            raise VqbeamError(
                f"column {label!r} of {path} is of type {kind}, not integer or string; set "
                "data.label_key to another, or to none"
            )
        told = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        return told.get("info", {}).get("features", {}).get(label, {}).get("names")

    def rows(self, path: epath.Path) -> Iterator[tuple[int, int | str | None]]:
        """Yields number and label of each row; reads only the column of labels."""
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
            wanted, first = set(rows), 0
            for group in range(file.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                if not wanted.isdisjoint(range(first, first + count)):
                    yield from _of_group(file, group, self.data.image_key, first, wanted)
                first += count


class HubSource(ParquetSource):
    """`hf:NAME[@REVISION]`: the Parquet files of a dataset on the Hugging Face hub."""

    @property
    def path(self) -> str:
        """The folder of the downloaded files."""
        return self._snapshot(local_files_only=True)

    def check(self) -> None:
        """Checks the files, or only that there are some if they are not downloaded yet."""
        if self._is_here():
            super().check()
        elif not self._snapshot(dry_run=True):
            raise VqbeamError(
                f"{self.data.source} has no Parquet files; the hub may have made some, which have "
                "the revision refs/convert/parquet"
            )

    def download(self, beam_args: Sequence[str]) -> None:
        """Downloads the files into the cache of Hugging Face, if needed."""
        if not self._is_here():
            place = huggingface_hub.constants.HF_HUB_CACHE
            print(f"{self.data.source} is not in {place} yet: it is downloaded", flush=True)
        # Also if there are files: another program may have downloaded some of them.
        self._snapshot()

    def _is_here(self) -> bool:
        try:
            return bool(self.path)
        except VqbeamError:
            return False

    def _snapshot(self, **options):
        name, _, revision = self.data.source.removeprefix("hf:").partition("@")
        chosen = {"revision": revision or None, "allow_patterns": "*.parquet"} | options
        try:
            return huggingface_hub.snapshot_download(name, repo_type="dataset", **chosen)
        except Exception as error:  # of many types
            reason = first_line(error.__cause__ or error)
            raise VqbeamError(
                f"{self.data.source} cannot be downloaded ({reason}); check the name and the "
                "connection, or download its Parquet files elsewhere and give their folder by "
                "--data.source parquet:PATH"
            ) from error


def _of_group(
    file: pq.ParquetFile, group: int, column: str, first: int, wanted: set[int]
) -> Iterator[bytes]:
    """Yields the wanted images of a row group whose first row has the number `first`."""
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
        if not hasattr(file, "closed"):  # Arrow needs it, and TensorFlow's bucket files lack it
            file.closed = False
        yield pq.ParquetFile(file, buffer_size=_BUFFER, pre_buffer=False)
