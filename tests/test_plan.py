"""Plans: the real step compiled without data, what it needs, and what fits."""

import dataclasses
import itertools
import json
import re
import runpy
import shutil

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from tests.conftest import CONFIGS
from vqroi_jax import main, plan, planner
from vqroi_jax.errors import InputError
from vqroi_jax.hlo import Collective, Cost
from vqroi_jax.models import slab_convolution
from vqroi_jax.targets import CHIPS, GB, GIB, find_target
from vqroi_jax.training import partitioning

# What libtpu says of a program that is too large, shortened.
REFUSAL = (
    'RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 23.41G of 15.75G '
    'hbm. Exceeded hbm capacity by 7.66G.'
)
TEMPORARIES = 'the total memory required for HLO temporaries (53.86G) exceeds available HBM (15.75G).'


def tiny_config(stage: str) -> ConfigDict:
    """8³ voxels, 2³ tokens, one layer."""
    config = runpy.run_path(str(CONFIGS / 'plan.py'))['get_config']('smoke')
    config.stage, config.target = stage, 'cpu'
    config.cohort.rois, config.search = 4, True
    config.vqgan.data.roi_size = (8, 8, 8)
    config.vqgan.discriminator.channels = (8,)
    config.transformer.model.layers = 1
    config.transformer.model.width = 16
    config.transformer.masking.strategy = 'random'
    config.generate.sampling.sub_batch = 1
    for block in (config.vqgan, config.transformer, config.generate):
        block.mesh.data = 1
    return config


@pytest.fixture(scope='module')
def transformer_plan(tmp_path_factory):
    """A plan of a tiny stage 2 on this machine: (config, workdir)."""
    config, folder = tiny_config('transformer'), tmp_path_factory.mktemp('plan')
    config.remat = (config.transformer.model.remat,)
    config.transformer.batch_size = 2
    plan.run(config, folder)
    return config, folder


def test_a_plan_of_stage_2_on_this_machine(transformer_plan):
    config, folder = transformer_plan
    found = json.loads((folder / plan.PLAN_FILE).read_text())
    assert (folder / 'figures' / 'plan.png').stat().st_size > 10_000
    assert [row['rows'] for row in found['compiled']] == [2, 1, 4]  # its own, the fit's, and the largest
    (search,) = found['search']
    assert (search['largest'], search['capped']) == (4, True)  # there are four patients

    codes, length, width = config.vqgan.codebook.codes, 8, 16
    vocabulary = codes + 1 + config.cohort.classes
    layer = 12 * width**2 + 9 * width + 4 * width  # products, their biases, two norms
    parameters = layer + (2 * vocabulary + length) * width + 2 * width
    stage1 = config.vqgan.model
    decoder = codes * (stage1.code_features + 1) + (stage1.code_features + 1) * stage1.hidden  # the codebook, 1x1x1
    decoder += sum(27 * a * b + 3 * b for a, b in itertools.pairwise((stage1.hidden, *stage1.channels[::-1])))
    decoder += stage1.channels[0] + 1
    assert found['drawing'] == (parameters + decoder) * 4
    state = 3 * parameters * 4 + 2 * 4  # with two moments; the step, and the optimiser's count of steps
    for row in found['compiled']:
        batch = row['rows'] * (length + 1) * 4  # this masking reads no scores, and nothing reads `index`
        assert row['memory']['arguments'] == pytest.approx(state + batch, abs=8)
        assert row['memory']['aliased'] == pytest.approx(state, abs=8)  # the state is donated
        positions = row['rows'] * length
        products = 6 * positions * (12 * width**2 + vocabulary * width) + 12 * positions * length * width
        assert row['cost']['flops'] == pytest.approx(products, rel=0.15)


def test_a_plan_with_mirroring_is_of_batches_with_all_views():
    config = tiny_config('transformer')
    config.transformer.augment.flip = ('width', 'depth')
    config.transformer.batch_size = 2
    (step,) = planner.programs(config, partitioning.make_mesh({'data': 1}))
    assert step.arguments[1]['tokens'].shape == (2, 4, 8)
    state, metrics = step.jitted.eval_shape(*step.arguments)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, step.arguments[0])
    assert metrics['loss'].shape == ()


