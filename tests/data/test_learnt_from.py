"""The record of the patients that a model has learnt from: what is in it, and that a run goes on with its own."""

import pytest

from vqroi_jax.data.learnt_from import LearntFrom, read_learnt_from, write_learnt_from
from vqroi_jax.errors import InputError


def of(train, val=()):
    return LearntFrom(frozenset(train), frozenset(val))


def test_a_cohort_gives_its_patients_not_its_scans():
    rows = (('a_0', 'a', 'train'), ('a_1', 'a', 'train'), ('b_0', 'b', 'val'), ('c_0', 'c', 'test'))
    scans = [{'id': scan, 'patient': patient, 'split': split} for scan, patient, split in rows]
    assert LearntFrom.of_scans(scans) == of('a', 'b')


def test_who_trained_either_stage_is_no_mere_validation_patient():
    assert of('ab', 'cd') | of('bc', 'ae') == of('abc', 'de')


def test_a_run_goes_on_with_the_patients_that_it_began_with(tmp_path):
    of('xy').record(tmp_path, begun=False)
    of('ab', 'c').record(tmp_path, begun=False)  # nothing was learnt in between
    assert read_learnt_from(tmp_path) == of('ab', 'c')
    of('ba', 'c').record(tmp_path, begun=True)
    for other in (of('ad', 'c'), of('ab')):
        with pytest.raises(InputError, match=r'started with other splits of the cohort \(patient [bcd] is not where'):
            other.record(tmp_path, begun=True)
    assert read_learnt_from(tmp_path) == of('ab', 'c')


def test_a_run_begun_without_the_record_stays_without(tmp_path):
    of('ab').record(tmp_path, begun=True)
    assert read_learnt_from(tmp_path) is None
    assert not list(tmp_path.iterdir())


def test_not_known_is_written_and_read(tmp_path):
    write_learnt_from(tmp_path, None)
    assert read_learnt_from(tmp_path) is None
    write_learnt_from(tmp_path, of(''))
    assert read_learnt_from(tmp_path) == of('')  # known: from nobody


@pytest.mark.parametrize(
    'text', ['{', '[]', '7', '{"train": []}', '{"train": "ab", "val": []}', '{"train": [1], "val": []}',
             '{"train": null, "val": []}']
)  # fmt: skip
def test_a_damaged_record_is_refused(tmp_path, text):
    (tmp_path / 'learnt_from.json').write_text(text)
    with pytest.raises(InputError, match=r'learnt_from.json is damaged: expected a JSON object with the lists train'):
        read_learnt_from(tmp_path)
