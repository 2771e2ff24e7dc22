"""Gives back what compiling leaves behind.

XLA's compiler takes gigabytes for a large step, in small pieces. The GNU C library keeps what is free between those
that remain, a gigabyte for stage 1's step at paper scale, and the step then takes its own memory from the system: by
so much more does a run need on a CPU.
"""

import contextlib
import ctypes
import sys
from collections.abc import Iterator

import jax

_COMPILED = '/jax/core/compile/backend_compile_duration'  # JAX's event: a program was compiled, or read from its cache
_LONG = 1.0  # seconds of it, below which little is left behind


@contextlib.contextmanager
def given_back() -> Iterator[None]:
    """Within, free memory goes back to the system after each long compilation: on Linux, with the GNU C library."""
    trim = getattr(ctypes.CDLL(None), 'malloc_trim', None) if sys.platform == 'linux' else None

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if trim and event == _COMPILED and duration_secs >= _LONG:
            trim(0)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
