"""The one error that a user is meant to read."""


class VqbeamError(Exception):
    """Something the user can mend: one line that names the thing, the value and the mend.

    The command line prints the message without a traceback and exits with status 1. Any other
    exception is a bug and keeps its traceback.
    """
