"""A program asks for large pages once, and keeps its arguments."""

import os
import subprocess
import sys

import pytest

from vqroi_jax import large_pages

PROGRAM = """
import os, sys
from pathlib import Path
from vqroi_jax import large_pages

large_pages._MODE = Path(sys.argv[1])
print(os.getpid(), flush=True)
large_pages.ask()
print(os.getpid(), os.environ[large_pages.TUNABLES], *sys.argv[2:])
"""


def test_starts_again_once_in_the_same_process(tmp_path):
    program, mode = tmp_path / 'program.py', tmp_path / 'enabled'
    program.write_text(PROGRAM)
    mode.write_text('always [madvise] never\n')
    environment = {name: value for name, value in os.environ.items() if name != large_pages.TUNABLES}
    command = [sys.executable, '-W', 'error', str(program), str(mode), '--config=a b', '']
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    first, second, last = output.splitlines()
    assert first == second
    assert last == f'{first} glibc.malloc.hugetlb=1 --config=a b '


@pytest.mark.parametrize(
    ('mode', 'tunables'),
    [
        ('[always] madvise never', None),
        ('always madvise [never]', None),
        (None, None),
        ('always [madvise] never', ''),
        ('always [madvise] never', 'glibc.malloc.hugetlb=1'),
    ],
)
def test_returns_where_there_is_nothing_to_ask_or_the_user_has_decided(mode, tunables, tmp_path, monkeypatch):
    if mode:
        (tmp_path / 'enabled').write_text(mode)
    monkeypatch.setattr(large_pages, '_MODE', tmp_path / 'enabled')
    monkeypatch.setattr(os, 'execv', lambda *_: pytest.fail('started again'))
    monkeypatch.delenv(large_pages.TUNABLES, raising=False)
    if tunables is not None:
        monkeypatch.setenv(large_pages.TUNABLES, tunables)
    large_pages.ask()
    assert os.environ.get(large_pages.TUNABLES) == tunables
