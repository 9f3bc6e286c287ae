"""Config fields with help texts and ranges, and a base class for sections that checks them."""

import dataclasses
import math
import typing
from typing import Any


class VqbeamError(Exception):
    """A user error: one line that names the thing, its value and how to fix it.

    The command line prints the message without a traceback and exits with status 1. Any other
    exception is a bug and keeps its traceback.
    """


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message, or its `repr` if the message is empty."""
    return next(iter(str(error).strip().splitlines()), repr(error))


def field(
    help: str,
    default: Any = dataclasses.MISSING,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: tuple[str, ...] | None = None,
) -> Any:
    """Returns a dataclass field with the help text and the range in its metadata."""
    metadata = {"help": help, "minimum": minimum, "maximum": maximum, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


def schedule_field() -> Any:
    """Returns the field for the learning-rate schedule."""
    return field(
        "learning rate after warm-up: cosine decay to 1% of the peak, or constant",
        "cosine",
        choices=("cosine", "constant"),
    )


def weight_ema_field() -> Any:
    """Returns the field for the decay of the weight EMA."""
    return field(
        "decay of the moving average of the weights, which is the result; 0 for no average",
        0.0,
        minimum=0,
        maximum=0.99999,
    )


def init_from_field() -> Any:
    """Returns the field for the run that a model's weights come from."""
    return field("run whose model of this stage to start from, instead of random weights", None)


def dtype_field(of: str) -> Any:
    """Returns the field for the compute precision; `of` names the network in the help text."""
    choices = ("float32", "mixed_bfloat16", "mixed_float16")
    return field(f"compute precision of the {of}", "float32", choices=choices)


class Section:
    """A config section that checks each field against its type and the range in its metadata."""

    prefix = ""

    def __post_init__(self):
        hints = typing.get_type_hints(type(self))
        for f in dataclasses.fields(self):
            name, value = f"{self.prefix}.{f.name}", getattr(self, f.name)
            check_type(name, value, hints[f.name])
            check(name, value, f.metadata)


def check_type(name: str, value: Any, kind: Any) -> None:
    """Raises a VqbeamError if a value has the wrong type; an int is accepted for a float."""
    kinds = typing.get_args(kind) or (kind,)
    fits = isinstance(value, (*kinds, int) if float in kinds else kinds)
    if not fits or isinstance(value, bool):
        wanted = {int: "an integer", float: "a number", str: "a string", type(None): "None"}
        raise VqbeamError(f"{name} is {value!r}; give {' or '.join(wanted[k] for k in kinds)}")


def check(name: str, value: Any, limits: Any) -> None:
    """Raises a VqbeamError if a value is outside the range in its field's metadata."""
    if value is None:
        return
    choices, minimum, maximum = limits["choices"], limits["minimum"], limits["maximum"]
    if isinstance(value, float) and not math.isfinite(value):
        raise VqbeamError(f"{name} is {value}; it must be finite")
    if choices is not None and value not in choices:
        raise VqbeamError(f"{name} is {value!r}; choose one of {', '.join(choices)}")
    if minimum is not None and value < minimum:
        raise VqbeamError(f"{name} is {value}; it must be at least {minimum}")
    if maximum is not None and value > maximum:
        raise VqbeamError(f"{name} is {value}; it must be at most {maximum}")
