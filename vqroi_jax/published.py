"""Figures of merit from elsewhere, such as a paper's table, to be shown beside ours: read from a JSON file and checked.

The file's layout is described in `configs/evaluate.py`.
"""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from vqroi_jax.errors import InputError

_FIELDS = {'metric': True, 'class': False, 'value': True, 'spread': False}  # of a figure; which it must have


def read(path: str | Path, metrics: Collection[str]) -> dict:
    """Reads a table.

    Args:
        path: of a JSON file.
        metrics: that it may have figures of.

    Returns:
        `source`, its name, and `figures`, a list of `metric`, `label` (the class; '' for all), `value` and `spread`
        (None where it gives none).

    Raises:
        InputError: naming the file, the figure and what was expected.
    """
    name = f'config.published={path}'
    try:
        found = json.loads(Path(path).expanduser().read_text(encoding='utf-8'))
    except OSError as error:
        raise InputError(f'{name}: cannot be read ({error.strerror})') from None
    except ValueError as error:
        raise InputError(f'{name}: not JSON: {error}') from None
    if not isinstance(found, Mapping) or found.keys() != {'source', 'figures'}:
        raise InputError(f'{name}: expected an object with "source" and "figures", and nothing else')
    if not isinstance(found['source'], str) or not found['source'].strip():
        raise InputError(f'{name}: "source" is to name where the figures are from')
    if not isinstance(found['figures'], list) or not found['figures']:
        raise InputError(f'{name}: "figures" is to be a list with at least one figure')
    figures: dict[tuple[str, str], dict] = {}
    for number, entry in enumerate(found['figures'], 1):
        figure = _figure(f'{name}: figure {number}', entry, metrics)
        key = figure['metric'], figure['label']
        if figures.setdefault(key, figure) is not figure:
            raise InputError(f'{name}: figure {number}: {key[0]!r} of {key[1] or "all classes"} comes twice')
    return {'source': found['source'].strip(), 'figures': list(figures.values())}


def _figure(name: str, entry: object, metrics: Collection[str]) -> dict:
    if not isinstance(entry, Mapping):
        raise InputError(f'{name}: expected an object with {", ".join(_FIELDS)}')
    if unknown := [field for field in entry if field not in _FIELDS]:
        raise InputError(f'{name}: {unknown[0]!r} is none of {", ".join(_FIELDS)}')
    if missing := [field for field, needed in _FIELDS.items() if needed and field not in entry]:
        raise InputError(f'{name} has no "{missing[0]}"')
    if entry['metric'] not in metrics:
        raise InputError(f'{name}: metric {entry["metric"]!r} is none of: {"; ".join(metrics)}')
    label, spread = entry.get('class', ''), entry.get('spread')
    if not isinstance(label, str):
        raise InputError(f'{name}: class {label!r}: the name of a class is expected')
    if not _is_number(entry['value']):
        raise InputError(f'{name}: value {entry["value"]!r}: a number is expected')
    if spread is not None and (not _is_number(spread) or spread < 0):
        raise InputError(f'{name}: spread {spread!r}: a number of at least 0 is expected')
    return {'metric': entry['metric'], 'label': label, 'value': entry['value'], 'spread': spread}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_classes(path: str | Path, table: Mapping, classes: Sequence[str]) -> None:
    """Refuses a table from `read` with figures of a class that is not compared.

    Raises:
        InputError: naming the class and those that are compared.
    """
    unknown = [figure['label'] for figure in table['figures'] if figure['label'] not in ('', *classes)]
    if unknown:
        raise InputError(
            f'config.published={path}: class {unknown[0]!r} is none of {", ".join(classes)}; leave "class" out for '
            'figures of all classes'
        )
