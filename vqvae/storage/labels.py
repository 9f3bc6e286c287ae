"""Labels of a dataset: classes or attributes."""

import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from vqbeam.configs import VqbeamError

# The label of an image without a class.
NO_CLASS = -1


class Labels(NamedTuple):
    """The names and the kind of a dataset's labels.

    Attributes:
        names: Names of the classes or attributes; empty if the dataset has no labels.
        kind: "classes" (exactly one per image) or "attributes" (any number per image).
    """

    names: tuple[str, ...] = ()
    kind: str = "classes"

    @classmethod
    def of(cls, manifest: dict[str, Any]) -> "Labels":
        """Returns the labels of a stage's images, from its manifest."""
        # Manifests written before attributes were supported have no "label_kind".
        return cls(tuple(manifest["label_names"]), manifest.get("label_kind", "classes"))


# A label as records store it: the number of a class, or a 0 or 1 per attribute; −1 means none.
Label = int | tuple[int, ...]


def labels_for(texts: Sequence[Any] | None, labels: Labels, num: int, first: int = 0) -> np.ndarray:
    """Returns the label of each of `num` images, which take the requested labels in turn.

    Args:
        texts: The requested labels, see `parse_label`; None for all classes, or for each attribute
            alone.
        labels: The labels of the run.
        num: Number of images.
        first: Index of the first image.

    Returns:
        Classes as int32 [num], or attributes as int32 [num, A].

    Raises:
        VqbeamError: A label is not known.
    """
    if texts is None:
        texts = labels.names or [None]
    chosen = np.asarray([parse_label(text, labels) for text in texts], np.int32)
    return chosen[(first + np.arange(num)) % len(chosen)]


def parse_label(text: Any, labels: Labels) -> Label:
    """Returns the label that a user asks for.

    Args:
        text: The name or number of a class, or names or numbers of attributes, joined by commas;
            None for no label. A value that is not a string is a label as records store it.
        labels: The labels of the run.

    Raises:
        VqbeamError: The label is unknown, or the run has no labels.
    """
    if text is not None and not isinstance(text, str):
        return _checked(text, labels)
    if labels.kind == "classes":
        return -1 if text is None else label_number(text, labels.names)
    if text is None:
        return (-1,) * len(labels.names)
    # In TFDS, the name of an attribute may contain a comma.
    parts = [text] if text in labels.names else text.split(",")
    on = {label_number(part.strip(), labels.names) for part in parts}
    return tuple(int(number in on) for number in range(len(labels.names)))


def _checked(label: Any, labels: Labels) -> Label:
    classes, row = labels.kind == "classes", np.asarray(label)
    shape, largest = ((), len(labels.names) - 1) if classes else ((len(labels.names),), 1)
    fits = row.dtype.kind in "iu" and row.shape == shape
    if not fits or row.min() < -1 or row.max() > largest:
        numbers = f"a number from 0 to {largest}" if classes else f"{shape[0]} numbers, 0 or 1"
        wanted = f"give a name or {numbers}" if labels.names else "it has no classes"
        raise VqbeamError(f"the run has no label {label!r}; {wanted}")
    return int(row) if classes else tuple(row.tolist())


def label_name(label: Label, labels: Labels) -> str:
    """Returns the name of a class, or the names of attributes joined by commas; "" for none."""
    if labels.kind == "classes":
        return labels.names[label] if label >= 0 else ""
    return ",".join(name for name, on in zip(labels.names, label, strict=True) if on > 0)


def _folded(name: str) -> str:
    """Returns a name in lower case and in one Unicode form, which differs among file systems."""
    return unicodedata.normalize("NFC", name).lower()


def label_number(label: str, names: Sequence[str]) -> int:
    """Returns the number of the class or attribute that `label` gives by name or by number.

    Raises:
        VqbeamError: There is no such class or attribute, or the run has none.
    """
    if not names:
        raise VqbeamError(f"label {label!r} was asked for, but the run has no classes")
    if label in names:
        return names.index(label)
    folded = list(map(_folded, names))
    if _folded(label) in folded:
        return folded.index(_folded(label))
    if label.isdecimal() and int(label) < len(names):
        return int(label)
    shown = ", ".join(names[:30]) + (", …" if len(names) > 30 else "")
    raise VqbeamError(
        f"the run has no label {label!r}; it has {shown}, or by number 0 to {len(names) - 1}"
    )