def test_the_same_command_again_compiles_nothing(transformer_plan, capsys, monkeypatch):
    config, folder = transformer_plan
    before = (folder / plan.PLAN_FILE).read_text()
    monkeypatch.setattr(planner, '_measure', lambda *_: pytest.fail('compiled again'))
    plan.run(config, folder)
    assert capsys.readouterr().out.count('known') == 4
    assert (folder / plan.PLAN_FILE).read_text() == before


def test_another_version_compiles_again(transformer_plan, tmp_path, monkeypatch):
    config, folder = transformer_plan
    shutil.copytree(folder / planner.COMPILED_FOLDER, tmp_path / planner.COMPILED_FOLDER)
    target = find_target('cpu')
    target.versions['jaxlib'] = '0.0.1'
    monkeypatch.setattr(planner, '_measure', lambda *_: pytest.fail('compiled'))
    with pytest.raises(pytest.fail.Exception, match='compiled'):
        planner.Planner(config, target, tmp_path).compile(1, 'none')


def test_generation_is_planned_by_its_two_programs(tmp_path):
    config = tiny_config('generate')
    config.search, config.generate.sampling.sub_batch = False, 2
    plan.run(config, tmp_path)
    rows = json.loads((tmp_path / plan.PLAN_FILE).read_text())['compiled']
    assert [(row['program'], row['rows']) for row in rows] == [('draw', 2), ('decode', 1)]
    assert all(row['fits'] and row['cost']['flops'] > 0 for row in rows)


@pytest.mark.parametrize('stage', ['vqgan', 'transformer'])
def test_steps_for_accelerators_hold_no_cpu_forms(stage, monkeypatch):
    monkeypatch.setattr(slab_convolution, '_FEW_TILES', 0)  # as in volumes that are not tiny: walked through
    config = tiny_config(stage)
    target = find_target('cpu')
    mesh = planner.Planner(config, target, None).mesh
    config[stage].batch_size = 2
    (program,) = planner.programs(config, mesh)
    traced = program.jitted.trace(*program.arguments)
    texts = {name: traced.lower(lowering_platforms=(name,)).as_text() for name in ('cpu', 'cuda', 'tpu')}
    loops = {name: text.count('stablehlo.while') for name, text in texts.items()}
    assert loops['tpu'] <= loops['cuda'] < loops['cpu']
    if stage == 'vqgan':  # all its convolutions are three-dimensional, perceptual loss being off
        convolutions = {name: text.count('stablehlo.convolution') for name, text in texts.items()}
        assert convolutions['tpu'] == convolutions['cuda'] > 20
        assert convolutions['cpu'] == 0
        assert 'dynamic_update_slice' in texts['cpu']
        assert 'dynamic_update_slice' not in texts['tpu']


@pytest.mark.long
@pytest.mark.parametrize('stage', ['vqgan', 'transformer', 'generate'])
def test_a_plan_for_a_tpu(stage, tmp_path):
    pytest.importorskip('libtpu', reason='libtpu compiles for TPUs; pip install "vqroi_jax[tpu]"')
    config = tiny_config(stage)
    config.target, config.search = 'v5e:2x2', False
    for block in (config.vqgan, config.transformer, config.generate):
        block.mesh.data = -1
    plan.run(config, tmp_path)
    found = json.loads((tmp_path / plan.PLAN_FILE).read_text())
    assert found['chips'] == 4
    for row in found['compiled']:
        assert row['fits']
        assert row['run']['least_days'] > 0
        kinds = {one['kind'] for one in row['cost']['collectives']}
        assert ('all-reduce' in kinds) == (stage != 'generate')  # samples do not see each other


def test_the_line_through_two_compilations():
    assert planner.fit_line([(1, 5.0), (3, 11.0)]) == planner.fit_line([(3, 11.0), (1, 5.0)]) == (2.0, 3.0)
    assert planner.fit_line([(3, 5.0)]) == (5.0, 0.0)


