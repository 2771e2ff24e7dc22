"""Durations in epochs and steps."""

import pytest

from vqroi_jax.errors import InputError
from vqroi_jax.training.durations import to_steps


@pytest.mark.parametrize(
    ('text', 'steps'),
    [
        ('500 steps', 500),
        ('1 step', 1),
        (' 20 epochs ', 1880),
        ('1 epoch', 94),
        ('0.5 epochs', 47),
        ('10000 epochs', 940_000),
        ('100.0 steps', 100),
    ],
)
def test_means_so_many_steps(text, steps):
    assert to_steps(text, 94) == steps


def test_epochs_of_part_of_a_step_are_rounded_once():
    assert to_steps('10 epochs', 7 / 3) == 23  # and not ten epochs of two steps
    assert to_steps('3 epochs', 7 / 3) == 7


def test_zero_is_taken_only_where_it_makes_sense():
    assert to_steps('0 steps', 94, minimum=0) == 0
    with pytest.raises(InputError, match=r"training\.duration: '0\.001 epochs' is 0 steps"):
        to_steps('0.001 epochs', 94, 'training.duration')


@pytest.mark.parametrize(
    'text', ['', '500', 'epochs', '5 hours', '-5 steps', '5,000 steps', '1e3 steps', '2.5 steps', 7]
)
def test_other_texts_are_refused_with_the_field(text):
    with pytest.raises(InputError, match=r'training\.log_every: '):
        to_steps(text, 94, 'training.log_every')
