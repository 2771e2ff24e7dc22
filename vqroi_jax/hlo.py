"""What a compiled program does, read from its text: products, memory traffic and collectives, loops counted in full.

And in which names of the source its instructions were traced.

XLA's own cost analysis counts the body of a loop once, however often it runs, and says nothing of collectives. Here the
text of the scheduled module (`jax.stages.Compiled.as_text()`) is walked from its entry: a loop's body counts as often
as it runs, of a fusion what enters and leaves it, and of the branches of a conditional the most expensive. It is the
text of one device's program, so all numbers are per device. Nothing is known of custom calls, which count nothing.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Mapping

COLLECTIVES = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute', 'collective-broadcast')

_FREE = {  # moves nothing, or is counted where it starts
    'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'after-all', 'partition-id', 'replica-id',
    'opt-barrier', 'add-dependency', 'domain', 'copy-done', 'async-update', 'async-done', 'custom-call',
}  # fmt: skip
_BYTES = {'pred': 1, 'token': 0, 'opaque': 0, 's4': 0.5, 'u4': 0.5}  # of a number; others by the digits in their name
_SHAPE = re.compile(r'([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?')


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of exchange between devices.

    Attributes:
        kind: such as 'all-reduce'.
        group: devices that take part in each.
        count: how often it happens when the program runs once.
        size: bytes in all of what is exchanged, on one device: the whole array, gathered or before it is scattered.
    """

    kind: str
    group: int
    count: int
    size: float

    @property
    def sent(self) -> float:
        """Bytes that a device sends at least, in a ring (Thakur et al. 2005, sections 3.1 and 3.5)."""
        if self.kind in ('collective-permute', 'collective-broadcast'):
            return self.size if self.group > 1 else 0.0
        return (2 if self.kind == 'all-reduce' else 1) * self.size * (self.group - 1) / self.group


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a device does when the program runs once.

    Attributes:
        flops: of matrix products and convolutions, two a multiplication; zeros of paddings and dilations do not count.
        bytes: to and from the device's main memory, if what is not fused goes through it; tiles as they are padded.
        cycles: the TPU compiler's own estimate; 0 where it makes none.
        collectives: by kind and group.
        open_loops: loops that run an unknown number of times, and were counted once.
    """

    flops: float = 0.0
    bytes: float = 0.0
    cycles: float = 0.0
    collectives: tuple[Collective, ...] = ()
    open_loops: int = 0

    def __add__(self, other: 'Cost') -> 'Cost':
        return Cost(
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.cycles + other.cycles,
            _merge((*self.collectives, *other.collectives)),
            self.open_loops + other.open_loops,
        )

    def times(self, number: int) -> 'Cost':
        """The cost of running it so often."""
        collectives = tuple(
            dataclasses.replace(one, count=one.count * number, size=one.size * number) for one in self.collectives
        )
        return Cost(self.flops * number, self.bytes * number, self.cycles * number, collectives, self.open_loops)

    @property
    def sent(self) -> float:
        """Bytes that a device sends to others at least."""
        return sum(one.sent for one in self.collectives)


def read_cost(text: str) -> Cost:
    """The cost of a compiled program.

    Args:
        text: of the scheduled module, as `jax.stages.Compiled.as_text()` gives it.

    Raises:
        ValueError: there is no entry computation in it, or an instruction lacks what its opcode needs.
    """
    return _Module(_computations(text)).cost(_ENTRY)


def operation_names(text: str) -> dict[str, str]:
    """The names in which a compiled program's instructions were traced, such as 'jit(step)/jvp(VQGAN)/encoder/conv_0'.

    XLA drops some, of products that it leaves to a library above all: those have that of the loop or call they are in.

    Args:
        text: of the scheduled module, as `jax.stages.Compiled.as_text()` gives it.

    Returns:
        By instruction; '' where nothing around it has a name either.

    Raises:
        ValueError: there is no entry computation in it.
    """
    computations, names = _computations(text), {}

    def walk(computation: str, around: str) -> None:
        for one in computations[computation].values():
            named = re.search(r'\bop_name="([^"]*)"', one.attributes)
            names[one.name] = named[1] if named else around
            for called in re.findall(r'%([\w.\-]+)', one.attributes):
                if called in computations:
                    walk(called, names[one.name])

    walk(_ENTRY, '')
    return names


_ENTRY = 'ENTRY'


@dataclasses.dataclass(frozen=True)
class _Shape:
    kind: str
    sides: tuple[int, ...]
    layout: str  # what stands in the braces

    @property
    def bytes(self) -> float:
        """Bytes in main memory: 0 for what lives in another."""
        return 0.0 if re.search(r'S\([1-9]\d*\)', self.layout) else self.size

    @functools.cached_property
    def size(self) -> float:
        """Bytes, tiles padded."""
        number = _BYTES.get(self.kind)
        if number is None:
            number = int(_found(r'\d+', self.kind)[0]) / 8
        order, _, tiling = self.layout.partition(':')
        sides = [self.sides[int(axis)] for axis in order.split(',')] if order else []  # the innermost first
        sides = sides if len(sides) == len(self.sides) else list(self.sides[::-1])
        if tile := re.match(r'T\(([\d,]+)\)', tiling):
            steps = [int(step) for step in tile[1].split(',')][::-1]
            for axis, step in enumerate(steps[: len(sides)]):
                sides[axis] = -(-sides[axis] // step) * step
        return math.prod(sides) * number


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shapes: tuple[_Shape, ...]  # one, or a tuple's
    opcode: str
    arguments: str  # within the parentheses
    attributes: str  # after them
    root: bool  # of its computation

    @functools.cached_property
    def operands(self) -> list[str]:
        return re.findall(r'%([\w.\-]+)', self.arguments)

    def called(self, attribute: str) -> str:
        return _found(rf'\b{attribute}=%?([\w.\-]+)', self.attributes)[1]

    @property
    def bytes(self) -> float:
        return sum(shape.bytes for shape in self.shapes)


_Computation = dict[str, _Instruction]  # by name, in order


def _computations(text: str) -> dict[str, _Computation]:
    """All computations of a module by name; the entry's is `_ENTRY`."""
    found: dict[str, _Computation] = {}
    current: _Computation | None = None
    for line in text.splitlines():
        if current is None:
            header = re.match(r'(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$', line)
            if header:
                current = found.setdefault(_ENTRY if header[1] else header[2], {})
        elif line.startswith('}'):
            current = None
        elif instruction := _instruction(line):
            current[instruction.name] = instruction
    if _ENTRY not in found:
        raise ValueError('the text holds no entry computation')
    return found


