"""Masking: the invariants of section 2.5 of the design for many settings, and a slow oracle of its written rules."""

import dataclasses
import sys
import types

import hypothesis
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from hypothesis import strategies as st
from scipy import stats

from vqroi_jax import masking
from vqroi_jax.errors import InputError
from vqroi_jax.masking import Role, Settings

CODES = 11  # not a power of two
BATCH = 512  # samples a call: each settings are compiled once
CHECKED = 24  # of each half of a batch, one by one
MASKED = (Role.START, Role.NEIGHBOUR, Role.FILL)

corrupt = jax.jit(masking.corrupt, static_argnums=3)


def make_batch(settings, seed=0):
    """Keys, tokens and scores; in the second half of the samples the best scores lie side by side."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, settings.codes, (BATCH, settings.length), np.int32)
    ranks = rng.permuted(np.tile(np.arange(settings.length), (BATCH, 1)), axis=1)
    for sample in range(BATCH // 2, BATCH):
        ranks[sample] = np.roll(np.arange(settings.length), sample)
    scores = ((ranks + 1) / (settings.length + 1)).astype(np.float32)
    return jax.random.split(jax.random.key(seed), BATCH), tokens, scores


# ---------------------------------------------------------------------------------- the written rules, slowly


def links(settings):
    """Tokens i*H*W and i*H*W - 1, which are never starts."""
    size = settings.length // settings.grid[0]
    if not settings.keep_slice_links:
        return set()
    return {i * size - back for i in range(1, settings.grid[0]) for back in (0, 1)}


def by_importance(scores, settings):
    """Places of tokens, the most important first: the links between slices come last."""
    last = links(settings)
    return sorted(range(settings.length), key=lambda place: (place in last, -scores[place], place))


def candidates(scores, settings):
    return by_importance(scores, settings)[: int(settings.length * settings.top_k)]


def along(place, step, length, neighbours):
    """What a start at `place` of an axis of places 0 ... length - 1, which lie `step` apart, takes along."""
    wanted = [place + 1] if neighbours == 1 else [place - 1, place + 1]
    if place == length - 1:
        wanted = [place - 1] if neighbours == 1 else [place - 1, place - 2]
    elif place == 0 and neighbours == 2:
        wanted = [1, 2]
    return [(to - place) * step for to in wanted if 0 <= to < length]


def spatial_neighbours(place, settings):
    size = settings.length // settings.grid[0]
    row = settings.grid[-1] if settings.neighbour_order == 'grid' else size
    return [place + by for by in along(place % row, 1, row, settings.neighbours)]


def temporal_neighbours(place, settings):
    size = settings.length // settings.grid[0]
    return [place + by for by in along(place // size, size, settings.grid[0], settings.neighbours)]


def without_adjacent(drawn, settings):
    """Starts in the order they were drawn, without those next to one that came earlier and stayed."""
    size, kept = settings.length // settings.grid[0], []
    for place in drawn:
        if not any(abs(place - earlier) in (1, size) for earlier in kept):
            kept.append(place)
    return kept


def hybrid_roles(rng, scores, settings):
    roles = np.full(settings.length, Role.KEPT)
    corrupted = int(settings.length * settings.ratio)
    top = candidates(scores, settings)
    important = corrupted // 2 if top else 0
    pool = [place for place in top if place not in links(settings)]
    starts = list(rng.permutation(pool)[: -(-important // (1 + settings.neighbours))])
    if settings.adjacent_starts == 'drop':
        starts = without_adjacent(starts, settings)
    taken = set()
    for place in starts:
        side = temporal_neighbours if rng.random() < 0.5 else spatial_neighbours
        taken.update(side(place, settings))
    taken = list(rng.permutation(sorted(taken - set(starts))).astype(int))
    taken = taken[: important - len(starts)]
    rest = [place for place in by_importance(scores, settings) if place not in top and place not in taken]
    roles[taken] = Role.NEIGHBOUR
    roles[rest[: important - len(starts) - len(taken)]] = Role.FILL
    roles[np.array(starts, int)] = Role.START
    free = [place for place in range(settings.length) if roles[place] == Role.KEPT]
    outside = [place for place in free if place not in top]
    if settings.random_from == 'outside' and len(outside) >= corrupted - important:
        free = outside
    roles[rng.permutation(free)[: corrupted - important]] = Role.RANDOM
    return roles


def random_roles(rng, scores, settings):
    roles = np.full(settings.length, Role.KEPT)
    roles[rng.permutation(settings.length)[: int(settings.length * settings.ratio)]] = Role.START
    return roles


def random_ratio_roles(rng, scores, settings):
    roles = np.full(settings.length, Role.KEPT)
    number = np.ceil(np.cos(np.pi / 2 * rng.random()) * settings.length)
    roles[rng.permutation(settings.length)[: max(1, int(number))]] = Role.START
    return roles


def block_roles(rng, scores, settings):
    roles = np.full(settings.grid, Role.KEPT)
    wanted = int(settings.length * settings.ratio)
    while (missing := wanted - np.count_nonzero(roles)) > 0:
        corner = [rng.integers(length - settings.block + 1) for length in settings.grid]
        covered = np.zeros(settings.grid, bool)
        covered[tuple(slice(place, place + settings.block) for place in corner)] = True
        new = np.flatnonzero(covered.ravel() & (roles.ravel() == Role.KEPT))
        roles.reshape(-1)[new[:missing]] = Role.START
    return roles.ravel()


ORACLES = {
    'hybrid': hybrid_roles,
    'random': random_roles,
    'random_ratio': random_ratio_roles,
    'block': block_roles,
}


# ------------------------------------------------------------------------------------------------ invariants


@st.composite
def valid_settings(draw, strategy='hybrid'):
    depth, width = draw(st.integers(2, 5)), draw(st.integers(2, 5))
    middle = draw(st.lists(st.integers(1, 4), max_size=1))
    settings = Settings(
        grid=(depth, *middle, width),
        codes=CODES,
        strategy=strategy,
        ratio=draw(st.floats(0.1, 1)),
        top_k=draw(st.sampled_from([0, 0.25, 0.3, 0.5, 0.6])),
        neighbours=draw(st.sampled_from([1, 2])),
        neighbour_order=draw(st.sampled_from(['grid', 'raster'])),
        adjacent_starts=draw(st.sampled_from(['keep', 'drop'])),
        random_from=draw(st.sampled_from(['outside', 'anywhere'])),
        keep_slice_links=draw(st.booleans()),
    )
    try:
        settings.check()
    except InputError:
        hypothesis.reject()
    return settings


def few_examples(number):
    return hypothesis.settings(
        max_examples=number,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )


def check_tokens(settings, tokens, result):
    """What each role says has become of its token."""
    roles = result.roles
    assert result.tokens.dtype == np.int32
    assert set(np.unique(roles)) <= set(Role)
    np.testing.assert_array_equal(result.tokens[roles == Role.KEPT], tokens[roles == Role.KEPT])
    assert (result.tokens[np.isin(roles, MASKED)] == settings.codes).all()
    codes = result.tokens[roles == Role.RANDOM]
    assert ((codes >= 0) & (codes < settings.codes)).all()


def check_hybrid_sample(settings, scores, roles):
    """The rules of one sample, place by place."""
    corrupted = int(settings.length * settings.ratio)
    top = candidates(scores, settings)
    important = corrupted // 2 if top else 0
    starts = np.flatnonzero(roles == Role.START)
    assert np.isin(roles, MASKED).sum() == important
    assert (roles == Role.RANDOM).sum() == corrupted - important
    assert set(starts) <= set(top) - links(settings)
    most = -(-important // (1 + settings.neighbours))
    if settings.adjacent_starts == 'keep':
        assert len(starts) == most
    else:
        assert len(starts) <= most
        assert without_adjacent(starts, settings) == list(starts)

    neighbours = set(np.flatnonzero(roles == Role.NEIGHBOUR))
    masked = neighbours | set(starts)
    possible = set()
    trimmed = len(starts) * (1 + settings.neighbours) > important
    for start in starts:
        sides = [set(side(start, settings)) for side in (spatial_neighbours, temporal_neighbours)]
        possible |= sides[0] | sides[1]
        assert trimmed or any(side <= masked for side in sides)
    assert neighbours <= possible
    assert all(0 <= place < settings.length for place in possible)

    fill = set(np.flatnonzero(roles == Role.FILL))
    rest = [place for place in by_importance(scores, settings) if place not in top and place not in neighbours]
    assert fill == set(rest[: len(fill)])
    random = set(np.flatnonzero(roles == Role.RANDOM))
    outside = set(range(settings.length)) - set(top) - masked - fill
    if settings.random_from == 'outside' and len(outside) >= len(random):
        assert random <= outside


def check_batch(settings, tokens, scores, result):
    check_tokens(settings, tokens, result)
    for sample in (*range(CHECKED), *range(BATCH - CHECKED, BATCH)):
        check_hybrid_sample(settings, scores[sample], result.roles[sample])


@few_examples(6)
@hypothesis.given(valid_settings())
def test_hybrid_keeps_every_rule_in_every_sample(settings):
    keys, tokens, scores = make_batch(settings)
    check_batch(settings, tokens, scores, jax.device_get(corrupt(keys, tokens, scores, settings)))


DEFAULT = Settings(grid=(3, 4, 4), codes=CODES)
CHANGES = {
    'default': {},
    'two neighbours': {'neighbours': 2},
    'raster order': {'neighbour_order': 'raster', 'keep_slice_links': False},
    'adjacent starts dropped': {'adjacent_starts': 'drop'},
    'random from anywhere': {'random_from': 'anywhere'},
    'no candidates': {'top_k': 0},
    'half are candidates': {'top_k': 0.5},
    'odd number, trimmed': {'ratio': 0.13},
    'two neighbours, trimmed': {'ratio': 0.17, 'neighbours': 2},
    'starts at the links': {'keep_slice_links': False},
    'random': {'strategy': 'random', 'ratio': 0.3},
    'random ratio': {'strategy': 'random_ratio'},
    'block': {'strategy': 'block'},
}


def option_settings(name):
    settings = dataclasses.replace(DEFAULT, **CHANGES[name])
    settings.check()
    return settings


@pytest.mark.parametrize('name', CHANGES)
def test_every_token_gets_each_role_as_often_as_the_rules_say(name):
    """One vector of scores; for each token how often it got each role, and how many tokens a sample did."""
    settings, calls, oracle_samples = option_settings(name), 4, 1000
    rng = np.random.default_rng(7)
    scores = ((rng.permutation(settings.length) + 1) / (settings.length + 1)).astype(np.float32)
    tokens = rng.integers(0, CODES, (BATCH, settings.length), np.int32)
    many = np.tile(scores, (BATCH, 1))
    results = [
        jax.device_get(corrupt(jax.random.split(jax.random.key(call), BATCH), tokens, many, settings))
        for call in range(calls)
    ]
    check_tokens(settings, tokens, results[0])
    if settings.strategy == 'hybrid':
        check_batch(settings, tokens, many, results[0])
    roles = np.concatenate([result.roles for result in results])
    expected = np.stack([ORACLES[settings.strategy](rng, scores, settings) for _ in range(oracle_samples)])
    chances = [same_chance(roles[:, place], expected[:, place]) for place in range(settings.length)]
    chances += [same_chance((roles == role).sum(1), (expected == role).sum(1)) for role in Role]
    assert min(chances) * len(chances) > 0.001  # of many tests the worst

    codes = np.concatenate([result.tokens[result.roles == Role.RANDOM] for result in results])
    if len(codes):
        assert stats.chisquare(np.bincount(codes, minlength=CODES)).pvalue > 0.001


def same_chance(ours, expected):
    """P-value of a chi-squared test that two samples of whole numbers have one distribution; rare values together."""
    values = np.arange(max(ours.max(), expected.max()) + 1)
    table = np.array([np.bincount(part, minlength=len(values)) for part in (ours, expected)])
    rare = table.sum(0) < 40
    table = np.column_stack([table[:, ~rare], table[:, rare].sum(1)])
    table = table[:, table.sum(0) > 0]
    return stats.chi2_contingency(table).pvalue if table.shape[1] > 1 else 1.0


def test_a_wrong_rule_shows_in_the_frequencies():
    """The test above has the power to tell rules apart that differ for few tokens."""
    rng = np.random.default_rng(0)
    scores = rng.uniform(size=DEFAULT.length)
    one, other = (
        np.stack([hybrid_roles(rng, scores, settings) for _ in range(1000)])
        for settings in (DEFAULT, option_settings('raster order'))
    )
    chances = [same_chance(one[:, place], other[:, place]) for place in range(DEFAULT.length)]
    assert min(chances) * len(chances) < 1e-6


@pytest.mark.parametrize('name', ['default', 'adjacent starts dropped', 'two neighbours, trimmed', 'block'])
def test_a_sample_does_not_depend_on_its_batch(name):
    """Half of the samples again, at other places of a batch and among others."""
    settings = option_settings(name)
    keys, tokens, scores = make_batch(settings, seed=1)
    result = jax.device_get(corrupt(keys, tokens, scores, settings))
    others = make_batch(settings, seed=2)
    place = np.random.default_rng(3).permutation(BATCH)
    again = np.arange(BATCH) < BATCH // 2
    mixed = corrupt(
        jnp.where(again, keys[place], others[0]),
        np.where(again[:, None], tokens[place], others[1]),
        np.where(again[:, None], scores[place], others[2]),
        settings,
    )
    for one, other in zip(result, jax.device_get(mixed), strict=True):
        np.testing.assert_array_equal(one[place][again], other[again])
    assert (result.roles[place][~again] != np.asarray(mixed.roles)[~again]).any()


def test_one_sample_by_itself_is_the_same_as_in_a_batch():
    settings = option_settings('adjacent starts dropped')
    keys, tokens, scores = make_batch(settings)
    result = corrupt(keys, tokens, scores, settings)
    alone = jax.jit(masking.hybrid, static_argnums=3)
    for sample in (0, 5, BATCH - 1):
        for one, many in zip(alone(keys[sample], tokens[sample], scores[sample], settings), result, strict=True):
            np.testing.assert_array_equal(one, many[sample])


def test_counts_are_exact_where_dropping_leaves_few_starts():
    settings = dataclasses.replace(DEFAULT, ratio=0.9, top_k=0.625, adjacent_starts='drop')  # as high as it may be
    settings.check()
    keys, tokens, scores = make_batch(settings)
    result = jax.device_get(corrupt(keys, tokens, scores, settings))
    check_batch(settings, tokens, scores, result)
    assert (np.isin(result.roles, MASKED).sum(1) == settings.important).all()
    assert ((result.roles == Role.RANDOM).sum(1) == settings.corrupted - settings.important).all()


# ---------------------------------------------------------------------------------------------------- pieces


@pytest.mark.parametrize('grid', [(4, 3, 5), (6, 8)])
def test_dropped_starts_are_those_of_the_sequential_rule(grid, monkeypatch):
    """Given the drawn order, of equals the earlier token first."""
    monkeypatch.setattr(masking, '_random_order', lambda turns, shape: turns)
    settings = Settings(grid, CODES, ratio=1.0, adjacent_starts='drop')
    rng, samples = np.random.default_rng(0), 400
    turns = rng.integers(0, [[1000], [6]] * (samples // 2), (samples, settings.length)).astype(np.int32)
    pool = rng.random((samples, settings.length)) < rng.uniform(0.2, 1, (samples, 1))
    ours = jax.jit(jax.vmap(lambda turn, of: masking.draw_starts(turn, of, settings)))(turns, pool)
    for sample, start in enumerate(np.asarray(ours)):
        order = np.argsort(-turns[sample], kind='stable')
        drawn = [place for place in order if pool[sample, place]][: settings.starts]
        assert set(np.flatnonzero(start)) == set(without_adjacent(drawn, settings))


def test_largest_is_a_stable_sort():
    rng, length, samples = np.random.default_rng(0), 37, 300
    high = np.array([2, 9, 2**31 - 1])[np.arange(samples) % 3, None]
    order = rng.integers(0, high, (samples, length), endpoint=True).astype(np.int32)
    order[rng.random(order.shape) < rng.uniform(0, 1, (samples, 1))] = -1
    order[0], order[1], order[2] = 2**31 - 1, 0, -1
    number = rng.integers(0, length + 5, samples).astype(np.int32)
    number[3:9] = 0
    ours = jax.jit(jax.vmap(masking.largest))(order, number)
    for row, wanted, marks in zip(order, number, np.asarray(ours), strict=True):
        best = np.argsort(-row.astype(np.int64), kind='stable')[:wanted]
        assert set(np.flatnonzero(marks)) == {place for place in best if row[place] >= 0}


def test_as_order_keeps_the_order_of_floats():
    rng = np.random.default_rng(0)
    numbers = np.concatenate([rng.normal(size=500) * 10.0 ** rng.integers(-37, 38, 500), [0, 1, -1, 3e38, -3e38]])
    numbers = np.sort(numbers.astype(np.float32))
    order = np.asarray(masking.as_order(jnp.asarray(numbers)))
    assert order.dtype == np.int32
    assert (order >= 0).all()
    apart = np.diff(numbers) > 2e-7 * np.abs(numbers[1:])
    assert (np.diff(order)[apart] > 0).all()
    assert (np.diff(order) >= 0).all()


def test_draw_takes_each_of_a_pool_as_often_as_any_other():
    samples, length, number = 20_000, 64, 20
    pool = np.arange(length) % 4 != 3
    keys = jax.random.split(jax.random.key(0), samples)
    marks = np.asarray(jax.jit(jax.vmap(lambda key: masking.draw(key, pool, number)))(keys))
    assert (marks.sum(1) == number).all()
    assert not marks[:, ~pool].any()
    members = pool.sum()
    chance = number / members
    off = (marks[:, pool].sum(0) - samples * chance) ** 2 / (samples * chance * (1 - chance))
    assert stats.chi2.sf(off.sum() * (members - 1) / members, members - 1) > 0.001  # without replacement


def test_draw_takes_all_of_a_pool_that_is_too_small():
    pool = jnp.arange(9) % 4 == 0
    np.testing.assert_array_equal(masking.draw(jax.random.key(0), pool, 5), pool)


# ------------------------------------------------------------------------------------------ custom strategies


def hide_the_worst(key, tokens, scores, settings):
    worst = masking.largest(masking.as_order(-scores), settings.corrupted)
    return masking.Corruption.of(tokens, settings, start=worst)


@pytest.mark.parametrize('way', ['registered', 'in a module'])
def test_custom_strategies_are_found(way, monkeypatch):
    name = 'worst' if way == 'registered' else 'lab.strategies:hide_the_worst'
    monkeypatch.setattr(masking, 'STRATEGIES', dict(masking.STRATEGIES))
    if way == 'registered':
        assert masking.register(name)(hide_the_worst) is hide_the_worst
    else:
        module = types.ModuleType('lab.strategies')
        module.hide_the_worst = hide_the_worst
        monkeypatch.setitem(sys.modules, 'lab', types.ModuleType('lab'))
        monkeypatch.setitem(sys.modules, 'lab.strategies', module)
    settings = Settings((2, 5), CODES, strategy=name, ratio=0.3)
    settings.check()
    tokens, scores = np.zeros((2, 10), np.int32), np.linspace(0.1, 0.9, 20, dtype=np.float32).reshape(2, 10)
    scores[1] = scores[1, ::-1]
    result = masking.corrupt(jax.random.split(jax.random.key(0), 2), tokens, scores, settings)
    np.testing.assert_array_equal(result.roles, [[Role.START] * 3 + [0] * 7, [0] * 7 + [Role.START] * 3])
    np.testing.assert_array_equal(result.tokens, np.where(result.roles, CODES, 0))


@pytest.mark.parametrize('strategy', ['random', 'random_ratio', 'block'])
def test_strategies_do_not_mind_what_they_do_not_use(strategy):
    dataclasses.replace(DEFAULT, strategy=strategy, top_k=0.001, block=1).check()


def test_earlier_marks_win():
    tokens = jnp.arange(6)
    marks = jnp.tri(4, 6, dtype=bool)  # of token 0 all four, of token 3 the last alone
    result = masking.Corruption.of(tokens, DEFAULT, *marks, codes=tokens + 5)
    np.testing.assert_array_equal(result.roles, [Role.START, Role.NEIGHBOUR, Role.FILL, Role.RANDOM, 0, 0])
    np.testing.assert_array_equal(result.tokens, [CODES, CODES, CODES, 8, 4, 5])


# --------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'ratio': 0.0}, r'ratio=0\.0 \(for 48 tokens\): expected a share from 0\.0209 \(one token\) to 1'),
        ({'ratio': 0.01}, r'ratio=0\.01 .*from 0\.0209'),
        ({'ratio': 1.1}, r'ratio=1\.1 .*to 1$'),
        ({'ratio': float('nan')}, 'ratio=nan '),
        ({'top_k': -0.1}, r'top_k=-0\.1 .*expected 0 \(random codes alone\), or 0\.0209 to 1'),
        ({'top_k': 0.01}, r'top_k=0\.01 .*expected 0 '),
        ({'top_k': 1.5}, r'top_k=1\.5 .*expected 0 '),
        (
            {'top_k': 0.1},
            r'top_k=0\.1 .*4 candidates are too few for 6 starts; set it to 0\.125 or more, or lower .*ratio',
        ),
        ({'top_k': 0.9}, r'top_k=0\.9 .*too few tokens are left outside to fill up 12 .*set it to 0\.875 or less'),
        ({'top_k': 0.82, 'adjacent_starts': 'drop'}, r'top_k=0\.82 .*set it to 0\.7916 or less, or lower .*ratio'),
        ({'neighbours': 0}, r'neighbours=0 .*choose one of 1, 2'),
        ({'neighbours': 3}, r'neighbours=3 .*choose one of 1, 2'),
        ({'neighbour_order': 'snake'}, r"neighbour_order='snake' .*choose one of grid, raster"),
        ({'adjacent_starts': 'maybe'}, r"adjacent_starts='maybe' .*choose one of keep, drop"),
        ({'random_from': 'inside'}, r"random_from='inside' .*choose one of outside, anywhere"),
        (
            {'strategy': 'hybird'},
            r"strategy='hybird': choose one of hybrid, random, random_ratio, block",
        ),
        (
            {'strategy': 'no_such_module:f'},
            r"strategy='no_such_module:f': No module named 'no_such_module'; choose one of",
        ),
        ({'strategy': 'math:no_such'}, r"strategy='math:no_such': .*no attribute 'no_such'; choose one of"),
        ({'strategy': 'math:pi'}, r"strategy='math:pi' is not a function; choose one of"),
        ({'strategy': ':f'}, r"strategy=':f': .*; choose one of"),
        ({'strategy': '.here:f'}, r"strategy='\.here:f': .*; choose one of"),
        ({'strategy': 'block', 'block': 0}, r'block=0 .*expected a side of 1 to 3 tokens'),
        ({'strategy': 'block', 'block': 4}, r'block=4 .*expected a side of 1 to 3 tokens'),
        (
            {'grid': (8, 1, 2), 'ratio': 1.0},
            r'keep_slice_links=True .* 2 tokens besides .*for 4 starts; set it to False, or lower .*ratio',
        ),
        ({'grid': (4, 4, 1)}, r'strategy: a grid of \(4, 4, 1\) tokens has no neighbours along an axis'),
        ({'grid': (1, 4, 4)}, r'strategy: a grid of \(1, 4, 4\) tokens'),
    ],
)
def test_settings_that_cannot_be_followed_are_refused(changes, message):
    with pytest.raises(InputError, match=rf'^config\.masking\.{message}') as refusal:
        dataclasses.replace(DEFAULT, **changes).check()
    assert '\n' not in str(refusal.value)


def raises(key, tokens, scores, settings):
    raise KeyError('importance')


@pytest.mark.parametrize(
    ('strategy', 'message'),
    [
        (raises, "fails with KeyError: 'importance'"),
        (lambda key, tokens: None, r'fails with TypeError: .*positional arguments'),
        (
            lambda key, tokens, scores, settings: tokens if scores[0] > 0 else None,
            'fails with TracerBoolConversionError',
        ),
        (lambda key, tokens, scores, settings: None, 'gives NoneType'),
        (lambda key, tokens, scores, settings: (tokens, tokens), 'gives tuple'),
        (lambda key, tokens, scores, settings: masking.Corruption(tokens, None), 'gives roles of type NoneType'),
        (lambda key, tokens, scores, settings: masking.Corruption(scores, tokens), r'gives tokens float32 \[48\]'),
        (lambda key, tokens, scores, settings: masking.Corruption(tokens, scores > 0), r'gives roles bool \[48\]'),
        (lambda key, tokens, scores, settings: masking.Corruption(tokens[:3], tokens), r'gives tokens int32 \[3\]'),
    ],
)
def test_a_strategy_that_fails_or_gives_something_else_is_told(strategy, message, monkeypatch):
    monkeypatch.setitem(masking.STRATEGIES, 'own', strategy)
    with pytest.raises(
        InputError, match=rf"^config\.masking\.strategy='own' {message}.*; expected of \(key, "
    ) as refusal:
        dataclasses.replace(DEFAULT, strategy='own').check()
    assert '\n' not in str(refusal.value)


def test_a_module_that_fails_is_told(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / 'half_written.py').write_text('def strategy(:')
    with pytest.raises(InputError, match=r"strategy='half_written:strategy': invalid syntax .*; choose one of"):
        dataclasses.replace(DEFAULT, strategy='half_written:strategy').check()


@pytest.mark.parametrize(
    'changes',
    [
        {'ratio': 0.0209},
        {'top_k': 0.0209, 'ratio': 0.1},
        {'top_k': 0.125},
        {'top_k': 0.875},
        {'top_k': 0.7916, 'adjacent_starts': 'drop'},
        {'grid': (8, 1, 2), 'ratio': 1.0, 'keep_slice_links': False},
    ],
)
def test_what_a_refusal_asks_for_is_accepted(changes):
    dataclasses.replace(DEFAULT, **changes).check()


def test_settings_are_read_from_a_config():
    config = ml_collections.ConfigDict({**dataclasses.asdict(DEFAULT), 'ratio': 0.25})
    del config.grid, config.codes
    settings = Settings.read(config, [4, 2, 8], 9)
    assert settings == Settings((4, 2, 8), 9, ratio=0.25)
    assert hash(settings) == hash(Settings((4, 2, 8), 9, ratio=0.25))
    assert (settings.length, settings.corrupted, settings.important, settings.starts) == (64, 16, 8, 4)
