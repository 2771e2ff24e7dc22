"""Which tokens stage 2 must restore: temporal-agnostic hybrid masking, and how to write your own.

A strategy is a pure function of one sample, `(key, tokens, scores, settings) -> Corruption`; `corrupt` maps it over a
batch, and the training step compiles it in. The pieces below work on marks, bool `[L]`, one a token in raster order, so
a strategy reads like its rules:

    @masking.register('worst')
    def worst(key, tokens, scores, settings):
        least_important = masking.largest(masking.as_order(-scores), settings.corrupted)
        return masking.Corruption.of(tokens, settings, start=least_important)

    config.masking.strategy = 'worst'            # or 'my_module:worst', which needs no register

Everything has a fixed shape, and what becomes of a sample depends on its own key, tokens and scores alone.
Source: section 2.5 of the design (the paper's temporal-agnostic masking; block masking as in BEiT, Bao et al. 2022;
shares drawn by a cosine as in MaskGIT, Chang et al. 2022).
"""

import dataclasses
import enum
import importlib
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections

from vqroi_jax.errors import InputError


class Role(enum.IntEnum):
    """What became of a token. `START`, `NEIGHBOUR` and `FILL` are [MASK] now, `RANDOM` is a random code."""

    KEPT = 0
    START = 1
    NEIGHBOUR = 2
    FILL = 3
    RANDOM = 4


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a strategy needs to know; hashable, so that it can be static under `jax.jit`.

    The fields but the first two are those of the block `masking` in `configs/transformer.py`.
    """

    grid: tuple[int, ...]  # of the tokens, two axes or more; the first is that of slices, the last runs along rows
    codes: int  # in the codebook, K; token K is [MASK]
    strategy: str = 'hybrid'  # a registered name, or 'module:function'
    ratio: float = 0.5  # share of the tokens that is corrupted
    top_k: float = 0.25  # share of the tokens, by importance, among which starts are drawn
    neighbours: int = 1  # of each start
    neighbour_order: str = 'grid'  # or 'raster'
    adjacent_starts: str = 'keep'  # or 'drop'
    random_from: str = 'outside'  # or 'anywhere'
    keep_slice_links: bool = True  # the last token of a slice and the first of the next are never starts
    block: int = 2  # side of the blocks of the strategy 'block', in tokens

    @classmethod
    def read(cls, block: ml_collections.ConfigDict, grid: tuple[int, ...], codes: int) -> 'Settings':
        """Settings from the block `masking` of a config; `check` them before use."""
        return cls(tuple(grid), codes, **block)

    @property
    def length(self) -> int:
        """Tokens a sample, L."""
        return math.prod(self.grid)

    @property
    def slice_length(self) -> int:
        """Tokens a slice."""
        return self.length // self.grid[0]

    @property
    def corrupted(self) -> int:
        """Tokens that are corrupted, N = int(L * ratio)."""
        return int(self.length * self.ratio)

    @property
    def candidates(self) -> int:
        """The most important tokens, among which starts are drawn: int(L * top_k)."""
        return int(self.length * self.top_k)

    @property
    def important(self) -> int:
        """Corrupted tokens that become [MASK] for their importance, N1; 0 where there are no candidates."""
        return self.corrupted // 2 if self.candidates else 0

    @property
    def starts(self) -> int:
        """Starts that are drawn: ceil(N1 / (1 + neighbours))."""
        return -(-self.important // (1 + self.neighbours))

    @property
    def fewest_starts(self) -> int:
        """Starts that are left of a draw at least: with `adjacent_starts='drop'` each that stays can drop four."""
        return self.starts if self.adjacent_starts == 'keep' else -(-self.starts // 5)

    def check(self) -> None:
        """Refuses settings that a strategy cannot follow.

        Raises:
            InputError: naming the field of `config.masking` and what would do.
        """
        find_strategy(self.strategy)
        for field, known in (
            ('neighbours', (1, 2)),
            ('neighbour_order', ('grid', 'raster')),
            ('adjacent_starts', ('keep', 'drop')),
            ('random_from', ('outside', 'anywhere')),
        ):
            if getattr(self, field) not in known:
                raise _refusal(self, field, f'choose one of {", ".join(map(str, known))}')
        if not 0 <= self.ratio <= 1 or self.corrupted < 1:
            raise _refusal(self, 'ratio', f'expected a share from {_least_share(1, self.length)} (one token) to 1')
        if self.strategy == 'block' and not 1 <= self.block <= min(self.grid):
            raise _refusal(self, 'block', f'expected a side of 1 to {min(self.grid)} tokens')
        if self.strategy == 'hybrid':
            self._check_hybrid()
        self._check_outcome()

    def _check_hybrid(self) -> None:
        if not 0 <= self.top_k <= 1 or (self.top_k > 0 and not self.candidates):
            raise _refusal(self, 'top_k', f'expected 0 (random codes alone), or {_least_share(1, self.length)} to 1')
        if min(self.grid[0], self.grid[-1]) < 2:
            raise InputError(f'config.masking.strategy: a grid of {self.grid} tokens has no neighbours along an axis')
        between_links = self.length - 2 * (self.grid[0] - 1)
        if self.keep_slice_links and self.starts > between_links:
            raise _refusal(
                self,
                'keep_slice_links',
                f'{between_links} tokens besides the links are too few for {self.starts} starts; set it to False, or '
                'lower config.masking.ratio',
            )
        if self.starts > self.candidates:
            raise _refusal(
                self,
                'top_k',
                f'{self.candidates} candidates are too few for {self.starts} starts; set it to '
                f'{_least_share(self.starts, self.length)} or more, or lower config.masking.ratio',
            )
        most = self.length - (self.important - self.fewest_starts)
        if self.important and self.candidates > most:
            raise _refusal(
                self,
                'top_k',
                f'too few tokens are left outside to fill up {self.important} masked ones; set it to '
                f'{math.floor(1e4 * most / self.length) / 1e4} or less, or lower config.masking.ratio',
            )

    def _check_outcome(self) -> None:
        """Traces the strategy, which may be a user's, and refuses one that fails or gives something else."""
        name = f'config.masking.strategy={self.strategy!r}'
        strategy, key = find_strategy(self.strategy), jax.eval_shape(jax.random.key, 0)
        tokens, scores = (jax.ShapeDtypeStruct((self.length,), dtype) for dtype in (jnp.int32, jnp.float32))
        expected = f'expected of (key, tokens, scores, settings) a Corruption with whole numbers [{self.length}]'
        try:
            found = jax.eval_shape(lambda k, t, s: strategy(k, t, s, self), key, tokens, scores)
        except Exception as error:  # whatever a user's code raises
            reason = str(error).strip().partition('\n')[0]
            raise InputError(f'{name} fails with {type(error).__name__}: {reason}; {expected}') from error
        if not isinstance(found, Corruption):
            raise InputError(f'{name} gives {type(found).__name__}; {expected}')
        for part, array in found._asdict().items():
            if not isinstance(array, jax.ShapeDtypeStruct):
                raise InputError(f'{name} gives {part} of type {type(array).__name__}; {expected}')
            if array.shape != (self.length,) or not jnp.issubdtype(array.dtype, jnp.integer):
                raise InputError(f'{name} gives {part} {array.dtype} {list(array.shape)}; {expected}')