@pytest.mark.parametrize(
    ('fixed', 'each', 'room', 'largest'), [(2, 3, 11, 3), (2, 3, 10.9, 2), (2, 3, 1, 0), (2, 0.1, 99, 7), (9, 0, 8, 0)]
)
def test_the_largest_batch_that_fits(fixed, each, room, largest):
    assert planner.largest_that_fits(fixed, each, room, most=7) == largest


class _Chip:
    """Stands in for a planner's compiler: so many bytes fixed and a row, more from `bend` on."""

    def __init__(self, fixed, each, bend):
        self.fixed, self.each, self.bend, self.compiled = fixed, each, bend, []

    def __call__(self, rows, remat):
        self.compiled.append(rows)
        total = (self.fixed + self.each * rows) * GIB + (GIB if rows >= self.bend else 0)
        fits = total <= 15.75 * GIB
        memory = {'arguments': total} if fits else {'needed': total}
        return planner.Compiled('step', remat, rows, fits, memory, Cost(), 1.0)


@pytest.mark.parametrize(
    ('fixed', 'each', 'bend', 'compiled', 'largest'),
    [
        (1, 2, 99, [1, 2, 7], 7),
        (1, 2, 7, [1, 2, 7, 6], 6),  # the line was wrong
        (1, 2, 5, [1, 2, 7, 6], 6),  # by little
        (1, 1, 5, [1, 2, 14, 13], 13),
        (1, 8, 99, [1, 2], 1),
        (20, 1, 99, [1], 0),
        (1, 0.1, 99, [1, 2, 30], 30),  # no more patients
    ],
)
def test_the_search_confirms_what_the_line_says(fixed, each, bend, compiled, largest, monkeypatch):
    config = tiny_config('transformer')
    config.cohort.rois = 30
    made = planner.Planner(config, dataclasses.replace(find_target('cuda:h100'), memory=16 * GIB), None)
    chip = _Chip(fixed, each, bend)
    monkeypatch.setattr(made, 'compile', chip)
    found = made.search('none')
    assert chip.compiled == compiled
    assert (found.largest, found.capped) == (largest, largest == 30)


def test_the_report_says_what_fits_and_what_does_not():
    config = tiny_config('transformer')
    config.cohort.rois = 30
    config.transformer.training.duration = '60 epochs'
    made = planner.Planner(config, find_target('cuda:h100'), None)
    cost = Cost(flops=989e12, bytes=1e9, collectives=(Collective('all-reduce', 2, 3, 8e6),), open_loops=2)
    kinds = ('arguments', 'outputs', 'temporaries', 'program', 'aliased')
    fits = planner.Compiled(
        'step', 'none', 6, True, dict(zip(kinds, (GIB, GIB, 2 * GIB, 0.5 * GIB, GIB), strict=True)), cost, 1.0
    )
    refused = planner.Compiled('step', 'none', 7, False, {'needed': 90 * GIB}, Cost(), 1.0)
    search = planner.Search('none', 1 * GIB, 0.5 * GIB, 6, False, (fits, refused))
    found = plan.describe(made, [fits, refused], [search])
    # 30 patients in batches of 6 are 5 steps an epoch, of a second each.
    assert found['compiled'][0]['run'] == {
        'steps': 300,
        'least_days': pytest.approx(300 / 86400),
        'estimated_days': None,
    }
    text = plan.report(found)
    assert '3.5' in text
    assert '90 (too much)' in text
    assert 'remat none: up to 6 a chip fit, a batch of 6; about 1 GiB and 0.5 GiB for each of them' in text
    assert 'step, remat none, 6 a chip: all-reduce over 2 devices, 3 times, 8 MB' in text
    assert 'Up to 2 loop(s)' in text
    assert "those of the CPU's program" in text
    assert 'Where TFLOP is 0' not in text
    sums = plan.describe(made, [dataclasses.replace(fits, cost=Cost(bytes=1e9))], [])
    assert 'Where TFLOP is 0' in plan.report(sums)
    assert '  GiB in all  ' in text
    figure = plan.draw(found)
    assert figure.axes[0].get_xlabel() == 'GiB of memory'
    assert len(figure.axes) == 2
    assert figure.texts[0].get_text().endswith(": 1 device, by a CPU's program")


