"""The command `plan`: compiles a run's real step for a machine that is not there, and reads off what it will need.

config of a stage -> its jitted step, with shapes in place of arrays -> compiled for the target -> memory, operations,
traffic and exchanges of one chip -> the largest batch that fits, and the least time that the run can take
"""

import json
from pathlib import Path
from typing import Any

import jax
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from vqroi_jax import hlo, viz
from vqroi_jax.errors import InputError, check_fields
from vqroi_jax.planner import REMATS, Compiled, Planner, Search, drawing_bytes
from vqroi_jax.targets import GIB, MIB, Chip, find_target
from vqroi_jax.training.durations import to_steps
from vqroi_jax.workdir import open_workdir, write_atomically

PLAN_FILE = 'plan.json'


def run(config: ConfigDict, workdir: str | Path) -> None:
    """Runs `--config=configs/plan.py`."""
    jax.config.update('jax_platforms', 'cpu')  # an accelerator that is there may be busy, and is not needed
    with open_workdir(workdir, config) as folder:
        make_plan(config, folder)


def make_plan(config: ConfigDict, folder: Path) -> dict[str, Any]:
    """Compiles, measures and searches in an opened workdir; prints and saves the plan, and returns it.

    Args:
        config: as `configs/plan.py` has it.
        folder: where `plan.json`, `figures/plan.png` and what was compiled are kept.

    Raises:
        InputError: a setting cannot be used, the stage's included; before anything is compiled.
    """
    check(config)
    planner = Planner(config, find_target(config.target), folder)
    compiled, rows = [], planner.configured()
    if rows is None and not config.search:
        raise InputError(planner.indivisible())
    if rows is None:
        print(f'note: {planner.indivisible()}, so that batch is not compiled')
    else:
        compiled.append(planner.compile(rows, planner.own_remat))
    searches = [planner.search(remat) for remat in planner.remats] if config.search else []
    compiled += [one for search in searches for one in search.compiled if one not in compiled]
    if rows is not None:
        compiled += planner.others(rows, planner.own_remat)
    plan = describe(planner, compiled, searches)
    write_atomically(folder / PLAN_FILE, json.dumps(plan, indent=2) + '\n')
    viz.save_figure(draw(plan), folder / 'figures' / 'plan.png')
    print(report(plan))
    print(f'All of it is in {folder / PLAN_FILE} and {folder / "figures" / "plan.png"}.')
    return plan


def check(config: ConfigDict) -> None:
    """Refuses settings that no plan can be made of.

    Raises:
        InputError: naming the field and what would do.
    """
    if config.stage not in REMATS:
        raise InputError(f'config.stage={config.stage!r}: choose one of {", ".join(REMATS)}')
    for block, names in (
        ('cohort', ('rois', 'classes')),
        ('vqgan', ('batch_size', 'micro_batches')),
        ('transformer', ('batch_size', 'micro_batches')),
        ('generate', ('number',)),
    ):
        settings = config[block]
        check_fields(f'config.{block}', settings, [(name, settings[name] >= 1, '1 or more') for name in names])
    if not 0 <= config.margin < 1:
        raise InputError(f'config.margin={config.margin}: expected a share from 0 to below 1')
    for remat in config.remat:
        if remat not in REMATS[config.stage]:
            known = ', '.join(filter(None, REMATS[config.stage])) or 'none at all'
            raise InputError(f'config.remat: {remat!r} is no setting of the stage {config.stage}, which has {known}')


def least_seconds(cost: hlo.Cost, chip: Chip) -> dict[str, float]:
    """What a chip takes at least for each part of a program, if it did nothing else, and at its makers' figures.

    A roofline (Williams et al. 2009): a program takes at least the largest of these.

    Args:
        cost: of the program.
        chip: to run it.

    Returns:
        Seconds for `products`, `memory` and `links`.
    """
    return {
        'products': cost.flops / chip.flops,
        'memory': cost.bytes / chip.bandwidth,
        'links': cost.sent / chip.links,
    }


