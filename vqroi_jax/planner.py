"""The programs of a stage, compiled for a machine that is not there: what each needs, and the largest batch that fits.

A program is exactly what the stage's own command runs, lowered with shapes in place of arrays, so nothing of its size
is allocated. `vqroi_jax.plan` is the command on top.
"""

import copy
import dataclasses
import functools
import hashlib
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vqroi_jax import hlo
from vqroi_jax.decoding import Sampling, drawing_params
from vqroi_jax.errors import fields_of
from vqroi_jax.models import layers
from vqroi_jax.targets import GIB, Target
from vqroi_jax.trained import TrainedVQGAN, draw_function
from vqroi_jax.training import partitioning, transformer, vqgan
from vqroi_jax.workdir import write_atomically

COMPILED_FOLDER = 'compiled'
FORMAT = 2  # of what is kept there; another one once `hlo` counts otherwise, or compiler options change
TRIES = 4  # batches that a search compiles after the first two
CHECKS_OF_MESH = {'vqgan': vqgan.check_mesh, 'transformer': transformer.check_mesh}
REMATS = {'vqgan': layers.REMATS, 'transformer': layers.REMATS, 'generate': ('',)}  # settings of `model.remat`


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function and the shapes that it is lowered with."""

    name: str
    jitted: Any
    arguments: tuple
    rows: int  # on each chip, or on each group of chips that shares the weights


def programs(config: ConfigDict, mesh: Mesh) -> list[Program]:
    """The programs of the stage, exactly those that its own command runs: a training step, or drawing and decoding.

    Args:
        config: as `configs/plan.py` has it, the stage's batch set.
        mesh: to compile for; its devices need not be there.

    Raises:
        InputError: a setting of the stage cannot be used.
    """
    return {'vqgan': _vqgan_step, 'transformer': _transformer_step, 'generate': _generation}[config.stage](config, mesh)


def _vqgan_step(config: ConfigDict, mesh: Mesh) -> list[Program]:
    recipe = _vqgan_recipe(config)
    weights = partitioning.placed_shapes(recipe.lpips_weights, partitioning.replicated(mesh))
    rows, shape = config.vqgan.batch_size, (*config.vqgan.data.roi_size, 1)
    batch = {
        'volume': jax.ShapeDtypeStruct((rows, *shape), jnp.float32, sharding=partitioning.volume_sharding(mesh)),
        'label': _rows(rows, mesh)['label'],
    }
    state = partitioning.placed_state(vqgan.state_shapes(recipe), mesh)
    step = vqgan.jit_step(recipe, state, mesh)
    return [Program('step', step, (state, batch, weights), rows // partitioning.row_parts(mesh))]


def _transformer_step(config: ConfigDict, mesh: Mesh) -> list[Program]:
    stage1, settings = _stage1(config, mesh), config.transformer
    recipe = _transformer_recipe(config, stage1)
    state, length = partitioning.placed_state(transformer.state_shapes(recipe), mesh), recipe.masking.length
    shape = (2 ** len(settings.augment.flip), length) if settings.augment.flip else (length,)
    batch = _rows(settings.batch_size, mesh, tokens=(shape, jnp.int32), scores=(shape, jnp.float32))
    step = transformer.jit_step(recipe, state, mesh)
    return [Program('step', step, (state, batch), settings.batch_size // partitioning.row_parts(mesh))]


def _generation(config: ConfigDict, mesh: Mesh) -> list[Program]:
    stage1, settings = _stage1(config, mesh), config.generate
    recipe = _transformer_recipe(config, stage1)
    model, length = recipe.model, recipe.masking.length
    params = partitioning.placed_shapes(_drawing_shapes(recipe), partitioning.replicated(mesh))
    with fields_of('generate'):
        sampling = Sampling.read(settings.sampling, model, stage1.model.codes, config.cohort.classes)
    group, groups = settings.sampling.sub_batch, partitioning.row_parts(mesh)
    one, many = ((), jnp.int32), ((length,), jnp.int32)
    wanted = _rows(group * groups, mesh, label=one, index=((), jnp.uint32), given=many)
    draw = draw_function(model, stage1.model.codes, sampling)
    seed = partitioning.placed_shapes(jax.ShapeDtypeStruct((), jnp.uint32), partitioning.replicated(mesh))
    return [
        Program('draw', partitioning.jit_on_each_device(draw, mesh), ((params, seed), tuple(wanted.values())), group),
        Program(
            'decode',
            partitioning.jit_on_each_device(stage1.decode, mesh),
            (stage1.decoder_variables, (_rows(groups, mesh, tokens=many)['tokens'],)),
            rows=1,
        ),
    ]


def _drawing_shapes(recipe: transformer.Recipe) -> Any:
    return jax.eval_shape(functools.partial(drawing_params, recipe.model), transformer.state_shapes(recipe).params)


def drawing_bytes(config: ConfigDict, mesh: Mesh) -> int:
    """Bytes that a run of stage 2 holds on each device, beside its state, while its figures' samples are drawn.

    They are the sampler's parameters and stage 1's decoder's, which stay there throughout.

    Args:
        config: as `configs/plan.py` has it.
        mesh: to compile for.
    """
    stage1 = _stage1(config, mesh)
    shapes = _drawing_shapes(_transformer_recipe(config, stage1)), stage1.decoder_variables
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def _vqgan_recipe(config: ConfigDict) -> vqgan.Recipe:
    with fields_of('vqgan'):
        return vqgan.make_recipe(config.vqgan, config.cohort.classes, config.cohort.rois / config.vqgan.batch_size)


def _transformer_recipe(config: ConfigDict, stage1: TrainedVQGAN) -> transformer.Recipe:
    settings, cohort = config.transformer, config.cohort
    with fields_of('transformer'):
        return transformer.make_recipe(
            settings, stage1.model.codes, cohort.classes, stage1.grid, cohort.rois / settings.batch_size
        )


def _stage1(config: ConfigDict, mesh: Mesh) -> TrainedVQGAN:
    """Stage 1 as it would be loaded, with shapes in place of its variables."""
    settings = config.vqgan
    recipe = _vqgan_recipe(config)
    return TrainedVQGAN(
        workdir=Path(),
        step=0,
        identity='',
        config=settings,
        model=recipe.model,
        variables=partitioning.placed_shapes(
            vqgan.evaluation_variables(vqgan.state_shapes(recipe)), partitioning.replicated(mesh)
        ),
    )


def _rows(number: int, mesh: Mesh, **arrays: tuple[tuple[int, ...], Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a global batch with `number` rows, label and index among them, from those of one row."""
    sharding = partitioning.batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct((number, *shape), dtype, sharding=sharding)
        for name, (shape, dtype) in ({'label': ((), jnp.int32), 'index': ((), jnp.int32)} | arrays).items()
    }


