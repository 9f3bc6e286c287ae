"""What names tell: those of files about splits, and those of labels about classes."""

import re
from collections import defaultdict
from collections.abc import Sequence

from vqbeam.configs import DataConfig, VqbeamError

# What the files of a split may begin with, where it is not only the name of the split.
_SPLIT_NAMES = {"validation": "validation|valid|val|dev"}
# More are no classes, but numbers or captions of the images.
_MAX_CLASSES = 100_000


def split_by_name(files: Sequence[str], data: DataConfig) -> dict[str, list[str]]:
    """Returns the files to train on and those held out; all under "all" if names do not tell.

    A file belongs to a split if its name begins with that of the split, or else that of a folder
    does, the nearest first. Files of other splits are left out.

    Args:
        files: Relative paths.
        data: The section whose `train_split` is taken, and `validation_split`, for which any of
            "validation" and "test" stands for the first of the two that has files.

    Raises:
        VqbeamError: A split of any other name has no files.
    """
    named, usual = defaultdict(list), ("train", "validation", "test")
    for file in files:
        named[_split_of(file, (data.train_split, data.validation_split, *usual))].append(file)
    for flag in ("train_split", "validation_split"):
        wanted = getattr(data, flag)
        if wanted not in (*usual, *named):
            raise VqbeamError(
                f"{data.source} has no files of a split {wanted!r}; set data.{flag} to what the "
                "names of some begin with"
            )
    train = named[data.train_split] or named[None]
    asked = data.validation_split
    choice = ("validation", "test") if asked in usual else (asked,)
    held_out = next((named[s] for s in choice if s != data.train_split and named[s]), None)
    if train and held_out:
        return {"train": train, "validation": held_out}
    return {"all": named[data.train_split] or list(files)}


def _split_of(file: str, splits: Sequence[str]) -> str | None:
    """Returns the split that the file's name begins with, or else that of the nearest folder."""
    for part in reversed(file.split("/")):
        for split in splits:
            names = _SPLIT_NAMES.get(split, re.escape(split))
            if re.match(rf"(?:{names})(?:$|[-_.\d])", part, re.IGNORECASE):
                return split
    return None


def classes(
    data: DataConfig, known: Sequence[str] | None, labels: set[int | str]
) -> tuple[tuple[str, ...], dict[int | str, int]]:
    """Returns the names of the classes, and the number of each label that has one.

    Args:
        data: The section that names the source.
        known: The names that the source itself gives to the numbers of classes.
        labels: The labels that are found. Strings are names of classes, and are sorted; negative
            numbers stand for no class.

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