def _refusal(settings: Settings, field: str, expected: str) -> InputError:
    return InputError(f'config.masking.{field}={getattr(settings, field)!r} (for {settings.length} tokens): {expected}')


def _least_share(tokens: int, length: int) -> float:
    """The smallest share with four decimals of a length that makes so many tokens, when it is rounded down."""
    return next(share / 1e4 for share in range(10**4 + 1) if int(length * (share / 1e4)) >= tokens)


class Corruption(NamedTuple):
    """A sample as the network reads it."""

    tokens: jax.Array  # int32 [L]: true, K for [MASK], or a random code
    roles: jax.Array  # int8 [L]: values of `Role`

    @classmethod
    def of(
        cls,
        tokens: jax.Array,
        settings: Settings,
        start: jax.Array,
        neighbour: jax.Array | None = None,
        fill: jax.Array | None = None,
        random: jax.Array | None = None,
        codes: jax.Array | None = None,
    ) -> 'Corruption':
        """Puts marks together: the first three become [MASK].

        Args:
            tokens: int32 `[L]`.
            settings: whose `codes` is [MASK].
            start: bool `[L]`.
            neighbour: bool `[L]`, or None for none; marks of earlier arguments win.
            fill: likewise.
            random: likewise: tokens that become `codes`.
            codes: int32 `[L]`.
        """
        roles = jnp.zeros(tokens.shape, jnp.int8)
        marks = ((Role.RANDOM, random), (Role.FILL, fill), (Role.NEIGHBOUR, neighbour), (Role.START, start))
        for role, where in marks:
            if where is not None:
                roles = jnp.where(where, jnp.int8(role), roles)
        if random is not None:
            assert codes is not None, 'random marks need codes'
            tokens = jnp.where(roles == Role.RANDOM, codes, tokens)
        masked = (roles != Role.KEPT) & (roles != Role.RANDOM)
        return cls(jnp.where(masked, settings.codes, tokens).astype(jnp.int32), roles)


