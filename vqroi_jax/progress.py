"""How far long work other than training has got: a bar on a terminal, elsewhere a line now and then."""

import sys
from collections.abc import Iterable

from tqdm import tqdm

EVERY = 30  # seconds between lines


def bar(
    what: str, unit: str, steps: Iterable | None = None, total: int | None = None, initial: int = 0, shown: bool = True
) -> tqdm:
    """A bar on stderr; where that is no terminal a line every `EVERY` seconds, and none of work that takes less.

    Args:
        what: is done.
        unit: that is counted.
        steps: to go through; None: `update` is called after each.
        total: number of units; None: as many as steps.
        initial: units that were done before.
        shown: whether this process is the one that tells.
    """
    settings = {'desc': what, 'unit': unit, 'total': total, 'initial': initial, 'disable': not shown}
    if sys.stderr.isatty():
        return tqdm(steps, **settings)
    return _Lines(steps, leave=False, mininterval=EVERY, maxinterval=EVERY, delay=EVERY, **settings)


class _Lines(tqdm):
    """A bar that leaves each of its states behind as a line, for logs."""

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Prints a state; the empty one, which would clear a bar, is none."""
        if msg != '':
            print(msg or self, file=self.fp, flush=True)