def describe(planner: Planner, compiled: list[Compiled], searches: list[Search]) -> dict[str, Any]:
    """The plan as plain values: sizes in bytes, times in seconds, all of one chip."""
    config, target, chip = planner.config, planner.target, planner.target.chip
    rows = []
    for one in compiled:
        row = one.to_json() | {'total': one.total, 'batch_size': planner.batch_size(one.rows)}
        if chip and one.fits:
            seconds = least_seconds(one.cost, chip)
            if target.platform == 'cuda':  # traffic is the CPU's program's, so no bound
                del seconds['memory']
            row['least_seconds'] = seconds
            estimate = one.cost.cycles / chip.clock if chip.clock and one.cost.cycles else None
            calls, unit = _calls(planner, one)
            row['estimated_seconds'] = estimate
            row['run'] = {
                unit: calls,
                'least_days': calls * max(seconds.values()) / 86400,
                'estimated_days': calls * estimate / 86400 if estimate else None,
            }
        rows.append(row)
    return {
        'stage': config.stage,
        'dtype': config['transformer' if config.stage == 'generate' else config.stage].dtype,
        'target': target.name,
        'measured_on': target.platform if target.platform != 'cuda' else 'cpu',
        'chips': planner.chips,
        'groups': planner.groups,
        'chip': vars(chip) if chip else None,
        'memory': target.memory,
        'drawing': drawing_bytes(config, planner.mesh) if config.stage == 'transformer' else None,
        'versions': target.versions,
        'compiled': rows,
        'search': [
            {
                'remat': one.remat,
                'fixed': one.fixed,
                'each': one.each,
                'largest': one.largest,
                'capped': one.capped,
            }
            for one in searches
        ],
    }


