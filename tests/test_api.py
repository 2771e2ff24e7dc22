"""The Python API: `vqroi_jax.load` and what it gives, beside the commands and the networks themselves."""

import json
import runpy
import subprocess
import sys
import time
from pathlib import Path

import nibabel
import numpy as np
import pytest

import vqroi_jax as vq
from vqroi_jax import api, generate
from vqroi_jax.tokens import encode_cohort, find_cohort
from vqroi_jax.trained import load_vqgan
from vqroi_jax.training import partitioning

CONFIGS = Path(__file__).parents[1] / 'configs'


@pytest.fixture(scope='module')
def model(tiny_transformer):
    return vq.load(tiny_transformer)


@pytest.fixture(scope='module')
def cohort(tiny_vqgan):
    """ROIs float32 [6, 16, 16, 16], and the tokens and scores that stage 2 is trained on."""
    vqgan = load_vqgan(tiny_vqgan)
    prepared = find_cohort(vqgan, '')
    source = encode_cohort(vqgan, prepared, partitioning.make_mesh({'data': 1}))['train']
    rois = prepared.split('train')
    volumes = np.stack([rois.volume(i)[..., 0] for i in range(len(rois))])
    return volumes, source.tokens.reshape(-1, 4, 4, 4), source.scores.reshape(-1, 4, 4, 4)


def test_importing_the_package_loads_nothing_heavy():
    code = (
        'import sys; import vqroi_jax as vq; vq.load;'
        'heavy = {"jax", "flax", "numpy", "ml_collections", "matplotlib"} & set(sys.modules);'
        'sys.exit(str(heavy) if heavy else 0)'
    )
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, '')
    assert time.perf_counter() - begin < 2  # a Python of its own included


def test_every_public_name_is_there():
    assert all(hasattr(module, name) for module in (vq, api) for name in module.__all__)


def test_samples_are_those_of_the_command(model, tiny_transformer, tmp_path):
    """From its NIfTI files: same seed, class and number, on any devices; 1 stands for the brightest, 0 for -1."""
    config = runpy.run_path(str(CONFIGS / 'generate.py'))['get_config']('smoke')
    config.transformer_workdir, config.seed, config.number = str(tiny_transformer), 3, 3
    config.intensity.background = 0.0
    generate.run(config, tmp_path)
    for label in ('LGG', 'HGG'):
        files = sorted((tmp_path / 'samples' / label).glob('*.nii.gz'))
        written = np.stack([np.asarray(nibabel.load(file).dataobj).transpose(2, 0, 1) for file in files])
        drawn = model.sample(label, n=3, seed=3)
        assert (drawn.shape, drawn.dtype) == ((3, 16, 16, 16), np.float32)
        np.testing.assert_allclose(written, (drawn + 1) / 2, atol=1e-6)
    np.testing.assert_array_equal(model.sample('HGG', n=1, seed=3, first=2), drawn[2:])
    assert (model.sample('HGG', n=1, seed=4) != drawn[0]).any()


def test_sampling_settings_can_be_changed_for_once(model):
    usual, likeliest = model.sample('HGG', n=2), model.sample('HGG', n=2, temperature=0.0)
    np.testing.assert_array_equal(likeliest[0], likeliest[1])  # nothing is left to chance
    assert (usual[0] != usual[1]).any()
    np.testing.assert_array_equal(model.sample('HGG', n=2), usual)


def test_encodes_as_stage_2_was_trained(model, cohort):
    volumes, tokens, scores = cohort
    found = model.encode(volumes)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, tokens)
    np.testing.assert_allclose(model.importance(volumes), scores, atol=1e-6)
    np.testing.assert_array_equal(model.encode(volumes[4]), tokens[4])
    np.testing.assert_allclose(model.importance(volumes[4]), scores[4], atol=1e-6)


def test_decodes_as_the_network_does(model, cohort):
    volumes, tokens, _ = cohort
    vqgan = model.vqgan
    expected = np.asarray(vqgan.model.apply(vqgan.variables, tokens[:2], method='decode_samples'))[..., 0]
    np.testing.assert_allclose(model.decode(tokens[:2]), expected, atol=1e-5)
    np.testing.assert_allclose(model.decode(tokens[1]), expected[1], atol=1e-5)
    np.testing.assert_allclose(model.reconstruct(volumes[:2]), expected, atol=1e-5)


