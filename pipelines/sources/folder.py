"""A folder of image files as a dataset: its files, their classes and their splits."""

import csv
import dataclasses
import hashlib
import io
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from vqbeam.configs import VqbeamError
from vqbeam.pipelines.sources.images import SUFFIXES
from vqbeam.pipelines.sources.listing import (
    VALIDATION_NAMES,
    check_splits,
    list_files,
    split_by_hash,
)
from vqbeam.pipelines.sources.source import RawImage, Source, Unit, check_names, in_order
from vqbeam.vqvae.storage.files import is_local, read_regular, sizes
from vqbeam.vqvae.storage.labels import NO_CLASS, Labels


class FolderSource(Source):
    """`folder:PATH`: image files in a folder, whose subfolders are classes."""

    may_change = True

    def listing(self) -> tuple[dict[str, Sequence[Any]], Labels]:
        """Returns the images as `(key, label)`; see `Source.listing` and `list_folder`."""
        found = list_folder(
            self.data.path,
            validation_share=self.data.validation_share,
            max_images=self.data.max_images,
            named_splits=self.data.train_split != "none",
        )
        check_splits(self.data, found.splits)
        self.left_out = found.left_out
        return found.splits, found.labels

    def check(self) -> None:
        """Checks the folder, but does not compare its images; see `Source.check`."""
        _, labels = self.listing()
        check_names(self.data, labels)

    def plan(self) -> list[Unit]:
        """Divides the images into units, without held-out copies of training images."""
        splits, labels = self.listing()
        root = epath.Path(self.data.path).expanduser()
        copies = _copies(root, *([key for key, _ in splits[name]] for name in _SPLITS))
        splits["validation"] = [image for image in splits["validation"] if image[0] not in copies]
        self.left_out["held-out images that are copies of training images"] = len(copies)
        if copies and not splits["validation"]:
            raise VqbeamError(
                f"{self.data.source} has no image to hold out that is not trained on as well: all "
                "are copies; remove these, or add others"
            )
        return self.units(splits, labels)

    def keys(self, split: str, images: Sequence[tuple[str, Any]]) -> list[str]:
        """Returns the paths of images."""
        return [path for path, _ in images]

    def download(self, beam_args: Sequence[str]) -> None:
        """Prints which subfolders are splits; there is nothing to download."""
        if self.data.train_split != "none":
            tops = splits_at_top(image_keys(check_folder(self.data.path)))
            if tops:
                print(
                    f"{self.data.source}: trained on {tops['train']}/, held out "
                    f"{tops['validation']}/; the folders in them are classes (--data.train-split "
                    "none makes these the classes)"
                )

    def read(self, unit: Unit) -> Iterator[RawImage]:
        """Yields the bytes of the files; see `Source.read`."""
        root = epath.Path(self.data.path).expanduser()

        def fetch(image):
            key, label = image
            return RawImage(key, _bytes_of(root / key), label)

        if is_local(root):
            yield from map(fetch, unit.images)
        else:  # a bucket takes tens of milliseconds to answer
            yield from in_order(fetch, unit.images, threads=16)


_SPLITS = ("train", "validation")


def _copies(root: epath.Path, train: Sequence[str], held_out: Sequence[str]) -> set[str]:
    """Returns the held-out files with the same bytes as a training file.

    Only files of equal size are read.
    """
    bytes_of = [
        dict(zip(keys, sizes([root / k for k in keys]), strict=True)) for keys in (train, held_out)
    ]
    both = set(bytes_of[0].values()) & set(bytes_of[1].values())
    both -= {None, 0}
    known = {_content(root / key) for key, size in bytes_of[0].items() if size in both}
    found = {key for key, size in bytes_of[1].items() if size in both}
    return {key for key in found if _content(root / key) in known - {None}}


def _content(file: epath.Path) -> bytes | None:
    """Returns a hash of a file's bytes; None if it cannot be read."""
    data = _bytes_of(file)
    return hashlib.blake2b(data, digest_size=16).digest() if isinstance(data, bytes) else None