def _instruction(line: str) -> _Instruction | None:
    head = re.match(r'\s+(ROOT )?%?([\w.\-]+) = ', line)
    if not head:
        return None
    rest = line[head.end() :]
    end = _closing(rest) + 1 if rest.startswith('(') else rest.index(' ')
    opcode = _found(r'\A ?([\w\-]+)', rest[end:])
    start = end + opcode.end()
    stop = start + _closing(rest[start:])
    shapes = tuple(
        _Shape(kind, tuple(int(side) for side in sides.split(',') if side), layout)
        for kind, sides, layout in _SHAPE.findall(rest[:end])
    )
    return _Instruction(head[2], shapes, opcode[1], rest[start + 1 : stop], rest[stop + 1 :], bool(head[1]))


def _found(pattern: str, text: str) -> re.Match[str]:
    """Where a pattern first occurs in a text that always holds it."""
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f'expected {pattern} in: {text[:80]}')
    return found


def _closing(text: str) -> int:
    """Where the parenthesis that `text` begins with is closed."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == '(') - (letter == ')')
        if not depth:
            return place
    raise ValueError(f'a parenthesis is never closed: {text[:80]}')


@dataclasses.dataclass
class _Module:
    computations: Mapping[str, _Computation]
    known: dict[str, Cost] = dataclasses.field(default_factory=dict)

    def cost(self, name: str) -> Cost:
        """Of a computation that is not fused."""
        if name not in self.known:
            computation = self.computations[name]
            self.known[name] = sum((self._one(one, computation) for one in computation.values()), Cost())
        return self.known[name]

    def _one(self, one: _Instruction, inside: _Computation) -> Cost:
        kind = one.opcode.removesuffix('-start')
        if kind in COLLECTIVES:
            return Cost(bytes=self._traffic(one, inside), collectives=(_collective(one, kind, inside),))
        if one.opcode in _FREE or one.opcode.endswith('-done'):
            return Cost()
        if one.opcode == 'while':
            trips = self._trips(one, inside)
            cost = (self.cost(one.called('body')) + self.cost(one.called('condition'))).times(trips or 1)
            return cost if trips is not None else cost + Cost(open_loops=1)
        if one.opcode == 'conditional':
            branches = re.search(r'branch_computations=\{([^}]*)\}', one.attributes)
            names = re.findall(r'[\w.\-]+', branches[1]) if branches else _branches(one)
            return max((self.cost(name) for name in names), key=lambda cost: (cost.flops, cost.bytes))
        if one.opcode in ('call', 'async-start'):
            return self.cost(one.called('to_apply' if one.opcode == 'call' else 'calls'))
        cycles = re.search(r'"estimated_cycles":"(\d+)"', one.attributes)
        cost = Cost(_flops(one, inside), self._traffic(one, inside), float(cycles[1]) if cycles else 0.0)
        if one.opcode == 'fusion':
            within = self._fused(one.called('calls'))
            cost += Cost(flops=within.flops, collectives=within.collectives)
        return cost

    def _fused(self, name: str) -> Cost:
        """Products and collectives within a fusion."""
        inside, total = self.computations[name], Cost()
        for one in inside.values():
            kind = one.opcode.removesuffix('-start')
            total += Cost(_flops(one, inside))
            if kind in COLLECTIVES:
                total += Cost(collectives=(_collective(one, kind, inside),))
            if one.opcode == 'fusion':
                total += self._fused(one.called('calls'))
        return total

    def _traffic(self, one: _Instruction, inside: _Computation) -> float:
        """Bytes read and written by an instruction that is not fused."""
        operands = [inside[name] for name in one.operands if name in inside]
        if one.opcode == 'fusion':
            return self._fusion_traffic(one, operands)
        if one.opcode in ('dynamic-slice', 'gather', 'slice', 'slice-start'):
            (result,) = one.shapes[1:2] or one.shapes  # of an asynchronous one, its source comes first
            return (result.size if operands[0].bytes else 0.0) + result.bytes
        if one.opcode == 'dynamic-update-slice':
            return 2 * operands[1].bytes
        if one.opcode == 'copy-start':
            return operands[0].bytes + one.shapes[0].bytes
        if one.opcode.endswith('-start'):  # of an exchange, whose result repeats its operands
            return 2 * sum(operand.bytes for operand in operands)
        return one.bytes + sum(operand.bytes for operand in operands)

    def _fusion_traffic(self, one: _Instruction, operands: list[_Instruction]) -> float:
        inside = self.computations[one.called('calls')]
        total = 0.0
        for parameter in inside.values():
            if parameter.opcode == 'parameter':
                number = int(parameter.arguments)
                total += min(self._read(parameter.name, inside), operands[number].bytes)
        root = _root(inside)
        for result in [inside[name] for name in root.operands] if root.opcode == 'tuple' else [root]:
            total += self._written(result, inside)
        return total

    def _read(self, name: str, inside: _Computation) -> float:
        """Bytes that a fusion reads of one of its parameters: of one that is only sliced, the slices."""
        total = 0.0
        for user in inside.values():
            if name not in user.operands:
                continue
            if user.opcode in ('dynamic-slice', 'slice', 'gather') and user.operands[0] == name:
                total += user.bytes
            elif user.opcode == 'dynamic-update-slice' and user.operands[0] == name:
                continue
            elif user.opcode == 'bitcast':
                total += self._read(user.name, inside)
            elif user.opcode == 'fusion':
                deeper = self.computations[user.called('calls')]
                number = user.operands.index(name)
                parameter = next(p for p in deeper.values() if p.opcode == 'parameter' and int(p.arguments) == number)
                total += self._read(parameter.name, deeper)
            else:
                return inside[name].bytes
        return total

    def _written(self, result: _Instruction, inside: _Computation) -> float:
        """Bytes that a fusion writes of one of its results: of one that is only updated, the update."""
        while result.opcode == 'bitcast' and result.operands[0] in inside:
            whole, result = result, inside[result.operands[0]]
            if result.opcode not in ('bitcast', 'dynamic-update-slice'):
                return whole.bytes
        if result.opcode == 'dynamic-update-slice':
            return min(result.bytes, inside[result.operands[1]].bytes)
        return result.bytes

    def _trips(self, loop: _Instruction, inside: _Computation) -> int | None:
        """How often a loop runs whose counter goes up by a constant to a constant; None for any other."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
            return int(known[1])
        body, condition = (self.computations[loop.called(name)] for name in ('body', 'condition'))
        compare = self._binary(_root(condition), condition)
        start, end = inside[loop.operands[0]], _root(body)
        if not compare or start.opcode != 'tuple' or end.opcode != 'tuple':
            return None
        test, counter, limit = compare
        if test.opcode != 'compare' or 'direction=LT' not in test.attributes or counter.opcode != 'get-tuple-element':
            return None
        step = self._binary(body[end.operands[_index(counter)]], body)
        if not step or step[0].opcode != 'add':
            return None
        steps = [_constant(side) for side in step[1:] if side.opcode == 'constant']
        if limit.opcode == 'get-tuple-element':  # that the loop is given and passes on
            limit = _origin(inside[start.operands[_index(limit)]], inside)
        first = _constant(_origin(inside[start.operands[_index(counter)]], inside))
        last = _constant(limit)
        by = steps[0] if len(steps) == 1 else None
        if first is None or last is None or by is None or by < 1:
            return None
        return max(-((first - last) // by), 0)

    def _binary(
        self, one: _Instruction, inside: _Computation
    ) -> tuple[_Instruction, _Instruction, _Instruction] | None:
        """An operation, or the one that a fusion ends with, and where its two operands come from; None if not two."""
        one = _origin(one, inside)
        within = self.computations[one.called('calls')] if one.opcode == 'fusion' else inside
        operation = _root(within) if one.opcode == 'fusion' else one
        if len(operation.operands) != 2:
            return None
        left, right = (_origin(within[name], within) for name in operation.operands)
        if one.opcode == 'fusion':
            left, right = (
                _origin(inside[one.operands[int(side.arguments)]], inside) if side.opcode == 'parameter' else side
                for side in (left, right)
            )
        return operation, left, right


def _root(computation: _Computation) -> _Instruction:
    return next(one for one in computation.values() if one.root)


def _index(one: _Instruction) -> int:
    return int(_found(r'index=(\d+)', one.attributes)[1])


def _constant(one: _Instruction) -> int | None:
    whole = one.opcode == 'constant' and re.fullmatch(r'-?\d+', one.arguments)
    return int(one.arguments) if whole else None


def _origin(one: _Instruction, inside: _Computation) -> _Instruction:
    while one.opcode in ('copy', 'bitcast', 'convert') and one.operands and one.operands[0] in inside:
        one = inside[one.operands[0]]
    return one


def _branches(one: _Instruction) -> list[str]:
    return [one.called('true_computation'), one.called('false_computation')]


def _flops(one: _Instruction, inside: _Computation) -> float:
    if one.opcode == 'dot':
        left = inside[one.operands[0]].shapes[0].sides
        contracted = _found(r'lhs_contracting_dims=\{([\d,]*)\}', one.attributes)[1]
        return (
            2.0 * math.prod(one.shapes[0].sides) * math.prod(left[int(axis)] for axis in contracted.split(',') if axis)
        )
    if one.opcode == 'convolution':
        return _convolution_flops(one, inside)
    return 0.0


def _convolution_flops(one: _Instruction, inside: _Computation) -> float:
    """Twice the products of numbers that are there: positions in the padding or between dilated ones do not count."""
    left, right = (inside[name].shapes[0].sides for name in one.operands[:2])
    labels = _found(r'dim_labels=(\w+)_(\w+)->(\w+)', one.attributes)
    result = one.shapes[0].sides
    window = re.search(r'window=\{([^}]*)\}', one.attributes)
    fields = dict(field.split('=') for field in window[1].split()) if window else {}
    axes = sorted(letter for letter in labels[3] if letter.isdigit())

    def of(name: str, default: str) -> list[str]:
        return fields[name].split('x') if name in fields else [default] * len(axes)

    pairs = 1
    for number, axis in enumerate(axes):
        size, stride = int(of('size', '1')[number]), int(of('stride', '1')[number])
        low = int(of('pad', '0_0')[number].split('_')[0])
        step, spread = int(of('lhs_dilate', '1')[number]), int(of('rhs_dilate', '1')[number])
        reach = (left[labels[1].index(axis)] - 1) * step + 1
        pairs *= sum(
            0 <= place < reach and place % step == 0
            for out in range(result[labels[3].index(axis)])
            for place in range(out * stride - low, out * stride - low + size * spread, spread)
        )
    groups = re.search(r'batch_group_count=(\d+)', one.attributes)
    batch = left[labels[1].index('b')] / (int(groups[1]) if groups else 1)
    return 2.0 * batch * right[labels[2].index('i')] * result[labels[3].index('f')] * pairs


def _collective(one: _Instruction, kind: str, inside: _Computation) -> Collective:
    operands = sum(_logical(inside[name]) for name in one.operands if name in inside)
    results = _logical(one) - (operands if one.opcode == 'all-gather-start' else 0)
    size = results if kind == 'all-gather' else operands
    return Collective(kind, _group(one.attributes), 1, size)


def _logical(one: _Instruction) -> float:
    """Bytes of an instruction's result wherever it lives, without padding."""
    return sum(dataclasses.replace(shape, layout='').bytes for shape in one.shapes)


def _group(attributes: str) -> int:
    """Devices that exchange with one another, in each of the ways in which XLA writes groups down."""
    if found := re.search(r'replica_groups=\{\{([\d,]*)\}', attributes):
        return found[1].count(',') + 1
    if found := re.search(r'replica_groups=\[\d+,(\d+)\]', attributes):
        return int(found[1])
    if found := re.search(r'replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}', attributes):
        sides = {name: int(side) for name, side in re.findall(r"'([^']*)'=(\d+)", found[1])}
        return math.prod(sides[name] for name in re.findall(r"'([^']*)'", found[2]))
    if found := re.search(r'source_target_pairs=\{(.*?)\}\}', attributes):
        return len(set(re.findall(r'\d+', found[1])))
    return 1


def _merge(collectives: Iterable[Collective]) -> tuple[Collective, ...]:
    merged: dict[tuple[str, int], Collective] = {}
    for one in collectives:
        before = merged.get((one.kind, one.group))
        merged[one.kind, one.group] = (
            dataclasses.replace(one, count=before.count + one.count, size=before.size + one.size) if before else one
        )
    return tuple(merged[key] for key in sorted(merged))
