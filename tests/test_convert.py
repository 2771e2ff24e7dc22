"""Files of the authors' code as runs, and runs as such files, from end to end.

PyTorch is not needed: its container is replaced by pickle here, and tests/parity has the same with PyTorch.
"""

import functools
import json
import operator
import pickle
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
from oracle import release_files

from vqroi_jax import convert, generate, main, torch_files, train_transformer, train_vqgan
from vqroi_jax.errors import InputError
from vqroi_jax.tokens import find_cohort
from vqroi_jax.trained import load_transformer, load_vqgan
from vqroi_jax.workdir import read_config

CONFIGS = Path(__file__).parents[1] / 'configs'
GRID = (1, 2, 3)
CLASSES = ('a', 'b', 'c')
OWN = ('transformer.', 'linear_prob_head.')  # what is not stage 1's in a stage 2 file


@pytest.fixture(autouse=True, scope='module')
def pickled():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_files, 'pytorch', lambda purpose: None)
        patch.setattr(torch_files, 'read_contents', lambda path: pickle.loads(Path(path).read_bytes()))
        patch.setattr(torch_files, 'write', lambda path, contents: Path(path).write_bytes(pickle.dumps(contents)))
        yield


def config_of(task, variant='paper', **changes):
    config = runpy.run_path(str(CONFIGS / f'{task}.py'))['get_config'](variant)
    config.update_from_flattened_dict(changes)
    return config.lock()


def reading(file, **changes):
    known = {'classes': CLASSES, 'grid': GRID, 'transformer.model.heads': 4}
    return config_of('convert', release=str(file), **known, **changes)


def write_back(folder, out):
    """What a run is written as, and the contents."""
    convert.run(config_of('convert', run=str(folder)), out)
    (path,) = out.glob('*.pth')
    return path, torch_files.read_contents(path)


def assert_same(ours, theirs):
    """Two files' contents are the same to the bit, types and dtypes included."""
    assert type(ours) is type(theirs)
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert_same(ours[name], value)
    elif isinstance(theirs, np.ndarray):
        assert (ours.dtype, ours.shape, ours.tobytes()) == (theirs.dtype, theirs.shape, theirs.tobytes())
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other)
    else:
        assert ours == theirs


@pytest.fixture(scope='module')
def stage1_file(tmp_path_factory):
    path = tmp_path_factory.mktemp('files') / 'epoch_7999.pt'
    path.write_bytes(pickle.dumps(release_files.stage1_file(release_files.stage1(GRID))))
    return path


@pytest.fixture(scope='module')
def stage2_file(tmp_path_factory):
    path = tmp_path_factory.mktemp('files') / 'epoch_4999.pt'
    path.write_bytes(pickle.dumps(release_files.stage2(GRID)))
    return path


