"""Large pages: memory in pieces of 2 MB, which Linux gives a program that asked for them when it started.

A training step on a CPU takes gigabytes and gives them back. Linux hands them out anew each time, 4 KB by 4 KB, and
later looks each piece up: a twentieth of the time of stage 2's step at paper scale. On most systems it leaves it to the
program to ask for larger pieces, and a program's memory comes from the C library, which reads the wish from the
environment, once, at the start.
"""

import os
import sys
from pathlib import Path

TUNABLES = 'GLIBC_TUNABLES'  # settings of the GNU C library; other libraries do not read it

_ASKING = 'glibc.malloc.hugetlb=1'  # glibc 2.35 and later; earlier ones pass over it
_MODE = Path('/sys/kernel/mm/transparent_hugepage/enabled')  # such as 'always [madvise] never'; Linux alone has it


def ask() -> None:
    """Starts this program again with large pages, in the same process with the same arguments, or returns.

    It returns where Linux does not leave large pages to programs, and where the environment has `GLIBC_TUNABLES`: from
    this function, or from the user, who with an empty one declines. To be called first of all.
    """
    try:
        mode = _MODE.read_text()
    except OSError:  # another system, or a container that hides it
        return
    if TUNABLES not in os.environ and '[madvise]' in mode and sys.executable:
        os.environ[TUNABLES] = _ASKING
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
