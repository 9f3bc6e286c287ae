"""What images are labelled with: classes or attributes."""

from typing import Any, NamedTuple

# The label of an image that has no class.
NO_CLASS = -1


class Labels(NamedTuple):
    """What the images of a dataset are labelled with.

    Attributes:
        names: Of the classes or of the attributes; empty where there are neither.
        kind: "classes", of which each image has one, or "attributes", of which it has any number.
    """

    names: tuple[str, ...] = ()
    kind: str = "classes"

    @classmethod
    def of(cls, manifest: dict[str, Any]) -> "Labels":
        """Returns what the images of a stage are labelled with, by its manifest."""
        # Manifests from before there were attributes do not say which kind it is.
        return cls(tuple(manifest["label_names"]), manifest.get("label_kind", "classes"))