def _bytes_of(file: epath.Path) -> bytes | OSError:
    # One unreadable or missing file among a million must not stop the run.
    try:
        return read_regular(file)  # its size limit is above any image that `decode_image` accepts
    except OSError as error:
        return error


@dataclasses.dataclass(frozen=True)
class FolderListing:
    """The images of a folder, by split.

    Attributes:
        splits: The images of "train" and "validation", as `(key, label)`. A key is a path relative
            to the folder, with "/" between its parts. A label is an index into `labels.names`,
            `NO_CLASS` if there are no classes, or a 0 or 1 for each attribute.
        labels: The attributes in the folder's table, if it has one. Otherwise the sorted subfolders
            are the classes; there are none if the images lie in the folder itself.
        left_out: See `Source.left_out`.
    """

    splits: dict[str, list[tuple[str, int | tuple[int, ...]]]]
    labels: Labels
    left_out: Counter[str]


def list_folder(
    path: str, *, validation_share: float, max_images: int | None, named_splits: bool = True
) -> FolderListing:
    """Returns the images of a folder, whose subfolders, if any, are classes.

    A folder with a table `attributes.csv` has attributes (see `read_attributes`), and its
    subfolders are not classes.

    An image is a file with one of `SUFFIXES`, in upper or lower case (see `list_files`). A class
    may have subfolders of its own. `split_by_hash` divides the images into splits, unless the
    folder contains only `train` and `val` or `test` (see `splits_at_top`), each with the classes.

    Args:
        path: The folder, local or any path that `etils.epath` can read, such as gs://.
        validation_share: Share of the images to hold out, from 0 to below 1.
        max_images: Limit on the images of each split; None for no limit.
        named_splits: Whether subfolders can be splits; otherwise they are classes.

    Raises:
        VqbeamError: There is no such folder, it cannot be read, it has no image, it has images
            both at the top and in subfolders, a file name is not UTF-8, or the table of attributes
            is damaged or lacks an image.
    """
    folder, left_out = check_folder(path), Counter()
    keys = sorted(image_keys(folder, left_out))
    left_out[f"files that end in {os.path.splitext(FILE)[1]}"] -= (folder / FILE).exists()
    if not keys:
        raise VqbeamError(
            f"the folder {path!r} holds no image; a file counts whose name ends in one of "
            f"{' '.join(SUFFIXES)}"
        )
    tops = splits_at_top(keys) if named_splits else {}
    labels, of_keys = _labels(path, folder / FILE, keys, bool(tops))
    # In the order of a hash, any prefix of a split is a random sample of all classes. In the order
    # of paths, max_images or the first shards would cover only the first classes.
    order = split_by_hash(keys, 0.0)["train"] if tops else ()
    parts = {split: [i for i in order if keys[i].startswith(f"{tops[split]}/")] for split in tops}
    splits = {
        name: [(keys[i], of_keys[keys[i]]) for i in positions[:max_images]]
        for name, positions in (parts or split_by_hash(keys, validation_share)).items()
    }
    if tops:
        places = {f"{top}/" for top in tops.values()}
        left_out["images of other splits"] = sum(
            key[: key.index("/") + 1] not in places for key in keys
        )
    return FolderListing(splits=splits, labels=labels, left_out=left_out)


# Possible names of the folders of a split. For validation, the first one that exists is used.
_TRAIN = ("train", "training")
_HELD_OUT = (*VALIDATION_NAMES, "test")


def splits_at_top(keys: Sequence[str]) -> dict[str, str]:
    """Returns the top folders for "train" and "validation", or nothing if these are not splits.

    Top folders are splits if one is for training, one or more are for validation, and there are no
    other folders or images at the top. If there is a validation folder, `test` is left out.

    Args:
        keys: Paths of images.
    """
    tops = {key.partition("/")[0].lower(): key.partition("/")[0] for key in keys}
    train = [tops[name] for name in _TRAIN if name in tops]
    held_out = [tops[name] for name in _HELD_OUT if name in tops]
    if len(train) != 1 or not held_out or len(train + held_out) < len(tops):
        return {}
    return {"train": train[0], "validation": held_out[0]}