Strategy = Callable[[jax.Array, jax.Array, jax.Array, Settings], Corruption]

STRATEGIES: dict[str, Strategy] = {}


def register(name: str) -> Callable[[Strategy], Strategy]:
    """Decorator: makes a strategy known to `config.masking.strategy` by name."""

    def add(strategy: Strategy) -> Strategy:
        STRATEGIES[name] = strategy
        return strategy

    return add


def find_strategy(name: str) -> Strategy:
    """A registered strategy, or the function of a module: 'module:function'.

    Raises:
        InputError: there is none of that name.
    """
    if name in STRATEGIES:
        return STRATEGIES[name]
    module, colon, function = name.partition(':')
    known = f"choose one of {', '.join(STRATEGIES)}, or write 'module:function'"
    if not colon:
        raise InputError(f'config.masking.strategy={name!r}: {known}')
    try:
        strategy = getattr(importlib.import_module(module), function)
    except Exception as error:  # whatever a user's module raises
        raise InputError(f'config.masking.strategy={name!r}: {error}; {known}') from error
    if not callable(strategy):
        raise InputError(f'config.masking.strategy={name!r} is not a function; {known}')
    return strategy


def corrupt(keys: jax.Array, tokens: jax.Array, scores: jax.Array, settings: Settings) -> Corruption:
    """Corrupts a batch, each sample by itself.

    Args:
        keys: random keys `[B]`.
        tokens: int32 `[B, L]` in [0, K), raster order.
        scores: float32 `[B, L]`, importance in (0, 1).
        settings: checked; static under `jax.jit`.

    Returns:
        Tokens int32 and roles int8, both `[B, L]`.
    """
    strategy = find_strategy(settings.strategy)
    return jax.vmap(lambda key, t, s: strategy(key, t, s, settings))(keys, tokens, scores)


# ------------------------------------------------------------------------------------------------ strategies


@register('hybrid')
def hybrid(key: jax.Array, tokens: jax.Array, scores: jax.Array, settings: Settings) -> Corruption:
    """The paper's: half of the corrupted tokens are important and hidden, half are unimportant and wrong."""
    start_key, trim_key, random_key, bits_key = jax.random.split(key, 4)
    bits = jax.random.bits(bits_key, tokens.shape, jnp.uint32)  # a start's coin or a random code: no token needs both
    order = rank(scores, settings)
    top = largest(order, settings.candidates)
    start = neighbour = fill = jnp.zeros_like(top)
    if settings.important:
        start = draw_starts(start_key, top & ~slice_links(settings), settings)
        neighbour = neighbours_of(start, bits % 2 == 1, settings) & ~start
        if settings.starts * (1 + settings.neighbours) > settings.important:
            excess = _count(start | neighbour) - settings.important
            neighbour &= ~draw(trim_key, neighbour, jnp.maximum(excess, 0))
        short = settings.important - _count(start | neighbour)
        fill = largest(jnp.where(top | neighbour, -1, order), short)
    masked = start | neighbour | fill
    random = draw_random(random_key, top, masked, settings)
    codes = (bits % settings.codes).astype(jnp.int32)
    return Corruption.of(tokens, settings, start, neighbour, fill, random, codes)


@register('random')
def random(key: jax.Array, tokens: jax.Array, scores: jax.Array, settings: Settings) -> Corruption:
    """N tokens drawn uniformly become [MASK]."""
    del scores
    return Corruption.of(tokens, settings, start=draw(key, jnp.ones(tokens.shape, bool), settings.corrupted))


