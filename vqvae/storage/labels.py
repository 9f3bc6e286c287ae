"""Labels of a dataset: classes or attributes."""

from typing import Any, NamedTuple

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