def test_says_what_it_is(model, tiny_transformer):
    assert (model.roi_size, model.grid, model.codes) == ((16, 16, 16), (4, 4, 4), 32)
    assert list(model.classes) == json.loads((tiny_transformer / 'stage1.json').read_text())['classes']
    assert model.spacing == (8.0, 8.0, 8.0)


def test_stage_1_does_all_but_draw(tiny_vqgan, cohort):
    stage1 = vq.load(str(tiny_vqgan), checkpoint=4)
    assert not isinstance(stage1, api.Generator)
    np.testing.assert_array_equal(stage1.encode(cohort[0][0]), cohort[1][0])
    with pytest.raises(vq.InputError, match=f'stage 1, which draws no samples; .*vqgan_workdir={tiny_vqgan}'):
        stage1.sample('HGG')


ROI, TOKENS = np.zeros((16, 16, 16), np.float32), np.zeros((4, 4, 4), np.int32)


@pytest.mark.parametrize(
    ('call', 'message'),
    [
        (lambda m: m.encode(ROI[:8]), r'shape \(8, 16, 16\): \(16, 16, 16\) or \(n, 16, 16, 16\) is expected'),
        (lambda m: m.encode(ROI[None, ..., None]), r'shape \(1, 16, 16, 16, 1\)'),
        (lambda m: m.encode(ROI[None][:0]), r'shape \(0, 16, 16, 16\)'),
        (lambda m: m.importance(ROI + 800), r'voxels from 800 to 800: -1 \(background\) to 1 is expected'),
        (lambda m: m.reconstruct(ROI * np.nan), 'voxels from nan to nan'),
        (lambda m: m.encode(ROI.astype(bool)), 'the volume is bool: real numbers'),
        (lambda m: m.decode(TOKENS.ravel()), r'tokens has shape \(64,\)'),
        (lambda m: m.decode(TOKENS + 0.5), 'tokens are float64: whole numbers'),
        (lambda m: m.decode(TOKENS + 32), 'tokens from 32 to 32: 0 to 31 are expected'),
        (lambda m: m.decode(TOKENS - 1), 'tokens from -1 to -1'),
        (lambda m: m.sample('GBM'), "class 'GBM' is unknown; the model knows"),
        (lambda m: m.sample('HGG', n=0), 'n=0: a whole number from 1'),
        (lambda m: m.sample('HGG', n=1.5), 'n=1.5: a whole number'),
        (lambda m: m.sample('HGG', seed=-1), 'seed=-1: a whole number from 0'),
        (lambda m: m.sample('HGG', n=2, first=2**32 - 1), 'samples are numbered up to'),
        (lambda m: m.sample('HGG', tok_k=3), "no field 'tok_k'; there are .*top_k"),
        (lambda m: m.sample('HGG', top_k='3'), "sampling.top_k='3': a value of type int"),
        (lambda m: m.sample('HGG', top_p=2.0), r'sampling.top_p=2.0: expected above 0'),
    ],
)
def test_what_cannot_be_used_is_told(model, call, message):
    with pytest.raises(vq.InputError, match=message):
        call(model)


def test_what_cannot_be_loaded_is_told(tmp_path, tiny_vqgan):
    with pytest.raises(vq.InputError, match=r'holds no run: .*config.json is missing'):
        vq.load(tmp_path)
    (tmp_path / 'config.json').write_text(json.dumps({'task': 'demo'}))
    with pytest.raises(vq.InputError, match=r"is a run of the task 'demo'; give .* stage 2 \('transformer'\)"):
        vq.load(tmp_path)
    with pytest.raises(vq.InputError, match="checkpoint 'newest': expected"):
        vq.load(tiny_vqgan, checkpoint='newest')


def test_one_version_everywhere():
    root = CONFIGS.parent
    for file, written in (
        ('setup.py', f"version='{vq.__version__}'"),
        ('CITATION.cff', f'\nversion: {vq.__version__}\n'),
        ('CHANGELOG.md', f'\n## {vq.__version__}, '),
    ):
        assert written in (root / file).read_text(encoding='utf-8'), file
