"""Arrays of pixels in NumPy's `.npz` files."""

import contextlib
import math
import zipfile
from collections.abc import Iterator, Sequence
from typing import IO

import numpy as np
from etils import epath

from vqbeam.configs import VqbeamError
from vqbeam.pipelines.sources.files.base import FilesSource


class ArraySource(FilesSource):
    """`array:FILE.npz`: images uint8 [N, H, W, C] or [N, H, W], and possibly labels [N].

    `data.image_key` and `data.label_key` name the arrays, which may also have an "s" at the end. A
    label is an integer or a string.
    """

    endings = (".npz",)
    damage = (*FilesSource.damage, zipfile.BadZipFile)

    def class_names(self, path: epath.Path) -> None:
        """Checks type and shape of both arrays."""
        with _opened(path) as archive:
            arrays = [name.removesuffix(".npy") for name in archive.namelist()]
            plurals = {f"{key}s": key for key in (self.data.image_key, self.data.label_key)}
            label = self.label_feature(path, [plurals.get(name, name) for name in arrays])
            shape, is_transposed, kind = _header(archive, self.data.image_key)
            is_right = kind == np.uint8 and len(shape) in (3, 4) and 1 <= (*shape, 1)[3] <= 4
            if not is_right or is_transposed:
                raise VqbeamError(
                    f"array {self.data.image_key!r} of {path} is {kind} {list(shape)}"
                    f"{' in Fortran order' * is_transposed}; give uint8 [N, H, W, C] with 1 to 4 "
                    "channels, or [N, H, W], in C order"
                )
            if label:
                of_labels, _, kind = _header(archive, label)
                if math.prod(of_labels) != shape[0] or kind.kind not in "iuUS":
                    raise VqbeamError(
                        f"array {label!r} of {path} is {kind} {list(of_labels)}; give "
                        f"{shape[0]} integers or strings, or set data.label_key to none"
                    )

    def rows(self, path: epath.Path) -> Iterator[tuple[int, int | str | None]]:
        """Yields number and label of each image; reads only the labels."""
        with _opened(path) as archive:
            (count, *_), _, _ = _header(archive, self.data.image_key)
            labels = [None] * count
            if member := _member(archive, self.data.label_key):
                with archive.open(member) as stream:
                    array = np.lib.format.read_array(stream)
                labels = (array.astype(str) if array.dtype.kind == "S" else array).ravel().tolist()
        yield from enumerate(labels)

    def images(self, path: epath.Path, rows: Sequence[int]) -> Iterator[np.ndarray]:
        """Yields the pixels of some images, one at a time."""
        with _opened(path) as archive:
            with archive.open(_member(archive, self.data.image_key)) as stream:
                shape, _, _ = _read_header(stream)
                first, size = stream.tell(), math.prod(shape[1:])
                for row in rows:
                    stream.seek(first + row * size)
                    yield np.frombuffer(stream.read(size), np.uint8).reshape(shape[1:])


@contextlib.contextmanager
def _opened(path: epath.Path) -> Iterator[zipfile.ZipFile]:
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        yield archive


def _member(archive: zipfile.ZipFile, key: str) -> str | None:
    names = archive.namelist()
    return next((name for name in (f"{key}.npy", f"{key}s.npy") if name in names), None)


def _header(archive: zipfile.ZipFile, key: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    with archive.open(_member(archive, key)) as stream:
        return _read_header(stream)


def _read_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Returns the shape, whether the array is in Fortran order, and the dtype."""
    is_first = np.lib.format.read_magic(stream) == (1, 0)
    read = np.lib.format.read_array_header_1_0 if is_first else np.lib.format.read_array_header_2_0
    return read(stream)