# ------------------------------------------------------------------------------------------------ compiling


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of a program, of one chip.

    Attributes:
        program: its name, see `programs`.
        remat: setting of the stage's `model.remat`; '' where it has none.
        rows: ROIs a step (or samples drawn or decoded together), see `Program`.
        fits: whether the compiler could place it in the chip's memory, if it knows that.
        memory: bytes by kind: `arguments`, `outputs`, `temporaries`, `program`, less `aliased`: outputs that take the
            place of arguments. Where it does not fit, `needed` alone: what the compiler had come down to.
        cost: what it does; zeros where it does not fit.
        seconds: that the compilation took.
    """

    program: str
    remat: str
    rows: int
    fits: bool
    memory: dict[str, float]
    cost: hlo.Cost
    seconds: float

    @property
    def total(self) -> float:
        """Bytes of memory in all."""
        return sum(-size if kind == 'aliased' else size for kind, size in self.memory.items())

    def to_json(self) -> dict[str, Any]:
        """As plain values, which `from_json` reads."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> 'Compiled':
        """From plain values."""
        collectives = tuple(hlo.Collective(**one) for one in stored['cost']['collectives'])
        return cls(**{**stored, 'cost': hlo.Cost(**{**stored['cost'], 'collectives': collectives})})


@dataclasses.dataclass(frozen=True)
class Search:
    """The largest batch with one setting of `remat`.

    Attributes:
        remat: the setting.
        fixed: bytes that do not depend on the batch, by a straight line through the smallest and the largest batch that
            were compiled and fit; all of them where there are not two.
        each: bytes a row of the batch.
        largest: rows a chip that were compiled and fit, the most of them; 0 if not even the least did.
        capped: whether the cohort has no more ROIs than that, so that nothing was gained by more.
        compiled: what was compiled for it, in that order.
    """

    remat: str
    fixed: float
    each: float
    largest: int
    capped: bool
    compiled: tuple[Compiled, ...]


