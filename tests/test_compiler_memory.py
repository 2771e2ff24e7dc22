"""After a long compilation, and nothing else, free memory is given back to the system."""

import ctypes
import os
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqroi_jax import compiler_memory

PIECE, PIECES = 64_000, 4000  # bytes and number: less than the C library takes from the system by itself


@pytest.fixture
def trims(monkeypatch):
    """The calls of a C library that has `malloc_trim`."""
    calls = []
    monkeypatch.setattr(ctypes, 'CDLL', lambda name: types.SimpleNamespace(malloc_trim=calls.append))
    monkeypatch.setattr(sys, 'platform', 'linux')
    return calls


def compile_and_run(number):
    """Compiles once a number."""
    step = jax.jit(lambda x: jnp.sin(x) * number)
    step(1.0)
    return step


def test_once_after_each_long_compilation(trims, monkeypatch):
    monkeypatch.setattr(compiler_memory, '_LONG', 0.0)
    with compiler_memory.given_back():
        step = compile_and_run(17.25)
        assert trims == [0]
        step(2.0)
        assert trims == [0]
        compile_and_run(18.25)
        assert trims == [0, 0]
    compile_and_run(19.25)
    assert trims == [0, 0]


def test_not_after_short_ones(trims, monkeypatch):
    monkeypatch.setattr(compiler_memory, '_LONG', 1e6)
    with compiler_memory.given_back():
        compile_and_run(20.25)
    assert trims == []


def test_not_on_other_systems(trims, monkeypatch):
    monkeypatch.setattr(sys, 'platform', 'darwin')
    monkeypatch.setattr(compiler_memory, '_LONG', 0.0)
    with compiler_memory.given_back():
        compile_and_run(21.25)
    assert trims == []


def test_libraries_that_cannot_are_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, 'CDLL', lambda name: types.SimpleNamespace())
    monkeypatch.setattr(sys, 'platform', 'linux')
    monkeypatch.setattr(compiler_memory, '_LONG', 0.0)
    with compiler_memory.given_back():
        assert compile_and_run(23.25)(0.0) == 0


def resident():
    """Bytes of this process's memory that are in use."""
    return int(Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')


@pytest.mark.skipif(
    sys.platform != 'linux' or not hasattr(ctypes.CDLL(None), 'malloc_trim'), reason='needs the GNU C library'
)
def test_what_lies_between_pieces_in_use_is_given_back(monkeypatch):
    monkeypatch.setattr(compiler_memory, '_LONG', 0.0)
    pieces = [np.ones(PIECE, np.uint8) for _ in range(PIECES)]
    del pieces[::2]
    before = resident()
    with compiler_memory.given_back():
        compile_and_run(22.25)
    assert before - resident() > PIECE * PIECES / 4
    assert all(piece.all() for piece in pieces)
