"""How a run ends when it is neither finished nor broken by a bug of ours.

`main` prints either as one line: an `InputError` with exit status 2, a `Stopped` with 0. Everything else
is a bug and keeps its traceback.
"""

import contextlib
import re
from collections.abc import Iterator


class InputError(ValueError):
    """What the user gave cannot be used; the message says which thing, why, and what to do."""


class Stopped(Exception):
    """The run was asked to stop (SIGTERM, Ctrl-C) and has saved itself; the message says where."""


@contextlib.contextmanager
def fields_of(block: str) -> Iterator[None]:
    """Names the fields in an `InputError` of a stage as a config calls them that has the stage's own in a block."""
    try:
        yield
    except InputError as error:
        raise InputError(re.sub(r'\bconfig\.', f'config.{block}.', str(error))) from None
