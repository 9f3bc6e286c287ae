"""The one error that a user is meant to read."""


class VqbeamError(Exception):
    """Something the user can mend: one line that names the thing, the value and the mend.

    The command line prints the message without a traceback and exits with status 1. Any other
    exception is a bug and keeps its traceback.
    """


def first_line(error: Exception) -> str:
    """Returns the first line that another library's error says, or its name if it says nothing."""
    return next(iter(str(error).strip().splitlines()), repr(error))