def check_folder(path: str) -> epath.Path:
    """Returns the folder at a path; raises a VqbeamError if there is none."""
    folder = epath.Path(path).expanduser()
    if not folder.is_dir():
        raise VqbeamError(f"there is no folder {path!r}; check the path in data.source")
    return folder


def _labels(
    path: str, table: epath.Path, keys: list[str], below_splits: bool
) -> tuple[Labels, dict[str, Any]]:
    """Returns the labels of the folder and the label of each key."""
    if table.exists():
        names, values = read_attributes(table)
        missing = next((key for key in keys if key not in values), None)
        if missing:
            raise VqbeamError(f"{table} has no row for {missing!r}; add one")
        return Labels(names, "attributes"), values
    places = {key: key.partition("/")[2] if below_splits else key for key in keys}
    names = _label_names(path, list(places.values()))
    numbers = {name: label for label, name in enumerate(names)}
    return Labels(names), {
        key: numbers.get(place.partition("/")[0], NO_CLASS) for key, place in places.items()
    }


def image_keys(folder: epath.Path, left_out: Counter | None = None) -> list[str]:
    """Returns the paths of the images in a folder, at any depth, relative to it.

    Args:
        folder: The folder.
        left_out: See `list_files`.

    Raises:
        VqbeamError: A folder cannot be read, or a file name is not UTF-8.
    """
    return list_files(folder, lambda name: name.lower().endswith(SUFFIXES), left_out)


def _label_names(path: str, keys: list[str]) -> tuple[str, ...]:
    """Returns the sorted top folders of the keys, or nothing if all images are at the top."""
    top = [key for key in keys if "/" not in key]
    if not top:
        return tuple(sorted({key.partition("/")[0] for key in keys}))
    if len(top) < len(keys):
        raise VqbeamError(
            f"the folder {path!r} has {len(top)} images at the top (such as {min(top)!r}) and "
            f"{len(keys) - len(top)} in subfolders; put all in subfolders, one for each class, "
            "or all at the top"
        )
    return ()


FILE = "attributes.csv"


def read_attributes(file: epath.Path) -> tuple[tuple[str, ...], dict[str, tuple[int, ...]]]:
    """Reads a table whose first column is the path of an image relative to the table.

    Columns are separated by commas, semicolons or tabs, whichever the first line has most of. Each
    further column is an attribute, with 1 for images that have it and 0 for the others. Rows of
    images that are not in the folder are ignored.

    Returns:
        The names of the attributes, and the values for each path.

    Raises:
        VqbeamError: The table has no attributes, an attribute has no name or a duplicate one, or a
            value is not 0 or 1.
    """
    try:
        text = read_regular(file).decode("utf-8-sig")  # spreadsheets write a byte-order mark
        heading = text.partition("\n")[0]
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=heading.count))
        names = [name.strip() for name in next(rows, [""])[1:]]
        lines = {row[0]: _values(file, rows.line_num, row, names) for row in rows if row}
    except (UnicodeDecodeError, csv.Error) as error:
        raise VqbeamError(f"{file} is not a CSV table in UTF-8 ({error}); save it anew") from error
    if not names:
        raise VqbeamError(f"{file} has no attribute; give each a column, behind that of the path")
    wrong = [n for n in names if [n] != n.splitlines() or "," in n or names.count(n) > 1]
    if wrong:
        raise VqbeamError(
            f"{file} has an attribute {wrong[0]!r}; give each a name of its own, without commas "
            "and line breaks"
        )
    return tuple(names), lines


def _values(file, line: int, row: list[str], names: list[str]) -> tuple[int, ...]:
    values = [value.strip() for value in row[1:]]
    if len(values) != len(names) or not set(values) <= {"0", "1"}:
        raise VqbeamError(
            f"{file}, line {line}: {','.join(values)!r}; give 0 or 1 for each of the "
            f"{len(names)} attributes"
        )
    return tuple(map(int, values))
