"""The exception class for user errors."""


class VqbeamError(Exception):
    """A user error: one line with the offending name, its value and how to fix it.

    The command line prints the message without a traceback and exits with status 1. Any other
    exception is a bug and keeps its traceback.
    """


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message, or its `repr` if the message is empty."""
    return next(iter(str(error).strip().splitlines()), repr(error))
