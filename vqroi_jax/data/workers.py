"""Processes that draw phantoms and crop scans: none outlives the work it was started for, however that ends.

Kept light, for each of them imports it.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from vqroi_jax.errors import InputError


def count(asked: int, tasks: int) -> int:
    """How many processes to use: those asked for (0: one a core that may be used), but no more than tasks."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    return min(asked or cores, tasks)


@contextlib.contextmanager
def pool(number: int, work: str) -> Iterator[ProcessPoolExecutor]:
    """Processes to submit tasks to; they are killed at once if an error or an interruption leaves the block.

    Args:
        number: of processes.
        work: what they do, for the message, such as 'crops'.

    Raises:
        InputError: one was killed, most likely for want of memory.
    """
    # Spawned, not forked: JAX's threads may run here already, and a fork would copy their locks.
    others = set(multiprocessing.active_children())
    executor = ProcessPoolExecutor(number, multiprocessing.get_context('spawn'), initializer=_die_with_parent)
    try:
        yield executor
    except BaseException as error:
        # By itself a shutdown waits for what has begun, and, where the pool broke, for a late worker for ever.
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        if isinstance(error, BrokenProcessPool):
            raise InputError(
                f'a process that {work} was killed, most likely for want of memory; use fewer: --config.data.workers=1'
            ) from error
        raise
    finally:
        executor.shutdown(cancel_futures=True)


def _die_with_parent() -> None:
    """Makes a worker end when the process that started it is gone, even by SIGKILL; by itself it would stay."""
    parent = multiprocessing.parent_process()
    assert parent, 'not in a worker'

    def watch() -> None:
        parent.join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends the pool
    threading.Thread(target=watch, daemon=True).start()
