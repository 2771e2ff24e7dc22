"""The stream of batches: what it holds, in which order, for how many processes, and after a stop."""

import itertools
import json

import numpy as np
import pytest

from vqroi_jax.data.pipeline import Batches, RoiSource, check_classes, eval_batches
from vqroi_jax.errors import InputError

SIZE = (4, 6, 5)


def make_source(length: int) -> RoiSource:
    rng = np.random.default_rng(0)
    records = []
    for position in range(length):
        volume = rng.normal(300, 200, SIZE).astype(np.float32)
        volume[0] = 0
        # The record's number is in the intensities, so that a batch shows which ROIs it really read.
        records.append({'volume': volume, 'range': np.array([0.0, 500.0 + position]), 'id': b'scan'})
    return RoiSource('train', [f'scan{i}' for i in range(length)], [i % 3 for i in range(length)], records)


def rows(batches, numbers) -> list[int]:
    return [int(index) for number in numbers for index in batches.batch_at(number)['index']]


def assert_same(batch, other):
    assert batch.keys() == other.keys()
    for key in batch:
        np.testing.assert_array_equal(batch[key], other[key])


def test_a_batch_is_scaled_and_belongs_together():
    source = make_source(5)
    batches = Batches(source, 3, seed=0)
    batch = batches.batch_at(0)
    assert {key: (value.dtype.name, value.shape) for key, value in batch.items()} == {
        'volume': ('float32', (3, *SIZE, 1)),
        'label': ('int32', (3,)),
        'index': ('int32', (3,)),
    }
    for volume, label, index in zip(*batch.values(), strict=True):
        raw, high = source[index]['volume'].astype(np.float64), 500.0 + index
        np.testing.assert_allclose(volume[..., 0], np.clip(raw, 0, high) / high * 2 - 1, atol=1e-6)
        assert label == index % 3
    assert batches.ids(batch['index']) == [f'scan{index}' for index in batch['index']]
    assert batches.steps_per_epoch == pytest.approx(5 / 3)


def test_every_epoch_has_every_roi_once_in_a_new_order():
    batches = Batches(make_source(7), 3, seed=4)
    stream = rows(batches, range(7))
    epochs = [tuple(stream[start : start + 7]) for start in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len(set(epochs)) == 3
    assert stream != rows(Batches(make_source(7), 3, seed=99), range(7))
    assert stream == rows(Batches(make_source(7), 3, seed=4), range(7))


def test_a_split_smaller_than_a_batch_goes_round():
    stream = rows(Batches(make_source(2), 5, seed=0), range(4))
    assert all(sorted(stream[start : start + 2]) == [0, 1] for start in range(0, 20, 2))


@pytest.mark.parametrize(('length', 'batch_size'), [(5, 1), (1, 1), (7, 3)])
def test_the_stream_has_no_end_that_a_run_could_reach(length, batch_size):
    batches = Batches(make_source(length), batch_size, seed=0)
    iterator = batches.iterator()
    assert_same(next(iterator), batches.batch_at(0))
    assert batches.batch_at(10**12)['index'].shape == (batch_size,)


def test_unshuffled_keeps_the_order():
    assert rows(Batches(make_source(3), 4, seed=0, shuffle=False), range(2)) == [0, 1, 2, 0, 1, 2, 0, 1]


@pytest.mark.parametrize('processes', [2, 4])
def test_any_number_of_processes_reads_the_same_global_batches(processes):
    source = make_source(10)
    alone = Batches(source, 8, seed=1)
    together = [Batches(source, 8, seed=1, process_index=p, process_count=processes) for p in range(processes)]
    for number in range(4):
        parts = [batches.batch_at(number) for batches in together]
        assert all(len(part['index']) == 8 // processes for part in parts)
        assert_same(alone.batch_at(number), {key: np.concatenate([part[key] for part in parts]) for key in parts[0]})


@pytest.mark.parametrize('prefetch', [0, 3])
def test_the_iterator_gives_what_random_access_gives(prefetch):
    batches = Batches(make_source(5), 2, seed=0, prefetch=prefetch)
    for number, batch in enumerate(itertools.islice(batches.iterator(), 9)):
        assert_same(batch, batches.batch_at(number))


def test_a_resumed_iterator_goes_on_where_it_was():
    batches = Batches(make_source(5), 2, seed=0)
    iterator = batches.iterator()
    for _ in range(4):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))  # as a checkpoint keeps it
    expected = [next(iterator) for _ in range(5)]
    resumed = Batches(make_source(5), 2, seed=0).iterator()
    next(resumed)
    resumed.set_state(state)
    for batch in expected:
        assert_same(next(resumed), batch)


def test_a_batch_must_divide_by_the_processes():
    with pytest.raises(InputError, match='batch of 6 does not divide by 4 processes'):
        Batches(make_source(10), 6, seed=0, process_count=4)
    with pytest.raises(InputError, match='batch of 6 does not divide by 4 processes'):
        eval_batches(make_source(10), 6, process_count=4)


def test_an_empty_split_cannot_be_trained_on():
    with pytest.raises(InputError, match='train split has no patients'):
        Batches(make_source(0), 2, seed=0)


@pytest.mark.parametrize('length', [1, 4, 5, 8])
@pytest.mark.parametrize('processes', [1, 2])
def test_evaluation_sees_every_roi_once(length, processes):
    source = make_source(length)
    per_process = [list(eval_batches(source, 4, process_index=p, process_count=processes)) for p in range(processes)]
    assert len({len(batches) for batches in per_process}) == 1  # or a collective would wait for ever
    seen = []
    for batches in per_process:
        for batch in batches:
            assert batch['volume'].shape == (4 // processes, *SIZE, 1)
            assert batch['weight'].dtype == np.float32
            seen += batch['index'][batch['weight'] == 1].tolist()
            assert (batch['index'][batch['weight'] == 0] == length - 1).all()
    assert sorted(seen) == list(range(length))


def test_evaluation_of_an_empty_split_is_no_batch():
    assert list(eval_batches(make_source(0), 4)) == []


def test_a_split_without_a_class_is_refused():
    check_classes(make_source(3), ('LGG', 'HGG', 'AST'))
    with pytest.raises(InputError, match="the train split has no ROI of class 'AST'"):
        check_classes(make_source(2), ('LGG', 'HGG', 'AST'))
