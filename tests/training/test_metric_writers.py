"""metrics.jsonl over crashes and resumes, TensorBoard events, figures, and the two kinds of progress."""

import io
import json
import math

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure
from tensorboardX.proto.event_pb2 import Event

from vqroi_jax.training import metric_writers
from vqroi_jax.training.metric_writers import MetricWriter, Progress, read_metrics


def events(workdir):
    """All TensorBoard events of a run, read by the record format itself: length, its checksum, data, its checksum."""
    found = []
    for path in sorted(workdir.glob('tensorboard/events.*')):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], 'little')
            found.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return found


def figure(colour):
    drawing = Figure(figsize=(1, 0.5), dpi=100, facecolor=colour)
    drawing.subplots().set_axis_off()
    return drawing


def test_a_line_has_the_step_and_its_numbers(tmp_path):
    with MetricWriter(tmp_path, 0) as writer:
        writer.scalars(10, {'train/loss': 0.5, 'train/accuracy': 1.0})
        writer.scalars(10, {'val/l1': 0.25})
        writer.scalars(20, {'train/loss': math.nan})
    lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
    assert [json.loads(line, parse_constant=pytest.fail) for line in lines] == [
        {'step': 10, 'train/loss': 0.5, 'train/accuracy': 1.0},
        {'step': 10, 'val/l1': 0.25},
        {'step': 20, 'train/loss': None},
    ]


def test_a_line_is_on_disk_at_once(tmp_path):
    with MetricWriter(tmp_path, 0) as writer:
        writer.scalars(10, {'loss': 1.0})
        assert read_metrics(tmp_path / 'metrics.jsonl') == [{'step': 10, 'loss': 1.0}]


def test_resuming_drops_later_steps_and_a_half_written_line(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    path.write_text('{"step": 10, "loss": 3.0}\n{"step": 20, "loss": 2.0}\n{"step": 30, "loss": 1.0}\n{"step": 40, "lo')
    with MetricWriter(tmp_path, 20) as writer:
        writer.scalars(30, {'loss': 1.5})
    assert read_metrics(path) == [{'step': step, 'loss': loss} for step, loss in ((10, 3.0), (20, 2.0), (30, 1.5))]


def test_starting_anew_drops_what_a_lost_attempt_left(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    path.write_text('{"step": 0, "loss": 3.0}\n{"step": 10, "loss": 3.0}\n')
    with MetricWriter(tmp_path, 0):
        pass
    assert path.read_text() == ''


def test_tensorboard_gets_scalars_and_images_and_forgets_later_steps(tmp_path):
    with MetricWriter(tmp_path, 20) as writer:
        writer.scalars(30, {'val/l1': 0.25})
        writer.figures(30, {'reconstructions': figure('red')})
    found = events(tmp_path)
    values = [(event.step, value) for event in found for value in event.summary.value]
    assert [(step, value.simple_value) for step, value in values if value.tag == 'val/l1'] == [(30, 0.25)]
    images = [value.image for step, value in values if value.tag == 'reconstructions']
    assert [(image.height, image.width) for image in images] == [(50, 100)]
    purges = [event.step for event in found if event.HasField('session_log')]
    assert purges == [21]  # TensorBoard hides all it has from this step on


def test_figures_are_kept_by_step_and_the_newest_by_name(tmp_path):
    with MetricWriter(tmp_path, 0) as writer:
        writer.figures(0, {'reconstructions': figure('red')})
        writer.figures(500, {'reconstructions': figure('blue')})
    folder = tmp_path / 'figures'
    assert sorted(path.name for path in folder.glob('*.png')) == ['reconstructions.png']
    assert sorted(path.name for path in folder.glob('steps/*')) == [
        'reconstructions_00000000.png',
        'reconstructions_00000500.png',
    ]
    newest = matplotlib.image.imread(folder / 'reconstructions.png')
    assert newest.shape[:2] == (50, 100)
    np.testing.assert_array_equal(newest[0, 0, :3], [0, 0, 1])


def test_other_processes_write_and_print_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(metric_writers, 'is_primary', lambda: False)
    with MetricWriter(tmp_path, 0) as writer, Progress(0, 100) as progress:
        writer.scalars(1, {'loss': 1.0})
        writer.figures(1, {'figure': figure('red')})
        progress.update(1, {'loss': 1.0}, 2.0)
        progress.log(1, {'loss': 1.0}, 2.0, 1.0)
        progress.message('hello')
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ('', '')


def test_elsewhere_than_on_a_terminal_progress_is_one_line_an_interval():
    bar, lines = io.StringIO(), io.StringIO()
    with Progress(0, 1000, bar, lines) as progress:
        for step in range(1, 101):
            progress.update(step, {'loss': 1.0}, 2.0)
        progress.log(100, {'loss': 0.12345, 'l1': 0.05}, 2.0, 1.25)
        progress.message('step 100  val/l1 0.06')
    assert bar.getvalue() == ''
    assert lines.getvalue().splitlines() == [
        'step 100/1000  loss 0.1235  l1 0.05  2 steps/s  ETA 07:30  peak memory 1.25 GiB',
        'step 100  val/l1 0.06',
    ]


def test_on_a_terminal_progress_is_a_bar():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    bar, lines = Terminal(), io.StringIO()
    with Progress(500, 1000, bar, lines) as progress:
        progress.update(501, {'loss': 0.5}, 2.0)
        progress.log(501, {'loss': 0.5}, 2.0, 1.0)
        progress.message('warning: something')
        progress.update(1000, {'loss': 0.25}, 4.0)
    drawn = bar.getvalue()
    assert '50%' in drawn
    assert '1000/1000' in drawn
    assert 'loss 0.25  4 steps/s  ETA 00:00' in drawn
    assert lines.getvalue() == 'warning: something\n'