@register('random_ratio')
def random_ratio(key: jax.Array, tokens: jax.Array, scores: jax.Array, settings: Settings) -> Corruption:
    """A share of cos(pi/2 * u), u uniform in [0, 1), becomes [MASK]: at least one token, whatever `ratio` says."""
    del scores
    share_key, key = jax.random.split(key)
    number = jnp.ceil(jnp.cos(jnp.pi / 2 * jax.random.uniform(share_key)) * settings.length)
    number = jnp.clip(number, 1, settings.length).astype(jnp.int32)
    return Corruption.of(tokens, settings, start=draw(key, jnp.ones(tokens.shape, bool), number))


@register('block')
def block(key: jax.Array, tokens: jax.Array, scores: jax.Array, settings: Settings) -> Corruption:
    """Blocks of `block` tokens a side at places drawn uniformly become [MASK] until N are: the last one in part."""
    del scores
    side = settings.block
    fits = tuple(length - side + 1 for length in settings.grid)  # places of a block's first corner
    turns = _random_order(key, fits)
    # Each token's turn is that of the first drawn block that covers it.
    turns = jax.lax.reduce_window(
        turns, jnp.int32(-1), jax.lax.max, (side,) * turns.ndim, (1,) * turns.ndim, [(side - 1, side - 1)] * turns.ndim
    )
    return Corruption.of(tokens, settings, start=largest(turns.reshape(-1), settings.corrupted))


# ------------------------------------------------------------------------------------------------ pieces


def as_order(scores: jax.Array) -> jax.Array:
    """Finite float32 numbers as int32 in [0, 2**31) of the same order, for `largest`; the low bit is lost."""
    bits = jax.lax.bitcast_convert_type(scores.astype(jnp.float32), jnp.uint32)
    ordered = jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))
    return (ordered >> 1).astype(jnp.int32)


def largest(order: jax.Array, number: jax.Array | int) -> jax.Array:
    """Marks the `number` largest of int32 `[L]`, earlier ones first among equals; negative ones are never marked.

    Several times as fast on a CPU as sorting.

    Args:
        order: int32 `[L]`.
        number: of marks; all entries from 0 up, where they are fewer.
    """
    least = _least_of_largest(order, number)
    above, equal = order > least, order == least
    places = jnp.where(equal, len(order) - 1 - jnp.arange(len(order)), -1)  # the earlier, the larger
    return above | (places >= _least_of_largest(places, number - _count(above)))


def _least_of_largest(order: jax.Array, number: jax.Array | int) -> jax.Array:
    """A bound, 0 or more, that `number` entries of int32 `[L]` reach; more do only where equals lie at the bound.

    Found bit by bit, counting how many entries reach it, and no further than need be.
    """

    def going(state):
        step, _, reached = state
        return (step < 31) & (reached != number)

    def next_bit(state):
        step, bound, reached = state
        higher = bound | (jnp.int32(1) << (30 - step))
        count = _count(order >= higher)
        enough = count >= number
        return step + 1, jnp.where(enough, higher, bound), jnp.where(enough, count, reached)

    start = jnp.int32(0), jnp.int32(0), _count(order >= 0)
    return jax.lax.while_loop(going, next_bit, start)[1]


def _count(marks: jax.Array) -> jax.Array:
    """How many marks there are, int32; exact up to 2**24. On a CPU sums of float32 are quicker than of int32."""
    return jnp.sum(marks, dtype=jnp.float32).astype(jnp.int32)