def test_a_plan_for_a_gpu_is_lowered_for_it_and_measured_by_the_cpu(tmp_path, monkeypatch):
    """A bound by memory traffic is none, as that is another program's."""
    lowered_for = []
    lower = jax.stages.Traced.lower

    def note(traced, **settings):
        lowered_for.extend(settings['lowering_platforms'])
        return lower(traced, **settings)

    monkeypatch.setattr(jax.stages.Traced, 'lower', note)
    config = tiny_config('transformer')
    config.target, config.search = 'cuda:a100', False
    found = plan.make_plan(config, tmp_path)
    assert lowered_for == ['cuda', 'cpu']
    (row,) = found['compiled']
    assert row['least_seconds'].keys() == {'products', 'links'}
    assert row['estimated_seconds'] is None


def test_the_estimate_is_the_compilers_cycles_at_the_chips_clock():
    config = tiny_config('transformer')
    config.cohort.rois, config.transformer.training.duration = 30, '60 epochs'
    made = planner.Planner(config, find_target('cuda:h100'), None)
    made.target = dataclasses.replace(made.target, platform='tpu', chip=CHIPS['v5e'])
    cost = Cost(flops=1.0, bytes=819 * GB, cycles=3 * CHIPS['v5e'].clock)
    memory = dict.fromkeys(('arguments', 'outputs', 'temporaries', 'program', 'aliased'), 0.0)
    (row,) = plan.describe(made, [planner.Compiled('step', 'none', 6, True, memory, cost, 1.0)], [])['compiled']
    assert row['estimated_seconds'] == pytest.approx(3)
    assert row['least_seconds']['memory'] == pytest.approx(1)
    assert row['run'] == {  # 30 patients in batches of 6, 60 times
        'steps': 300,
        'least_days': pytest.approx(300 / 86400),
        'estimated_days': pytest.approx(900 / 86400),
    }


def test_what_is_small_is_told_in_mib(tmp_path):
    made = planner.Planner(tiny_config('transformer'), find_target('cpu'), tmp_path)
    small = planner.Compiled('step', 'none', 1, True, {'arguments': 2 * 2**20, 'temporaries': 3 * 2**20}, Cost(), 1.0)
    found = plan.describe(made, [small], [])
    lines = plan.report(found).splitlines()
    assert ': 1 device with ' in lines[0]
    cells = dict(zip(*(re.split(' {2,}', line.strip()) for line in lines[1:3]), strict=True))
    assert (cells['arguments'], cells['temporaries'], cells['MiB in all']) == ('2', '3', '5')
    figure = plan.draw(found)
    assert figure.axes[0].get_xlabel() == 'MiB of memory'
    assert [bar.get_width() for bar in figure.axes[0].patches] == [2, 3]
    assert figure.texts[0].get_text().endswith(': 1 device')


def test_what_the_compiler_refuses_for_its_size_is_read_from_its_message():
    assert planner.needed_memory(REFUSAL) == pytest.approx(23.41 * GIB)
    assert planner.needed_memory(f'RESOURCE_EXHAUSTED: Ran out of memory on HBM, {TEMPORARIES}') == 53.86 * GIB
    assert planner.needed_memory('INTERNAL: something else') == 0


def test_least_times_are_those_of_the_makers_figures():
    cost = Cost(flops=197e12, bytes=2 * 819 * GB, collectives=(Collective('all-reduce', 16, 3, 100 * GB),))
    seconds = plan.least_seconds(cost, CHIPS['v5e'])
    assert seconds == pytest.approx({'products': 1.0, 'memory': 2.0, 'links': 2 * 100 * 15 / 16 / 200})


