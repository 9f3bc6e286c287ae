"""The interface of all sources of images."""

import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

from vqbeam.configs import DataConfig, VqbeamError
from vqbeam.vqvae.storage.labels import Labels

if TYPE_CHECKING:
    import numpy as np

    from vqbeam.vqvae.storage.records import Shard

DATASET = "images"


class RawImage(NamedTuple):
    """An image of a source, not yet in the shape of the run.

    Attributes:
        key: The image's name in the source.
        data: The encoded bytes, or the pixels, or the error from reading them.
        label: The class, −1 for none; or a 0 or 1 for each attribute.
    """

    key: str
    data: "bytes | np.ndarray | OSError"
    label: int | tuple[int, ...]


class Converted(NamedTuple):
    """An image of a source in the shape of the run.

    Attributes:
        key: The image's name in the source.
        label: See `RawImage`.
        value: What was made of its pixels; None if they cannot be decoded.
        problem: Why they cannot be decoded; None if they can.
        notes: See `decode_image`.
    """

    key: str
    label: int | tuple[int, ...]
    value: Any
    problem: str | None
    notes: list[str]


class Unit(NamedTuple):
    """The part of a source that becomes one shard.

    Attributes:
        shard: The shard to write.
        images: The images as the source identifies them, in the order of reading.
        labels: The labels of the source.
        total: Images in the complete source, for the progress bar.
    """

    shard: "Shard"
    images: Sequence[Any]
    labels: Labels
    total: int


def check_names(data: DataConfig, labels: Labels) -> None:
    """Raises a VqbeamError for class names that TFDS, which stores one per line, would change."""
    for name in labels.names if labels.kind == "classes" else ():
        if [name] != name.splitlines() or name != name.strip():
            raise VqbeamError(
                f"{data.source} has a class {name!r}; give it a name without line breaks, and "
                "without blanks at its ends"
            )


class Source:
    """The base class of all sources that `data.source` can name.

    Args:
        data: The section that names the source.

    Attributes:
        may_change: Whether an image that could not be decoded may have been repaired since.
        left_out: Number of items that `plan` has left out, by their description.
        lists_at_once: Whether `listing` works without a pass over the images.
    """

    may_change = False
    lists_at_once = True

    def __init__(self, data: DataConfig):
        self.data = data
        self.left_out: Counter[str] = Counter()

    def check(self) -> None:
        """Checks the source before anything is written or downloaded.

        Raises:
            VqbeamError: See `plan`, as far as this can be known before a download.
        """
        self.plan()

    def download(self, beam_args: Sequence[str]) -> None:
        """Downloads and prepares the source if needed, after printing a line about it.

        Args:
            beam_args: Beam's options, for sources that a pipeline prepares.

        Raises:
            VqbeamError: The source is not available.
        """

    def listing(self) -> tuple[dict[str, Sequence[Any]], Labels]:
        """Returns the images of "train" and "validation", as in `Unit.images`, and their labels.

        Raises:
            VqbeamError: The source does not exist, has no image, or lacks a split or feature.
        """
        raise NotImplementedError

    def read(self, unit: Unit) -> Iterator[RawImage]:
        """Yields the images of a unit, always in the same order."""
        raise NotImplementedError

    def convert(
        self, unit: Unit, function: Callable[["np.ndarray"], Any] = lambda image: image
    ) -> Iterator[Converted]:
        """Yields each image of `read`, decoded and passed to a function, in the same order.

        Large images are converted by several threads.

        Args:
            unit: The images.
            function: Takes an image as `decode` returns it.
        """
        from vqbeam.pipelines.sources.images import ImageError

        def converted(raw):
            notes: list[str] = []
            try:
                value = function(self.decode(raw, notes))
            except ImageError as error:
                return Converted(raw.key, raw.label, None, str(error), notes)
            return Converted(raw.key, raw.label, value, None, notes)

        return in_order(converted, self.read(unit), DECODERS, at_once=_is_small)

    def keys(self, split: str, images: Sequence[Any]) -> list[str]:
        """Returns the keys of images of a split, given as in `Unit.images`."""
        raise NotImplementedError

    def plan(self) -> list[Unit]:
        """Divides the source into units of `data.images_per_shard` images; raises as `listing`."""
        return self.units(*self.listing())

    def units(self, splits: Mapping[str, Sequence[Any]], labels: Labels) -> list[Unit]:
        """Divides all or some of the images of `listing` into units; raises as `check_names`."""
        check_names(self.data, labels)
        from vqbeam.vqvae.storage.records import Shard

        total = sum(len(images) for images in splits.values())
        units = []
        for split, images in splits.items():
            firsts = range(0, len(images), self.data.images_per_shard)
            for index, first in enumerate(firsts):
                shard = Shard(DATASET, split, index, len(firsts))
                images_of_shard = images[first : first + self.data.images_per_shard]
                units.append(Unit(shard, images_of_shard, labels, total))
        return units

    def decode(self, raw: RawImage, notes: list[str] | None = None) -> "np.ndarray":
        """Returns an image in the shape that the section requests, uint8 [H, W, C].

        Args:
            raw: The image.
            notes: See `decode_image`.

        Raises:
            ImageError: The image cannot be decoded.
        """
        from vqbeam.pipelines.sources.images import ImageError, decode_image

        if isinstance(raw.data, OSError):
            raise ImageError(f"the file cannot be read: {raw.data.strerror or raw.data}")
        return decode_image(raw.data, **self.data.form, notes=notes)


# Threads of a unit. An image may take hundreds of megabytes while it is decoded.
DECODERS = min(os.cpu_count() or 1, 16)
# In bytes. Smaller photographs take less time than to pass them to a thread
# (benchmarks/choices.py).
_SMALL = 2**13


def _is_small(raw: RawImage) -> bool:
    data = raw.data
    return isinstance(data, OSError) or memoryview(data).nbytes < _SMALL


def in_order(
    function: Callable[[Any], Any],
    items: Iterable[Any],
    threads: int,
    at_once: Callable[[Any], bool] = lambda item: False,
) -> Iterator[Any]:
    """Yields `function(item)` for each item, in the order of the items, computed by threads.

    Args:
        function: Must release Python's lock to gain from several threads, as Pillow and reads do.
        items: Taken as they are needed, at most as many ahead as there are threads.
        threads: Number of threads.
        at_once: Tells which items are computed by the caller's thread, as soon as they are taken.
    """
    coming: deque = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                if at_once(item):
                    result = Future()
                    result.set_result(function(item))
                else:
                    result = pool.submit(function, item)
                coming.append(result)
                if len(coming) > threads:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()
        finally:
            for unneeded in coming:
                unneeded.cancel()
