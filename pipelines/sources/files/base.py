"""The base class of sources whose files hold many images: splits, classes and order."""

import contextlib
import itertools
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from vqbeam.configs import DataConfig, VqbeamError, first_line
from vqbeam.pipelines.sources.listing import (
    check_splits,
    files_at,
    root_of,
    split_by_hash,
    split_by_name,
)
from vqbeam.pipelines.sources.source import RawImage, Source, Unit
from vqbeam.vqvae.storage.files import check_regular, named_if_slow
from vqbeam.vqvae.storage.labels import NO_CLASS, Labels

# If there are more, they are ids or captions of images rather than classes.
_MAX_CLASSES = 100_000


class FilesSource(Source):
    """`KIND:PATH`: a file, the files in a folder, or those that a glob pattern matches.

    In a unit, an image is `(file, row, label)`: the file's path relative to the folder, the image's
    number or name in the file, and the class.

    Attributes:
        endings: Endings of the names of such files.
        damage: Exceptions that reading a damaged file may raise, besides OSError.
    """

    may_change = True
    lists_at_once = False
    endings: tuple[str, ...] = ()
    damage: tuple[type[Exception], ...] = (ValueError, EOFError, zlib.error)

    @property
    def path(self) -> str:
        """The path of the files."""
        return self.data.path

    def class_names(self, path: epath.Path) -> Sequence[str] | None:
        """Returns the class names that a file defines, if any, after a quick check of the file.

        Raises:
            VqbeamError: The file has no images or labels of the expected names and types.
        """
        raise NotImplementedError

    def rows(self, path: epath.Path) -> Iterator[tuple[int | str, int | str | None]]:
        """Yields row and label of each image of a file; avoids reading the images if possible."""
        raise NotImplementedError

    def images(self, path: epath.Path, rows: Sequence[Any]) -> Iterator[bytes | np.ndarray]:
        """Yields the images of some rows of a file, in the file's order; b"" if one is missing."""
        raise NotImplementedError

    def is_named(self, file: str) -> bool:
        """Returns whether a file in a folder belongs to the source, by its name."""
        return file.lower().endswith(self.endings)

    def keys(self, split: str, images: Sequence[tuple[str, int | str, Any]]) -> list[str]:
        """Returns the keys `FILE/ROW` of images."""
        return [f"{file}/{row}" for file, row, _ in images]

    def check(self) -> None:
        """Checks the names of the files and the content of the first one; see `Source.check`."""
        root, splits = self._files()
        path = root / next(file for files in splits.values() for file in files)
        with self._reading(path), named_if_slow(path):
            self.class_names(path)

    def listing(self) -> tuple[dict[str, Sequence[Any]], Labels]:
        """Returns the images in the order of their files; see `Source.listing`.

        If they were in the order of a hash, as for a folder of images, each shard would take a pass
        over all files.
        """
        root, files_of = self._files()
        known, images = None, {split: [] for split in files_of}
        for split, files in files_of.items():
            for file in files:
                with self._reading(root / file), named_if_slow(root / file):
                    known = self.class_names(root / file) or known
                    images[split] += [(file, *row) for row in self.rows(root / file)]
        found = {label for some in images.values() for _, _, label in some}
        names, numbers = _classes(self.data, known, found - {None})
        splits = self._divide(images)
        check_splits(self.data, splits)
        for some in splits.values():
            some[:] = [(file, row, numbers.get(label, NO_CLASS)) for file, row, label in some]
        return splits, Labels(names)

    def read(self, unit: Unit) -> Iterator[RawImage]:
        """Yields the images of a unit, in one pass over each of their files; see `Source.read`."""
        root = root_of(self.path)
        for file, of_file in itertools.groupby(unit.images, key=lambda image: image[0]):
            images = list(of_file)
            with self._reading(root / file):
                found = self.images(root / file, [row for _, row, _ in images])
                keys = self.keys(unit.shard.split, images)
                for key, image in zip(keys, images, strict=True):
                    with named_if_slow(root / file):
                        data = next(found, None)
                    if data is None:
                        raise VqbeamError(
                            f"{root / file} has no image {image[1]} any more; put back the file "
                            "as it was, or start in a new folder"
                        )
                    yield RawImage(key, data, image[2])

    def label_feature(self, path: epath.Path, features: Sequence[str]) -> str | None:
        """Returns the name of the feature that holds the class; None if none does.

        Raises:
            VqbeamError: A file has no feature `data.image_key`, or not the requested
                `data.label_key`.
        """
        for flag in ("image_key", "label_key"):
            wanted = getattr(self.data, flag)
            # The usual name of the class may be missing: many datasets have no classes.
            if wanted not in (*features, *(("label", "none") if flag == "label_key" else ())):
                others = ", ".join(features) + (" or none" if flag == "label_key" else "")
                raise VqbeamError(f"{path} has no {wanted!r}; set data.{flag} to one of {others}")
        return self.data.label_key if self.data.label_key in features else None

    def _files(self) -> tuple[epath.Path, dict[str, list[str]]]:
        """Returns a folder and the files of each split, or all under "all" without splits."""
        self.left_out.clear()
        root, files = files_at(self.path, self.is_named, self.left_out)
        if not files:
            raise VqbeamError(
                f"the folder {self.path!r} holds no file for {self.data.source.partition(':')[0]}; "
                f"a file counts whose name ends in {' or '.join(self.endings)}"
            )
        return root, split_by_name(files, self.data, self.left_out)

    def _divide(self, images: Mapping[str, list]) -> dict[str, list]:
        """Returns the images to train on and to hold out, at most `max_images` of each."""
        splits = {}
        for split, some in images.items():
            share = self.data.validation_share if split == "all" else 0
            parts = split_by_hash(self.keys(split, some), share)
            for part, positions in parts.items() if split == "all" else [(split, parts["train"])]:
                chosen = np.sort(positions[: self.data.max_images])
                splits[part] = [some[position] for position in chosen]
        return splits

    @contextlib.contextmanager
    def _reading(self, path: epath.Path) -> Iterator[None]:
        try:
            check_regular(path)
            yield
        except (OSError, *self.damage) as error:
            if getattr(error, "errno", None) is not None:  # raised by the operating system
                raise
            raise VqbeamError(
                f"{path} cannot be read ({first_line(error)}): it is damaged or of another kind; "
                "replace it"
            ) from error


def _classes(
    data: DataConfig, known: Sequence[str] | None, labels: set[int | str]
) -> tuple[tuple[str, ...], dict[int | str, int]]:
    """Returns the names of the classes, and the class number of each label that has one.

    Args:
        data: The section that names the source.
        known: Names for the numbers of classes, if the source itself has them.
        labels: The labels in the data. Strings are names of classes, which are sorted; negative
            numbers mean no class.

    Raises:
        VqbeamError: A number has no name, or there are too many classes.
    """
    if any(isinstance(label, str) for label in labels):
        names = sorted(set(map(str, labels)))
        numbers = {name: number for number, name in enumerate(names)}
        numbers = {label: numbers[str(label)] for label in labels}
    else:
        numbers = {label: label for label in labels if label >= 0}
        count = max(numbers, default=-1) + 1
        if known and count > len(known):
            raise VqbeamError(
                f"{data.source} has a label {count - 1}, and names for {len(known)} classes; set "
                "data.label_key to another, or to none"
            )
        names = known or range(count)
    if len(names) > _MAX_CLASSES:
        raise VqbeamError(
            f"{data.label_key!r} of {data.source} would have {len(names):,} classes; set "
            "data.label_key to another, or to none"
        )
    return tuple(map(str, names)), numbers
