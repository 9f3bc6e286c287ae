"""Tar files in the layout of WebDataset."""

import itertools
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence

from etils import epath

from vqbeam.configs import VqbeamError
from vqbeam.pipelines.sources.files.base import FilesSource
from vqbeam.pipelines.sources.images import SUFFIXES
from vqbeam.pipelines.sources.listing import check_text, is_hidden


class WebdatasetSource(FilesSource):
    """`webdataset:PATH`: members KEY.jpg, .png and so on, each next to a KEY.cls or KEY.json.

    KEY.json holds the class under `data.label_key`; KEY.cls holds only the class. A class is an
    integer or a string. The row of an image is its KEY.
    """

    endings = (".tar", ".tar.gz", ".tgz")
    damage = (*FilesSource.damage, tarfile.TarError)

    def class_names(self, path: epath.Path) -> None:
        """Checks the members of the first image."""
        for _ in self.rows(path):
            return

    def rows(self, path: epath.Path) -> Iterator[tuple[str, int | str | None]]:
        """Yields key and label of each image; skips the images."""
        seen = set()
        for key, members in _samples(path, lambda _, ending: ending in (".json", ".cls")):
            if key in seen:
                raise VqbeamError(
                    f"{path} has members of {key!r} in two places; rename some, or pack the file "
                    "anew in the order of names, as tar --sort=name does"
                )
            seen.add(key)
            if _image(members) is not None:
                yield key, self._label(path, key, members)

    def images(self, path: epath.Path, rows: Sequence[str]) -> Iterator[bytes]:
        """Yields the images of some keys."""
        wanted = set(rows)
        for key, members in _samples(
            path, lambda key, ending: key in wanted and ending in SUFFIXES
        ):
            image = _image(members)
            if key in wanted and image is not None:
                yield image
                wanted.remove(key)
                if not wanted:
                    return

    def _label(self, path: epath.Path, key: str, members: dict[str, bytes]) -> int | str | None:
        wanted, label = self.data.label_key, None
        if wanted == "none":
            return None
        told = json.loads(members.get(".json", b"{}"))
        told = told if isinstance(told, dict) else {}
        if wanted in told:
            label = told[wanted]
        elif ".cls" in members:
            text = members[".cls"].decode().strip()
            label = int(text) if text.removeprefix("-").isdecimal() else text
        elif wanted != type(self.data).label_key:
            known = ", ".join(told) or "no JSON"
            raise VqbeamError(
                f"{key!r} in {path} has no {wanted!r}; set data.label_key to one of {known}, or to "
                "none"
            )
        if isinstance(label, bool) or not isinstance(label, int | str | None):
            raise VqbeamError(
                f"label of {key!r} in {path} is {label!r}, not an integer or string; set "
                "data.label_key to another, or to none"
            )
        return label


def _image(members: dict[str, bytes]) -> bytes | None:
    return next((members[ending] for ending in members if ending in SUFFIXES), None)


def _samples(
    path: epath.Path, is_read: Callable[[str, str], bool]
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yields each key with its members by ending; members of a key must be adjacent in the file.

    Members that are not to be read are empty. The file is read from front to back, since it may be
    compressed or in a bucket.
    """
    with path.open("rb") as file, tarfile.open(fileobj=file, tarinfo=_Member) as tar:
        contents = _contents(tar, is_read)
        for key, members in itertools.groupby(contents, key=lambda content: content[0]):
            yield key, {ending: content for _, ending, content in members}


def _contents(
    tar: tarfile.TarFile, is_read: Callable[[str, str], bool]
) -> Iterator[tuple[str, str, bytes]]:
    """Yields key, ending and content of each member."""
    while (member := tar.next()) is not None:
        tar.members.clear()  # otherwise it would grow with the length of the file
        name = member.name.removeprefix("./")
        if member.isfile() and not is_hidden(name):  # as the files that macOS adds
            key, ending = _parts(check_text(name))
            yield key, ending, tar.extractfile(member).read() if is_read(key, ending) else b""


def _parts(name: str) -> tuple[str, str]:
    """Returns the key and the ending of a member, split at the first dot of its file name."""
    folder, slash, file = name.rpartition("/")
    key, dot, ending = file.partition(".")
    return folder + slash + key, (dot + ending).lower()


class _Member(tarfile.TarInfo):
    """A member of a tar file. A damaged header raises an error instead of ending the file early."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        """Returns the member that a header describes; see `tarfile.TarInfo.frombuf`."""
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if buf.strip(b"\0"):  # only zeros mark the end of the file
                raise tarfile.ReadError(str(error)) from error
            raise