class Planner:
    """Compiles a stage for a target at batches of choice, each once; what was compiled is kept in the workdir.

    Args:
        config: as `configs/plan.py` has it, checked.
        target: the machine.
        folder: the workdir.

    Raises:
        InputError: the stage's mesh does not fit the target, or a setting of the stage cannot be used.
    """

    def __init__(self, config: ConfigDict, target: Target, folder: Path):
        self.config, self.target, self._folder = config, target, folder
        settings = config[config.stage]
        with fields_of(config.stage):
            self.mesh = partitioning.make_mesh(settings.mesh, target.devices)
            if config.stage in CHECKS_OF_MESH:
                CHECKS_OF_MESH[config.stage](settings, self.mesh)
        self.own_remat = '' if config.stage == 'generate' else settings.model.remat
        self.remats = config.remat or tuple(sorted(REMATS[config.stage], key=lambda remat: remat != self.own_remat))
        self._micro_batches = 1 if config.stage == 'generate' else settings.micro_batches
        self._begin, self._number = time.perf_counter(), 0
        programs(self._with(self._micro_batches, self.own_remat), self.mesh)  # refuses bad settings at once

    @property
    def chips(self) -> int:
        """Of the mesh."""
        return self.mesh.devices.size

    @property
    def groups(self) -> int:
        """Parts that the batch is split into: chips, or groups of chips that share the weights."""
        return partitioning.row_parts(self.mesh)

    def configured(self) -> int | None:
        """Rows a chip of the stage's own batch; None if it cannot be split evenly."""
        if self.config.stage == 'generate':
            return self.config.generate.sampling.sub_batch
        rows, rest = divmod(self.config[self.config.stage].batch_size, self.groups)
        return rows if rows and not rest and not rows % self._micro_batches else None

    def indivisible(self) -> str:
        """Why `configured` is None."""
        stage = self.config.stage
        return (
            f'config.{stage}.batch_size={self.config[stage].batch_size} does not divide by {self.groups} chips x '
            f'{self._micro_batches} micro-batch(es)'
        )

    def search(self, remat: str) -> Search:
        """Finds the largest batch: two compilations, a straight line, and one more or a few to make sure."""
        unit = self._micro_batches
        most = max(self._most() // unit, 1) * unit
        room = self.target.memory * (1 - self.config.margin)
        good: list[Compiled] = []
        bad: list[Compiled] = []
        done: list[Compiled] = []

        def attempt(rows: int) -> bool:
            done.append(self.compile(rows, remat))
            fits = done[-1].fits and done[-1].total <= room
            (good if fits else bad).append(done[-1])
            return fits

        if attempt(unit) and most > unit:
            attempt(2 * unit)
        for _ in range(TRIES if good else 0):
            # Memory may bend upwards: once a batch was too large, the line goes through that, and the next is smaller.
            line = fit_line([(one.rows / unit, one.total) for one in (good[-1], bad[-1] if bad else good[0])])
            limit = bad[-1].rows // unit - 1 if bad else most // unit
            rows = unit * largest_that_fits(*line, room, limit)
            if rows <= good[-1].rows or attempt(rows):
                break
        ends = [good[0], good[-1]] if good else done
        fixed, each = fit_line([(one.rows, one.total) for one in ends])
        largest = good[-1].rows if good else 0
        return Search(remat, fixed, each, largest, largest == most, tuple(done))

    def compile(self, rows: int, remat: str) -> Compiled:
        """The stage's main program (the first) at a batch; what is in the workdir already is read from there."""
        return self._compile(programs(self._with(rows, remat), self.mesh)[0], remat)

    def others(self, rows: int, remat: str) -> list[Compiled]:
        """The stage's other programs at a batch."""
        return [self._compile(one, remat) for one in programs(self._with(rows, remat), self.mesh)[1:]]

    def batch_size(self, rows: int) -> int:
        """Rows of the global batch."""
        return rows * self.groups

    def _most(self) -> int:
        """Rows a chip beyond which a step would see a patient twice (or draw more samples than are wanted)."""
        wanted = self.config.generate.number if self.config.stage == 'generate' else self.config.cohort.rois
        return max(wanted // self.groups, 1)

    def _with(self, rows: int, remat: str) -> ConfigDict:
        config = copy.deepcopy(self.config)
        if config.stage == 'generate':
            config.generate.sampling.sub_batch = rows
        else:
            config[config.stage].batch_size = self.batch_size(rows)
            config[config.stage].model.remat = remat
        return config

    def _compile(self, program: Program, remat: str) -> Compiled:
        self._number += 1
        what = f'[{self._number}] {self.config.stage} {program.name} for {self.target.name}'
        kind = f', remat {remat}' if remat else ''
        print(f'{what}{kind}, {program.rows} a chip: ', end='', flush=True)
        traced = program.jitted.trace(*program.arguments)
        lowered = traced.lower(lowering_platforms=(self.target.platform,))
        if self.target.platform == 'cuda':  # lowered for it, which checks that; but only a GPU's compiler could go on
            lowered = traced.lower(lowering_platforms=('cpu',))
        identity = hashlib.sha256(json.dumps([FORMAT, self.target.name, self.target.versions]).encode())
        identity.update(lowered.as_text().encode())
        path = self._folder / COMPILED_FOLDER / f'{identity.hexdigest()[:32]}.json'
        if path.exists():
            result = Compiled.from_json(json.loads(path.read_text(encoding='utf-8')))
            print(f'known, {_shown(result)}')
            return result
        print('compiling ... ', end='', flush=True)
        result = _measure(lowered, program.name, program.rows, remat)
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, json.dumps(result.to_json(), indent=2) + '\n')
        print(f'{result.seconds:.0f} s ({time.perf_counter() - self._begin:.0f} s in all), {_shown(result)}')
        return result


def _shown(one: Compiled) -> str:
    return f'{one.total / GIB:.2f} GiB' + ('' if one.fits else ', which is too much')


def _measure(lowered: Any, name: str, rows: int, remat: str) -> Compiled:
    begin = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        memory, fits, cost = {'needed': needed_memory(str(error))}, False, hlo.Cost()
        if not memory['needed']:
            raise
    else:
        stats, fits = compiled.memory_analysis(), True
        memory = {
            'arguments': stats.argument_size_in_bytes,
            'outputs': stats.output_size_in_bytes,
            'temporaries': stats.temp_size_in_bytes,
            'program': stats.generated_code_size_in_bytes,
            'aliased': stats.alias_size_in_bytes,
        }
        cost = hlo.read_cost(compiled.as_text())
    return Compiled(name, remat, rows, fits, memory, cost, time.perf_counter() - begin)


def needed_memory(message: str) -> float:
    """Bytes that a program needs which the compiler refused for that; 0 if it was refused for something else."""
    found = re.search(r'(?:Used |temporaries \()([\d.]+)([KMG])(?: of [\d.]+[KMG] hbm|\) exceeds)', message)
    return float(found[1]) * {'K': 2**10, 'M': 2**20, 'G': 2**30}[found[2]] if found else 0.0


def fit_line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The straight line through two points (x, y): its value at 0, and its slope; flat where they are one."""
    (x, y), (last_x, last_y) = points[0], points[-1]
    slope = (last_y - y) / (last_x - x) if last_x != x else 0.0
    return y - slope * x, slope


def largest_that_fits(fixed: float, each: float, room: float, most: int) -> int:
    """The largest whole n up to `most` for which fixed + n * each is at most `room`; 0 if none is."""
    if each <= 0:
        return most if fixed <= room else 0
    return max(0, min(most, int((room - fixed) // each)))
