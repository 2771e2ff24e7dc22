"""Durations as configs write them, '10000 epochs' or '500 steps', as numbers of steps.

Everything inside the program counts in steps; only configs speak of epochs.
"""

import re

from vqroi_jax.errors import InputError


def to_steps(text: str, steps_per_epoch: float, field: str = 'duration', minimum: int = 1) -> int:
    """Number of steps that a duration stands for.

    Args:
        text: a number and its unit: 'N steps' or 'N epochs' (or 'step', 'epoch'); epochs may be fractions.
        steps_per_epoch: patients of the training split over the batch size; need not be whole.
        field: the config's field, for the message.
        minimum: the least number of steps that makes sense; 0 where the field may mean 'at once'.

    Returns:
        Steps, epochs rounded to the nearest whole step.

    Raises:
        InputError: another text, part of a step, or fewer steps than `minimum`.
    """
    match = re.fullmatch(r'\s*(\d+(?:\.\d+)?)\s*(step|epoch)s?\s*', str(text))
    if not match:
        raise InputError(f"{field}: {text!r} is no duration; write '500 steps' or '20 epochs'")
    count = float(match[1])
    if match[2] == 'step' and count != int(count):
        raise InputError(f'{field}: {text!r} has part of a step; write a whole number')
    steps = round(count if match[2] == 'step' else count * steps_per_epoch)
    if steps < minimum:
        raise InputError(
            f'{field}: {text!r} is {steps} steps (an epoch has {steps_per_epoch:g}); at least {minimum} expected: '
            'a smaller batch_size makes more of an epoch, or write it in steps'
        )
    return steps