@pytest.fixture(scope='module')
def stage1_run(stage1_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp('runs') / 'stage1'
    convert.run(reading(stage1_file), folder)
    return folder


@pytest.fixture(scope='module')
def stage2_run(stage2_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp('runs') / 'stage2'
    convert.run(reading(stage2_file, step=5), folder)
    return folder


def copy_with(run, copy, field, value):
    """A copy of a run's folder with one field of its config changed."""
    shutil.copytree(run, copy)
    settings = json.loads((run / 'config.json').read_text())
    *blocks, leaf = field.split('.')
    functools.reduce(operator.getitem, blocks, settings)[leaf] = value
    (copy / 'config.json').write_text(json.dumps(settings))
    return copy


# ------------------------------------------------------------------------------------------------- there and back


def test_a_stage_1_file_is_a_run_and_comes_back(stage1_run, stage1_file, tmp_path, capsys):
    vqgan = load_vqgan(stage1_run)
    assert (vqgan.step, vqgan.roi_size, vqgan.grid) == (1, (16, 32, 48), GRID)
    assert vqgan.config.data.classes == CLASSES
    tensors = release_files.stage1(GRID)
    np.testing.assert_array_equal(
        vqgan.variables['params']['pre_quantisation']['kernel'][0, 0, 0].T,
        tensors['preV_conv.conv.weight'][:, :, 0, 0, 0],
    )
    assert (stage1_run / 'parameters.txt').exists()
    capsys.readouterr()
    path, contents = write_back(stage1_run, tmp_path / 'out')
    assert path.name == 'vqgan.pth'
    assert_same(contents, pickle.loads(stage1_file.read_bytes()))
    out = capsys.readouterr().out
    assert 'a latent grid that is no cube (--config.grid=(1, 2, 3))' in out


def test_a_stage_2_file_brings_its_stage_1_and_comes_back(stage2_run, stage2_file, tmp_path, capsys):
    trained = load_transformer(stage2_run)
    assert (trained.step, trained.classes, trained.spacing, trained.synthetic) == (5, CLASSES, (1.0, 1.0, 1.0), False)
    assert (trained.model.layers, trained.model.heads, trained.model.positions) == (2, 4, 6)
    assert trained.vqgan.workdir == stage2_run / 'vqgan'
    tensors = release_files.stage2(GRID)
    codes = trained.vqgan.variables['codebook']['codebook']['codes']
    np.testing.assert_array_equal(codes, tensors['codebook.embedding.weight'])
    capsys.readouterr()
    path, contents = write_back(stage2_run, tmp_path / 'out')
    assert path.name == 'transformer.pth'
    assert_same(contents, tensors)
    out = capsys.readouterr().out
    assert '4 heads (--config.transformer.model.heads=4)' in out
    assert "--config.classes=\"('a', 'b', 'c')\" --config.spacing=\"(1.0, 1.0, 1.0)\" --config.synthetic=False" in out
    # Its stage 1 is a run like any other.
    _, contents = write_back(stage2_run / 'vqgan', tmp_path / 'out1')
    flat = {f'{network}.{name}': array for network, state in contents.items() for name, array in state.items()}
    assert_same(release_files.as_in_stage2(flat), {k: v for k, v in tensors.items() if not k.startswith(OWN)})


def test_the_same_command_again_goes_on_where_it_was_stopped(stage2_run, stage2_file):
    before = load_transformer(stage2_run).identity
    shutil.rmtree(stage2_run / 'checkpoints')
    (stage2_run / 'release' / 'rest.pth').unlink()
    convert.run(reading(stage2_file, step=5), stage2_run)
    first = (stage2_run / 'release' / 'rest.pth').stat().st_mtime_ns
    convert.run(reading(stage2_file, step=5), stage2_run)
    assert (stage2_run / 'release' / 'rest.pth').stat().st_mtime_ns == first
    assert load_transformer(stage2_run).identity == before


def generated(run, out):
    """The files of two samples a class, by name."""
    sampling = config_of('generate', 'smoke', transformer_workdir=str(run), seed=3, **{'mesh.data': 1})
    generate.run(sampling, out)
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob('*.nii.gz')}


def test_samples_of_a_run_and_of_its_file_are_the_same(stage2_run, tmp_path):
    """Of a run that knows of no file, as one that was trained here."""
    ours = tmp_path / 'ours'
    shutil.copytree(stage2_run, ours, ignore=shutil.ignore_patterns('release'))
    facts = json.loads((ours / 'stage1.json').read_text())
    (ours / 'stage1.json').write_text(json.dumps({**facts, 'workdir': str(ours / 'vqgan')}))
    path, contents = write_back(ours, tmp_path / 'file')
    assert contents.keys() == release_files.stage2(GRID).keys()
    np.testing.assert_array_equal(contents['transformer.blocks.1.attn.mask'], np.tril(np.ones((1, 1, 20, 20))))
    assert contents['codebook.embedding.initted'] == 1

    convert.run(reading(path, step=5), tmp_path / 'theirs')
    assert load_transformer(tmp_path / 'theirs').identity == load_transformer(ours).identity
    assert_same(write_back(tmp_path / 'theirs', tmp_path / 'again')[1], contents)
    samples = generated(ours, tmp_path / 'a')
    assert len(samples) == 12
    assert len(set(samples.values())) == 12
    assert generated(tmp_path / 'theirs', tmp_path / 'b') == samples


@pytest.mark.long
def test_trained_runs_go_there_and_back(tiny_transformer, tmp_path):
    """With a moving average, and one level without a ResBlock."""
    path, contents = write_back(tiny_transformer, tmp_path / 'file')
    assert contents['transformer.pos_emb'].shape == (1, 64, 16)
    assert not any(name.startswith('vqgan_decoder.res_block1.') for name in contents)
    told = {'spacing': (8.0, 8.0, 8.0), 'synthetic': True, 'step': 8, 'transformer.model.heads': 2}
    convert.run(config_of('convert', release=str(path), **told), tmp_path / 'run')
    assert load_transformer(tmp_path / 'run').identity == load_transformer(tiny_transformer).identity
    assert_same(write_back(tmp_path / 'run', tmp_path / 'again')[1], contents)
    assert generated(tmp_path / 'run', tmp_path / 'a') == generated(tiny_transformer, tmp_path / 'b')


@pytest.mark.long
def test_stage_2_trains_on_a_converted_stage_1(tiny_vqgan, tiny_transformer_config, tmp_path):
    path, _ = write_back(tiny_vqgan, tmp_path / 'file')
    convert.run(config_of('convert', release=str(path)), tmp_path / 'run')
    with pytest.raises(InputError, match=r'say where a prepared one is with --config.data.path'):
        find_cohort(load_vqgan(tmp_path / 'run'), '')
    changes = {'vqgan_workdir': str(tmp_path / 'run'), 'data.path': str(tiny_vqgan / 'cohort')}
    train_transformer.run(tiny_transformer_config(**changes), tmp_path / 'stage2')
    assert load_transformer(tmp_path / 'stage2').vqgan.workdir == tmp_path / 'run'


# ------------------------------------------------------------------------------------------------ what is refused


def test_converted_runs_are_not_trained_further(stage2_run):
    with pytest.raises(InputError, match=r'which has no discriminator: it can be used, but not trained further'):
        train_vqgan.run(read_config(stage2_run / 'vqgan'), stage2_run / 'vqgan')
    with pytest.raises(InputError, match=r"has no state of stage 2's optimiser: it can be used, but not trained"):
        train_transformer.run(read_config(stage2_run), stage2_run)


def test_a_folder_that_holds_something_else_is_left_as_it_is(stage1_run, stage2_file, tmp_path):
    before = {path: path.read_bytes() for path in stage1_run.rglob('*') if path.is_file()}
    with pytest.raises(InputError, match=r"holds a run with another config: .*task 'vqgan' there, 'transformer' now"):
        convert.run(reading(stage2_file), stage1_run)
    other = tmp_path / 'epoch_99.pt'
    other.write_bytes(pickle.dumps(release_files.stage1_file(release_files.stage1(GRID, seed=5))))
    with pytest.raises(InputError, match=r'was read from another file, .*epoch_7999.pt; name another --workdir'):
        convert.run(reading(other), stage1_run)
    assert {path: path.read_bytes() for path in stage1_run.rglob('*') if path.is_file()} == before


def edited(contents, change):
    contents = {name: dict(v) if isinstance(v, dict) else v for name, v in contents.items()}
    change(contents)
    return contents


@pytest.mark.parametrize(
    ('change', 'told'),
    [
        (
            lambda c: c['Encoder'].pop('res_block2.conv_module.0.bias'),
            'stage 1: has no Encoder.res_block2.conv_module.0',
        ),
        (lambda c: c['ScoreNet'].pop('att.q.bias'), 'does not fit stage 1: has no ScoreNet.att.q.bias'),
        (lambda c: c.pop('Decoder'), 'does not fit stage 1: has no Decoder.upsize'),
        (lambda c: c['Encoder'].update(more=np.zeros(1)), "has Encoder.more, which is not the network's"),
        (lambda c: c['preV_conv'].update({'conv.bias': np.zeros(3)}), r'preV_conv.conv.bias is \(3,\), not \(16,\)'),
        (lambda c: c['preV_conv'].update({'conv.bias': 3}), 'preV_conv.conv.bias is no tensor'),
        (lambda c: c.update(Encoder=3), 'w.pt: Encoder is no state dict'),
        (lambda c: c.pop('Encoder'), "is no file of the authors' code: neither the networks"),
        (lambda c: c['Codebook']['embedding.weight'].fill(0), 'the codebook was not trained'),
    ],
)
def test_stage_1_files_that_do_not_fit(stage1_file, tmp_path, change, told):
    path = tmp_path / 'w.pt'
    path.write_bytes(pickle.dumps(edited(pickle.loads(stage1_file.read_bytes()), change)))
    with pytest.raises(InputError, match=told):
        convert.run(reading(path), tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
    ('change', 'told'),
    [
        (lambda c: c.pop('transformer.blocks.0.attn.proj.bias'), 'stage 2: has no transformer.blocks.0.attn.proj.bias'),
        (lambda c: c.pop('transformer.blocks.1.attn.mask'), 'has no transformer.blocks.1.attn.mask'),
        (
            lambda c: c.pop('vqgan_encoder.conv3.conv.0.weight'),
            r'by the names of a stage 1 file\) has no Encoder.conv3.conv.0',
        ),
        (lambda c: c.update(extra=np.zeros(1)), "has extra, which is not the network's"),
        (
            lambda c: c.update({'transformer.pos_emb': np.zeros((1, 5, 32))}),
            'has 5 positions, the latent grid 6 tokens',
        ),
        (lambda c: c.update({'transformer.tok_emb.weight': np.zeros((25, 32))}), 'has 25 tokens .* are 24 tokens'),
        (
            lambda c: c.update({'transformer.head.weight': np.zeros((9, 32))}),
            r'head.weight is \(9, 32\), not \(24, 32\)',
        ),
    ],
)
def test_stage_2_files_that_do_not_fit(stage2_file, tmp_path, change, told):
    path = tmp_path / 'w.pt'
    path.write_bytes(pickle.dumps(edited(pickle.loads(stage2_file.read_bytes()), change)))
    with pytest.raises(InputError, match=told):
        convert.run(reading(path), tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
    ('changes', 'told'),
    [
        ({'classes': ('LGG', 'HGG')}, 'has 3 classes, config.classes names 2'),
        ({'grid': ()}, 'a latent grid of 6 regions, which is no cube'),
        ({'step': 0}, 'config.step=0: expected 1 or more'),
        ({'classes': ('a', 'b', 'a')}, 'a name for each class, all different'),
        ({'spacing': (1.0, 1.0)}, r'config.spacing=\(1.0, 1.0\): expected millimetres along depth, height and width'),
        ({'transformer.model.heads': 5}, 'config.model.width=32 does not divide by config.model.heads=5'),
        ({'transformer.model.width': 64}, 'config.transformer.model.width=64 does not agree with the file: 32 is'),
        ({'transformer.ema_decay': 0.9}, 'config.transformer.ema_decay=0.9 does not agree with the file: 0.0 is'),
        ({'vqgan.model.num_groups': 3}, 'channels do not divide by config.model.num_groups=3'),
        ({'vqgan.discriminator.channels': (8,)}, r'vqgan.discriminator.channels=\(8,\) does not agree with the file'),
    ],
)
def test_settings_that_do_not_fit(stage2_file, tmp_path, changes, told):
    config = reading(stage2_file).copy_and_resolve_references()
    config.update_from_flattened_dict(changes)
    with pytest.raises(InputError, match=told):
        convert.run(config, tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
    ('field', 'value', 'told'),
    [
        ('label_dropout', 0.1, "label_dropout=0.1: the authors' code has no such network"),
        ('model.attention', 'bidirectional', "model.attention='bidirectional': the authors' code has no such network"),
    ],
)
def test_transformers_that_the_authors_code_does_not_have(stage2_run, tmp_path, field, value, told):
    run = copy_with(stage2_run, tmp_path / 'run', field, value)
    with pytest.raises(InputError, match=told):
        convert.run(config_of('convert', run=str(run)), tmp_path / 'out')


def test_without_pytorch_a_run_is_refused_before_anything_is_told(stage2_run, tmp_path, monkeypatch, capsys):
    def missing(purpose):
        raise InputError(f'PyTorch is needed to {purpose}')

    monkeypatch.setattr(torch_files, 'pytorch', missing)
    with pytest.raises(InputError, match=r'needed to write .*/out/transformer\.pth'):
        convert.run(config_of('convert', run=str(stage2_run)), tmp_path / 'out')
    assert not capsys.readouterr().out


def test_several_blocks_a_level_cannot_be_written(stage1_run, tmp_path):
    run = copy_with(stage1_run, tmp_path / 'run', 'model.encoder_res_blocks', [1, 2, 1, 1])
    with pytest.raises(InputError, match=r'model.encoder_res_blocks=\(1, 2, 1, 1\): .* one block a level at most'):
        convert.run(config_of('convert', run=str(run)), tmp_path / 'out')


def test_slips_on_the_command_line_are_one_line_and_status_2(stage1_run, tmp_path, capsys):
    def failing(*arguments):
        command = ['main', f'--config={CONFIGS / "convert.py"}', f'--workdir={tmp_path / "out"}', *arguments]
        assert main.main(command) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    capsys.readouterr()
    assert 'give either --config.release' in failing()
    assert 'give either --config.release' in failing('--config.release=a', '--config.run=b')
    assert 'holds no run' in failing(f'--config.run={tmp_path}')
    (tmp_path / 'config.json').write_text('{"task": "generate"}')
    assert "neither a run of stage 1 nor of stage 2: its task is 'generate'" in failing(f'--config.run={tmp_path}')