def _random_order(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Random int32 in [0, 2**31)."""
    return (jax.random.bits(key, shape, jnp.uint32) >> 1).astype(jnp.int32)


def draw(key: jax.Array, pool: jax.Array, number: jax.Array | int) -> jax.Array:
    """Marks `number` tokens of a pool, bool `[L]`, each as likely as any other; at most as many as it has."""
    return largest(jnp.where(pool, _random_order(key, pool.shape), -1), number)


def slice_links(settings: Settings) -> jax.Array:
    """Marks the last token of each slice and the first of the next, bool `[L]`; none without `keep_slice_links`."""
    place = jnp.arange(settings.length)
    within = place % settings.slice_length
    inner = (place >= settings.slice_length) & (within == 0)
    inner |= (place < settings.length - settings.slice_length) & (within == settings.slice_length - 1)
    return inner & settings.keep_slice_links


def rank(scores: jax.Array, settings: Settings) -> jax.Array:
    """Importance as int32 `[L]` for `largest`, from scores `[L]` in (0, 1): the links between slices come last."""
    return jnp.where(slice_links(settings), 0, as_order(scores))


def draw_starts(key: jax.Array, pool: jax.Array, settings: Settings) -> jax.Array:
    """Draws the starts from a pool, bool `[L]`; with `adjacent_starts='drop'` without those next to an earlier one.

    Next to: at raster distance 1 or one slice. A start that was dropped drops no others.
    """
    turns = jnp.where(pool, _random_order(key, pool.shape), -1)
    start = largest(turns, settings.starts)
    if settings.adjacent_starts == 'keep':
        return start
    distances = (1, settings.slice_length)

    def next_to(turns):
        """The largest turn next to each token among those before it in the raster, and after it; -1 for none."""
        padded = [jnp.pad(turns, distance, constant_values=-1) for distance in distances]
        before = [part[: -2 * distance] for part, distance in zip(padded, distances, strict=True)]
        after = [part[2 * distance :] for part, distance in zip(padded, distances, strict=True)]
        return jnp.maximum(*before), jnp.maximum(*after)

    def settle(state):
        """Whoever comes before all its undecided neighbours stays, and they go; of equals the earlier one stays."""
        kept, undecided = state
        before, after = next_to(jnp.where(undecided, turns, -1))
        stays = undecided & (turns > before) & (turns >= after)
        beside = jnp.maximum(*next_to(stays.astype(jnp.int32))) > 0
        return kept | stays, undecided & ~stays & ~beside

    return jax.lax.while_loop(lambda state: state[1].any(), settle, (jnp.zeros_like(start), start))[0]


def neighbours_of(start: jax.Array, along_row: jax.Array, settings: Settings) -> jax.Array:
    """Marks the neighbours of each start, bool `[L]`: in its row, or at its place in the slices beside its own.

    One neighbour: the next token, or the one before at the end of the axis. Two: the next and the one before; at an end
    the two nearest inside, if the axis has them. In 'raster' order a slice is one long row.

    Args:
        start: bool `[L]`.
        along_row: bool `[L]`, which of the two; a fair coin of each start.
        settings: how many, and in which order.
    """
    rows = settings.grid if settings.neighbour_order == 'grid' else (settings.grid[0], settings.slice_length)
    marked = jnp.zeros_like(start)
    for chosen, axis in ((start & along_row, -1), (start & ~along_row, 0)):
        marked |= _beside(chosen.reshape(rows), axis, settings.neighbours).reshape(-1)
    return marked


def _beside(marks: jax.Array, axis: int, neighbours: int) -> jax.Array:
    """The neighbours of marks on a grid along an axis."""
    place = jax.lax.broadcasted_iota(jnp.int32, marks.shape, axis % marks.ndim)
    at_start, at_end = marks & (place == 0), marks & (place == marks.shape[axis] - 1)
    result = _shift(marks, axis, 1)
    if neighbours == 1:
        return result | _shift(at_end, axis, -1)
    return result | _shift(marks, axis, -1) | _shift(at_start, axis, 2) | _shift(at_end, axis, -2)


def _shift(marks: jax.Array, axis: int, by: int) -> jax.Array:
    """Moves marks along an axis; those that leave the grid are gone."""
    length = marks.shape[axis]
    if abs(by) >= length:
        return jnp.zeros_like(marks)
    widths = [(0, 0)] * marks.ndim
    widths[axis] = (max(by, 0), max(-by, 0))
    return jax.lax.slice_in_dim(jnp.pad(marks, widths), max(-by, 0), max(-by, 0) + length, axis=axis % marks.ndim)


def draw_random(key: jax.Array, top: jax.Array, masked: jax.Array, settings: Settings) -> jax.Array:
    """Draws the N2 = N - N1 tokens that become random codes, bool `[L]`.

    Uniformly from those that are neither masked nor among the candidates; with `random_from='anywhere'`, or where
    those are too few, from all that are not masked.

    Args:
        key: of the draw.
        top: bool `[L]`, the candidates.
        masked: bool `[L]`.
        settings: how many, and from where.
    """
    number, free = settings.corrupted - settings.important, ~masked
    outside = free & ~top
    if settings.random_from == 'outside':
        free = jnp.where(_count(outside) >= number, outside, free)
    return draw(key, free, number)