@pytest.mark.parametrize(
    ('field', 'value', 'message'),
    [
        ('stage', 'demo', "config.stage='demo': choose one of vqgan, transformer, generate"),
        ('target', 'v9:2x2', "config.target='v9:2x2'"),
        ('remat', ('some',), "'some' is no setting of the stage transformer, which has none, activations, blocks"),
        ('cohort.rois', 0, 'config.cohort.rois=0'),
        ('vqgan.batch_size', 0, 'config.vqgan.batch_size=0: expected 1 or more'),
        ('transformer.batch_size', -4, 'config.transformer.batch_size=-4: expected 1 or more'),
        ('transformer.micro_batches', 0, 'config.transformer.micro_batches=0: expected 1 or more'),
        ('generate.number', 0, 'config.generate.number=0: expected 1 or more'),
        ('margin', 1.0, 'config.margin=1.0'),
        (
            'transformer.model.width',
            15,
            'config.transformer.model.width=15 does not divide by config.transformer.model.heads=2',
        ),
        ('transformer.mesh.data', 99, 'config.transformer.mesh.data=99'),
        (
            'transformer.mesh.model',
            4,
            'config.transformer.model.heads=2 does not divide by config.transformer.mesh.model=4',
        ),
        ('vqgan.data.roi_size', (9, 8, 8), 'config.vqgan.data.roi_size: depth 9 does not divide'),
    ],
)
def test_bad_settings_are_refused_before_anything_is_compiled(field, value, message, tmp_path, monkeypatch):
    config = tiny_config('transformer')
    config.update_from_flattened_dict({field: value})
    monkeypatch.setattr(planner, '_measure', lambda *_: pytest.fail('compiled'))
    with pytest.raises(InputError) as caught:
        plan.run(config, tmp_path)
    assert message in str(caught.value)


def test_a_batch_that_cannot_be_split_is_not_compiled(tmp_path):
    config = tiny_config('transformer')
    config.transformer.micro_batches = 2
    config.transformer.batch_size = 3
    made = planner.Planner(config, find_target('cpu'), tmp_path)
    assert made.configured() is None
    message = r'config.transformer.batch_size=3 does not divide by 1 chips x 2 micro-batch\(es\)'
    assert re.match(message, made.indivisible())
    config.search = False  # so that nothing at all would be
    with pytest.raises(InputError, match=message):
        plan.make_plan(config, tmp_path)


def test_samples_are_drawn_class_by_class():
    config = tiny_config('generate')
    config.generate.number, config.generate.sampling.sub_batch, config.cohort.classes = 10, 16, 3
    made = planner.Planner(config, find_target('cpu'), None)
    drawn = planner.Compiled('draw', '', 16, True, {}, Cost(), 1.0)
    decoded = dataclasses.replace(drawn, program='decode', rows=1)
    assert plan._calls(made, drawn) == (3, 'calls')
    assert plan._calls(made, decoded) == (30, 'calls')
    config.generate.classes, config.generate.number = ('HGG',), 17
    assert plan._calls(made, drawn) == (2, 'calls')


def test_an_unknown_variant_is_refused(capsys):
    assert main.main(['vqroi_jax', f'--config={CONFIGS / "plan.py"}:papr', '--workdir=unused']) == 2
    assert 'no variant' in capsys.readouterr().err


@pytest.mark.parametrize(('stage', 'batch'), [('vqgan', 16), ('transformer', 48)])
def test_presets_for_16_chips_follow_the_scaling_rules_that_they_state(stage, batch):
    get_config = runpy.run_path(str(CONFIGS / f'{stage}.py'))['get_config']
    paper, preset = get_config('paper'), get_config('v5e_16')
    ratio = batch / paper.batch_size
    assert preset.batch_size == preset.eval_batch_size == batch
    assert preset.optimizer.learning_rate == pytest.approx(paper.optimizer.learning_rate * ratio**0.5, rel=0.01)
    final = paper.optimizer.final_learning_rate
    assert preset.optimizer.final_learning_rate == pytest.approx(final * ratio**0.5, rel=0.01)
    if stage == 'vqgan':
        assert preset.codebook.decay == pytest.approx(paper.codebook.decay**ratio, rel=0.001)
    assert preset.training == paper.training
    assert batch % 16 == 0
