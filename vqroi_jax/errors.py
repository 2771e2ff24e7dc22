"""How a run ends when it is neither finished nor broken by a bug of ours.

`main` prints either as one line: an `InputError` with exit status 2, a `Stopped` with 0. Everything else
is a bug and keeps its traceback.
"""

import contextlib
import operator
import re
from collections.abc import Iterable, Iterator


class InputError(ValueError):
    """What the user gave cannot be used; the message says which thing, why, and what to do."""


class Stopped(Exception):
    """The run was asked to stop (SIGTERM, Ctrl-C) and has saved itself; the message says where."""


def check_fields(name: str, settings: object, fields: Iterable[tuple[str, object, str]]) -> None:
    """Refuses settings of which a field has a value that it cannot have.

    Args:
        name: of the settings in messages, such as 'config.optimizer'.
        settings: the block of a config to read values from.
        fields: each with its dotted name, whether it is good, and what is expected.

    Raises:
        InputError: naming the first that is not good.
    """
    for field, good, expected in fields:
        if not good:
            raise InputError(f'{name}.{field}={operator.attrgetter(field)(settings)}: expected {expected}')


@contextlib.contextmanager
def fields_of(block: str) -> Iterator[None]:
    """Names the fields in an `InputError` of a stage as a config calls them that has the stage's own in a block."""
    try:
        yield
    except InputError as error:
        raise InputError(re.sub(r'\bconfig\.', f'config.{block}.', str(error))) from None
