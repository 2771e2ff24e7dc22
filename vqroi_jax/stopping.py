"""SIGTERM and Ctrl-C as a question that long work asks between two pieces, so that it ends with everything saved."""

import contextlib
import itertools
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

from vqroi_jax.errors import Stopped

_asked = itertools.count()  # how often, in all of a process's work: in all processes of a run alike


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Turns SIGTERM and the first Ctrl-C into a question to ask after each piece of work: whether to stop now.

    Of several processes all must ask equally often, and stop after the same piece: JAX's preemption service catches
    SIGTERM and agrees on one. What comes where nobody asks is answered when somebody next does.

    Raises:
        Stopped: at the end, if a request came that was not asked for any more, so that what was to follow does not.
    """
    if jax.process_count() > 1:
        yield lambda: multihost_utils.reached_preemption_sync_point(next(_asked))
        return
    caught = threading.Event()

    def note(number: int, _: object) -> None:
        caught.set()
        signal.signal(number, before[signal.Signals(number)])  # a second Ctrl-C interrupts at once

    before = {}
    if threading.current_thread() is threading.main_thread():  # Python lets no other set handlers
        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if caught.is_set():
        raise Stopped('stopped with everything done and saved')


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Makes SIGTERM what Ctrl-C is, for work that has nothing to save but something to clear away.

    In several processes it stays with JAX's preemption service, and outside the main thread what it is.
    """
    if jax.distributed.is_initialized() or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
