"""Lists the files of a folder, and divides images into those to train on and those held out."""

import glob
import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from vqbeam.configs import DataConfig, VqbeamError
from vqbeam.vqvae.storage.files import is_local, named_if_slow

# Contents by which the folder of a run is recognized.
_RUN = {"config.json", "images"}
# Possible names of the split "validation" in the names of folders and files.
VALIDATION_NAMES = ("validation", "valid", "val", "dev")


def list_files(
    folder: epath.Path, is_wanted: Callable[[str], bool], left_out: Counter | None = None
) -> list[str]:
    """Returns the paths of the wanted files in a folder, at any depth, relative to it.

    Files and folders whose names start with "." are ignored, links to folders are not followed, and
    the folders of vqbeam's runs are skipped.

    Args:
        folder: The folder, local or any path that `etils.epath` can read, such as gs://.
        is_wanted: Function from a path to whether the file is wanted.
        left_out: Counter to which the files and folders left out are added, by their description.

    Raises:
        VqbeamError: A folder cannot be read, or a file name is not UTF-8.
    """
    found, left_out = [], Counter() if left_out is None else left_out
    inside = _in_folder(folder, left_out) if is_local(folder) else _in_bucket(folder, left_out)
    with named_if_slow(folder):
        inside = list(inside)
    for place, names in inside:
        for name in names:
            path = f"{place}{name}"
            if is_hidden(path):
                continue
            if is_wanted(path):
                found.append(check_text(path))
            else:
                ending = os.path.splitext(name)[1].lower()[:10]
                ending = ending.encode(errors="backslashreplace").decode()
                left_out[f"files that end in {ending}" if ending else "files without ending"] += 1
    return found


def _in_folder(folder: epath.Path, left_out: Counter) -> Iterator[tuple[str, list[str]]]:
    """Yields the relative path of each folder, with a slash at the end, and its files."""
    for directory, folders, names in os.walk(folder, onerror=_refuse):
        place = os.path.relpath(directory, folder)
        if place != "." and _RUN <= {*folders, *names}:
            left_out["folders of runs"] += 1
            folders.clear()
            continue
        links = [name for name in folders if os.path.islink(os.path.join(directory, name))]
        left_out["linked folders"] += len(links)
        yield "" if place == "." else f"{place}/", names


def _in_bucket(
    folder: epath.Path, left_out: Counter, place: str = ""
) -> Iterator[tuple[str, list[str]]]:
    """Yields the same for a bucket, where epath would make one request per file."""
    import tensorflow as tf

    names = tf.io.gfile.listdir(f"{folder}/{place}")
    if place and _RUN <= {name.rstrip("/") for name in names}:
        left_out["folders of runs"] += 1
        return
    yield place, [name for name in names if not name.endswith("/")]
    for name in names:
        if name.endswith("/"):
            yield from _in_bucket(folder, left_out, f"{place}{name}")


def is_hidden(path: str) -> bool:
    """Returns whether a name in a relative path starts with "."."""
    return any(name.startswith(".") for name in path.split("/"))


def check_text(path: str) -> str:
    """Returns a path; raises a VqbeamError if it is not valid UTF-8."""
    try:
        path.encode()
    except UnicodeEncodeError:
        raise VqbeamError(f"the file name {path!r} is not valid UTF-8; rename it") from None
    return path


def _refuse(error: OSError) -> None:
    # Silently omitting a folder would change the dataset.
    raise VqbeamError(f"a folder of images cannot be read ({error}); fix its permissions")


def split_by_name(
    files: Sequence[str], data: DataConfig, left_out: Counter
) -> dict[str, list[str]]:
    """Returns the files of "train" and "validation", or all under "all" if names show no splits.

    A file belongs to a split if its name, or else the name of one of its folders (nearest first),
    begins with the name of the split. Files of other splits are left out.

    Args:
        files: Relative paths.
        data: The section with `train_split`, which is "none" to ignore names, and
            `validation_split`: both "validation" and "test" mean the first of these two that has
            files.
        left_out: Counter to which the files left out are added.

    Raises:
        VqbeamError: A split of any other name has no files.
    """
    if data.train_split == "none":
        return {"all": list(files)}
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
        splits = {"train": train, "validation": held_out}
    else:
        splits = {"all": named[data.train_split] or list(files)}
    left_out["files of other splits"] += len(files) - sum(map(len, splits.values()))
    return splits


def _split_of(file: str, splits: Sequence[str]) -> str | None:
    """Returns the split that the file's name begins with, or else that of the nearest folder."""
    for part in reversed(file.split("/")):
        for split in splits:
            names = "|".join(VALIDATION_NAMES) if split == "validation" else re.escape(split)
            if re.match(rf"(?:{names})(?:$|[-_.\d])", part, re.IGNORECASE):
                return split
    return None


def split_by_hash(keys: Iterable[str], validation_share: float) -> dict[str, np.ndarray]:
    """Returns the positions of the keys of "train" and "validation", in the order of a hash.

    The split of an image depends only on its key, so it does not change when others are added. The
    only exception is a split that would be empty although there are two or more keys and
    `validation_share` is above 0: it gets the image whose hash is nearest to it.

    Args:
        keys: The keys of all images.
        validation_share: Share of the images to hold out, in [0, 1).
    """
    hashes = np.fromiter(map(_hash, keys), np.float64)
    ordered = np.argsort(hashes, kind="stable")
    count = int(np.sum(hashes < validation_share))
    if validation_share > 0:
        count = min(max(count, 1), len(hashes) - 1)
    return {"train": ordered[count:], "validation": ordered[:count]}


def _hash(key: str) -> float:
    """Returns a number in [0, 1) that depends only on the key, on every machine."""
    digest = hashlib.blake2b(key.encode(), digest_size=6).digest()
    return int.from_bytes(digest) / 2**48


def check_splits(data: DataConfig, splits: Mapping[str, Sequence[Any]]) -> None:
    """Raises a VqbeamError if a split that must have images has none."""
    if not splits["train"]:
        raise VqbeamError(f"{data.source} has no image to train on")
    if not splits["validation"] and data.validation_share:
        raise VqbeamError(f"{data.source} has no image to hold out; it takes two images or more")


def files_at(
    path: str, is_wanted: Callable[[str], bool], left_out: Counter
) -> tuple[epath.Path, list[str]]:
    """Returns a folder and the sorted paths of files relative to it.

    Args:
        path: A folder, of which the wanted files are returned; or a file; or a glob pattern.
        is_wanted: See `list_files`.
        left_out: See `list_files`.

    Raises:
        VqbeamError: There is no such file, or see `list_files`.
    """
    root = root_of(path)
    if root == epath.Path(path).expanduser():
        return root, sorted(list_files(root, is_wanted, left_out))
    place = os.fspath(epath.Path(path).expanduser())
    if epath.Path(place).exists():
        return root, [check_text(epath.Path(place).name)]
    if is_local(root):
        found = [name for name in glob.glob(place, recursive=True) if os.path.isfile(name)]
    else:
        import tensorflow as tf

        found = tf.io.gfile.glob(place)
    if not found:
        raise VqbeamError(
            f"there is no file or folder {path!r}, and as a pattern it matches no file; check the "
            "path in data.source"
        )
    inside = (name.removeprefix(os.fspath(root)).lstrip("/") for name in found)
    return root, sorted(map(check_text, inside))


def root_of(path: str) -> epath.Path:
    """Returns the folder that the paths of `files_at` are relative to."""
    place = epath.Path(path).expanduser()
    if place.is_dir():
        return place
    if not place.exists():
        while glob.has_magic(os.fspath(place.parent)):
            place = place.parent
    return place.parent
