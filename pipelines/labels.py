"""Classes by the names that a user types."""

from collections.abc import Sequence

import numpy as np

from configs import VqbeamError


def label_numbers(labels: Sequence[str] | None, names: Sequence[str], num: int) -> np.ndarray:
    """Returns the label of each of `num` images: those asked for, in turn.

    Args:
        labels: Names or numbers of classes; None for all of them.
        names: The classes of the run; none where it has none.
        num: Images.

    Returns:
        int32 [num]; −1 where the run has no classes.

    Raises:
        VqbeamError: A class is not known.
    """
    if labels is None:
        chosen = range(len(names)) if names else [-1]
    else:
        chosen = [label_number(label, names) for label in labels]
    return np.resize(np.asarray(chosen, np.int32), num)


def label_number(label: str, names: Sequence[str]) -> int:
    """Returns the number of the class that is called `label`, or has it as its number.

    Raises:
        VqbeamError: There is no such class, or there are none.
    """
    if not names:
        raise VqbeamError(f"label {label!r} was asked for, but the run has no classes")
    if label in names:
        return names.index(label)
    lowered = [name.lower() for name in names]
    if label.lower() in lowered:
        return lowered.index(label.lower())
    if label.isdecimal() and int(label) < len(names):
        return int(label)
    shown = ", ".join(names[:30]) + (", …" if len(names) > 30 else "")
    raise VqbeamError(f"the run has no label {label!r}; it has {shown}")
