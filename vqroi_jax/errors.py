"""How a run ends when it is neither finished nor broken by a bug of ours.

`main` prints either as one line: an `InputError` with exit status 2, a `Stopped` with 0. Everything else
is a bug and keeps its traceback.
"""


class InputError(ValueError):
    """What the user gave cannot be used; the message says which thing, why, and what to do."""


class Stopped(Exception):
    """The run was asked to stop (SIGTERM, Ctrl-C) and has saved itself; the message says where."""
