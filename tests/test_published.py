"""Published tables: what is read, and what is refused in one line."""

import json

import pytest

from vqroi_jax import figures_of_merit, published
from vqroi_jax.errors import InputError

METRICS = ('FID-A', 'precision')


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding='utf-8')
    return path


def test_is_read_with_what_may_be_left_out(tmp_path):
    full = {'metric': 'FID-A', 'class': 'HGG', 'value': 12.5, 'spread': 0}
    path = write(
        tmp_path / 'x.json', {'source': ' Doe, table 2', 'figures': [full, {'metric': 'precision', 'value': 1}]}
    )
    table = published.read(path, METRICS)
    assert table == {
        'source': 'Doe, table 2',
        'figures': [
            {'metric': 'FID-A', 'label': 'HGG', 'value': 12.5, 'spread': 0},
            {'metric': 'precision', 'label': '', 'value': 1, 'spread': None},
        ],
    }
    published.check_classes(path, table, ('LGG', 'HGG'))
    with pytest.raises(InputError, match=r"x\.json: class 'HGG' is none of LGG, GBM; leave"):
        published.check_classes(path, table, ('LGG', 'GBM'))


GOOD = {'metric': 'FID-A', 'value': 1.0}


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        ('{', 'not JSON'),
        ([GOOD], 'expected an object with "source" and "figures"'),
        ({'source': 'Doe', 'figures': [GOOD], 'year': 1}, 'and nothing else'),
        ({'source': ' ', 'figures': [GOOD]}, '"source" is to name'),
        ({'source': 'Doe', 'figures': []}, 'at least one figure'),
        ({'source': 'Doe', 'figures': [3]}, 'figure 1: expected an object with metric, class, value, spread'),
        ({'source': 'Doe', 'figures': [GOOD, GOOD | {'sd': 1}]}, "figure 2: 'sd' is none of metric"),
        ({'source': 'Doe', 'figures': [{'metric': 'FID-A'}]}, 'figure 1 has no "value"'),
        ({'source': 'Doe', 'figures': [GOOD | {'metric': 'FID'}]}, "metric 'FID' is none of: FID-A; precision"),
        ({'source': 'Doe', 'figures': [GOOD | {'metric': ['FID-A']}]}, r"metric \['FID-A'\] is none of"),
        ({'source': 'Doe', 'figures': [GOOD | {'class': 1}]}, 'class 1: the name'),
        ({'source': 'Doe', 'figures': [GOOD | {'value': '1.0'}]}, "value '1.0': a number"),
        ({'source': 'Doe', 'figures': [GOOD | {'value': True}]}, 'value True: a number'),
        ('{"source": "Doe", "figures": [{"metric": "FID-A", "value": NaN}]}', 'value nan: a number'),
        ({'source': 'Doe', 'figures': [GOOD | {'spread': -1}]}, 'spread -1: a number of at least 0'),
        ({'source': 'Doe', 'figures': [GOOD, GOOD]}, "figure 2: 'FID-A' of all classes comes twice"),
    ],
)
def test_other_tables_are_refused(content, message, tmp_path):
    with pytest.raises(InputError, match=rf'^config\.published=.*x\.json.*{message}') as told:
        published.read(write(tmp_path / 'x.json', content), METRICS)
    assert '\n' not in str(told.value)


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(InputError, match=r'none\.json: cannot be read \(No such file'):
        published.read(tmp_path / 'none.json', METRICS)


def test_every_group_says_what_its_figures_are_called():
    assert figures_of_merit.METRICS.keys() == figures_of_merit.GROUPS.keys()