def _calls(planner: Planner, one: Compiled) -> tuple[float, str]:
    """How often the run calls the program, and what a call is."""
    config, batch = planner.config, planner.batch_size(one.rows)
    if config.stage == 'generate':
        classes = len(config.generate.classes) or config.cohort.classes
        return classes * -(-config.generate.number // batch), 'calls'
    stage = config[config.stage]
    steps_per_epoch = config.cohort.rois / batch
    return to_steps(stage.training.duration, steps_per_epoch, f'config.{config.stage}.training.duration', 1), 'steps'


def report(plan: dict[str, Any]) -> str:
    """The plan as text: a table of what was compiled, what fits, and what chips exchange."""
    chip, rows = plan['chip'], plan['compiled']
    lines = [
        f'{plan["stage"]} in {plan["dtype"]} on {plan["target"]}: {_devices(plan["chips"])}'
        f'{", each" if plan["chips"] > 1 else ""} with {plan["memory"] / GIB:.3g} GiB of memory'
    ]
    if chip:
        lines.append(
            f'At most {chip["flops"] / 1e12:.0f} TFLOP/s (bfloat16), {chip["bandwidth"] / 1e9:.0f} GB/s of memory and '
            f'{chip["links"] / 1e9:.0f} GB/s to other chips ({chip["source"]}).'
        )
    columns = [name for name in _COLUMNS if chip or name not in _NEED_A_CHIP]
    size, unit = _unit(rows)
    titles = [f'{unit} in all' if name == 'in all' else name for name in columns]
    table = [titles, *([_cells(row, size)[name] for name in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines += ['  '.join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
    lines += [_search_line(one, plan['groups'], size, unit) for one in plan['search']]
    lines += [
        f'{_name(row)}: {one["kind"]} over {_devices(one["group"])}, {one["count"]} times, {one["size"] / 1e6:.3g} MB'
        for row in rows
        for one in row['cost']['collectives']
    ]
    if plan['drawing']:
        lines.append(
            f'While samples are drawn for figures, each device holds {plan["drawing"] / size:.3g} {unit} of parameters '
            'beside the arguments, in place of the temporaries.'
        )
    if any(row['fits'] and not row['cost']['flops'] for row in rows):
        lines.append('Where TFLOP is 0, the compiler has made sums of all products, as of a single row: none counts.')
    if loops := max(row['cost']['open_loops'] for row in rows):
        lines.append(f'Up to {loops} loop(s) in each program run until their data say so, and are counted once.')
    if _borrowed(plan):
        lines.append(
            "Lowered for the GPU; operations (of 3D convolutions fewer), memory and traffic are those of the CPU's "
            "program, and differ from a GPU's."
        )
    if chip:
        lines.append(
            'Least times are bounds: the longest of what products, memory and links alone would take at the figures '
            'above. Real steps take longer.'
        )
        if any(row.get('estimated_seconds') for row in rows):
            lines.append("The estimate is the TPU compiler's own, of cycles, exchanges not among them.")
    return '\n'.join(lines)


_COLUMNS = (
    'program', 'remat', 'a chip', 'batch', 'arguments', 'temporaries', 'other', 'in all', 'TFLOP', 'GB moved',
    'MB sent', 'least s', 'bound by', 'estimated s', 'least days', 'estimated days',
)  # fmt: skip
_NEED_A_CHIP = ('least s', 'bound by', 'estimated s', 'least days', 'estimated days')


def _name(row: dict[str, Any]) -> str:
    remat = f'remat {row["remat"]}' if row['remat'] else ''
    return ', '.join(filter(None, (row['program'], remat, f'{row["rows"]} a chip')))


def _devices(number: int) -> str:
    return '1 device' if number == 1 else f'{number} devices'


_OF_A_CPU = ", by a CPU's program"


def _borrowed(plan: dict[str, Any]) -> bool:
    """Whether what is told of a GPU is that of a CPU's program."""
    return plan['measured_on'] == 'cpu' and bool(plan['chip'])


def _unit(rows: list[dict[str, Any]]) -> tuple[float, str]:
    """Bytes and name of the unit that memory is told in: GiB, or MiB if no compilation needs one GiB."""
    return (GIB, 'GiB') if max(row['total'] for row in rows) >= GIB else (MIB, 'MiB')


def _cells(row: dict[str, Any], size: float) -> dict[str, str]:
    """A compilation as the table has it, memory in units of `size` bytes: texts by column."""
    cells = dict.fromkeys(_COLUMNS, '') | {
        'program': row['program'],
        'remat': row['remat'] or '-',
        'a chip': str(row['rows']),
        'batch': str(row['batch_size']),
        'in all': f'{row["total"] / size:.3g}' + ('' if row['fits'] else ' (too much)'),
    }
    if not row['fits']:
        return cells
    memory, cost = row['memory'], row['cost']
    rest = row['total'] - memory['arguments'] - memory['temporaries']
    sent = sum(hlo.Collective(**one).sent for one in cost['collectives'])
    cells |= {
        'arguments': f'{memory["arguments"] / size:.3g}',
        'temporaries': f'{memory["temporaries"] / size:.3g}',
        'other': f'{rest / size:.3g}',
        'TFLOP': f'{cost["flops"] / 1e12:.3g}',
        'GB moved': f'{cost["bytes"] / 1e9:.3g}',
        'MB sent': f'{sent / 1e6:.3g}',
    }
    if 'least_seconds' in row:
        bound, estimate = max(row['least_seconds'], key=row['least_seconds'].get), row['estimated_seconds']
        cells |= {
            'least s': f'{row["least_seconds"][bound]:.3g}',
            'bound by': bound,
            'estimated s': f'{estimate:.3g}' if estimate else '-',
            'least days': f'{row["run"]["least_days"]:.3g}',
            'estimated days': f'{row["run"]["estimated_days"]:.3g}' if estimate else '-',
        }
    return cells


def _search_line(one: dict[str, Any], groups: int, size: float, unit: str) -> str:
    """What the search for the largest batch has found."""
    kind = f'remat {one["remat"]}: ' if one['remat'] else ''
    line = f'{one["fixed"] / size:.3g} {unit} and {one["each"] / size:.3g} {unit} for each of them'
    if not one['largest']:
        return f'{kind}not even one a chip fits'
    end = ', as many as there are' if one['capped'] else ''
    return f'{kind}up to {one["largest"]} a chip fit, a batch of {one["largest"] * groups}{end}; about {line}'


def draw(plan: dict[str, Any]) -> Figure:
    """Memory by kind, and the least times, of all that was compiled."""
    rows = plan['compiled']
    size, unit = _unit(rows)
    kinds = ('arguments', 'temporaries', 'other')
    memory: dict[str, list[float]] = {kind: [] for kind in (*kinds, 'does not fit')}
    for row in rows:
        parts = {kind: row['memory'].get(kind, 0.0) for kind in kinds[:2]}
        rest = row['total'] - sum(parts.values())
        parts |= {'other': rest, 'does not fit': 0.0} if row['fits'] else {'other': 0.0, 'does not fit': rest}
        for kind, part in parts.items():
            memory[kind].append(part / size)
    seconds = {
        label: [row.get('least_seconds', {}).get(part, 0.0) for row in rows]
        for part, label in (('products', 'products'), ('memory', 'memory traffic'), ('links', 'exchanges'))
    }
    devices = f'one of {plan["chips"]} devices' if plan['chips'] > 1 else '1 device'
    return viz.plan(
        f'{plan["stage"]} in {plan["dtype"]} on {plan["target"]}: {devices}' + _OF_A_CPU * _borrowed(plan),
        [_name(row) for row in rows],
        memory,
        plan['memory'] / size,
        unit,
        seconds if plan['chip'] else {},
    )
