"""How far long work has got, on a terminal and in a log."""

import io
import sys

from vqroi_jax import progress


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self):
        return True


def test_a_log_has_lines_now_and_then_and_none_of_what_takes_no_time(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(sys, 'stderr', log)
    assert list(progress.bar('reading', 'ROI', [1, 2, 3])) == [1, 2, 3]
    assert log.getvalue() == ''
    monkeypatch.setattr(progress, 'EVERY', 1e-9)
    with progress.bar('drawing', 'sample', total=4, initial=1) as bar:
        bar.update()
        bar.update(2)
    lines = log.getvalue().splitlines()
    assert [line[: line.index('/4')].split()[-1] for line in lines] == ['2', '4']
    assert all(line.startswith('drawing: ') and 'sample/s' in line for line in lines)


def test_a_terminal_has_one_line_that_changes(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, 'stderr', terminal)
    assert len(list(progress.bar('reading', 'ROI', range(5)))) == 5
    assert terminal.getvalue().count('\n') == 1
    assert '5/5' in terminal.getvalue()


def test_only_the_process_that_tells_does(monkeypatch):
    monkeypatch.setattr(sys, 'stderr', Terminal())
    assert len(list(progress.bar('reading', 'ROI', range(5), shown=False))) == 5
    assert sys.stderr.getvalue() == ''
