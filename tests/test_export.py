"""The exported generator: used without the package, in another process, beside the package itself."""

import dataclasses
import importlib.util
import json
import os
import runpy
import subprocess
import sys
import zipfile
import zipimport
from pathlib import Path

import jax
import numpy as np
import pytest

from vqroi_jax import export, main
from vqroi_jax.errors import InputError
from vqroi_jax.trained import load_transformer
from vqroi_jax.training import partitioning, transformer

CONFIG = Path(__file__).parents[1] / 'configs' / 'export.py'
ALONE = """
import sys


class Refuse:
    def find_spec(self, name, path=None, target=None):
        assert name.split('.')[0] not in ('vqroi_jax', 'flax', 'ml_collections', 'orbax'), name


sys.meta_path.insert(0, Refuse())
import sys; sys.path.insert(0, sys.argv[1])
import generator
import numpy as np

arrays = {}
for label in generator.facts()['classes']:
    arrays[label] = generator.sample(label, n=3, seed=2**32 - 5, first=1)
    arrays[label + '_tokens'] = generator.tokens(label, n=3, seed=2**32 - 5, first=1)
np.savez(sys.argv[2], **arrays)
for bad in ({'label': 'GBM'}, {'label': 'HGG', 'n': 0}, {'label': 'HGG', 'seed': -1}, {'label': 'HGG', 'first': 2**32},
    {'label': 'HGG', 'n': 1.5}):
    try:
        generator.sample(**bad)
    except ValueError as error:
        print(error)
for bad in (np.full((1, 4, 4, 4), 32), np.full((1, 4, 4, 4), -1), np.zeros((1, 4, 4), int),
    np.zeros((0, 4, 4, 4), int), np.full((1, 4, 4, 4), 0.5)):
    try:
        generator.decode(bad)
    except ValueError as error:
        print(error)
"""


def settings(trained, **changes):
    sampling = trained.config.sampling.copy_and_resolve_references().unlock()
    sampling.update(changes)
    return sampling


@pytest.fixture(scope='module')
def exported(tiny_transformer, tmp_path_factory):
    """A folder that the command has filled, for all platforms."""
    config = runpy.run_path(str(CONFIG))['get_config']('smoke')
    config.transformer_workdir = str(tiny_transformer)
    folder = tmp_path_factory.mktemp('export')
    export.run(config, folder)
    return folder


def test_draws_the_packages_samples_without_the_package(exported, tiny_transformer, tmp_path):
    file = exported / export.FILE
    done = subprocess.run(
        [sys.executable, '-I', '-c', ALONE, str(file), str(tmp_path / 'drawn.npz')],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if not name.startswith('PYTHON')},
    )
    assert done.returncode == 0, done.stderr
    refusals = done.stdout.splitlines()
    assert len(refusals) == 10
    assert refusals[0].startswith("class 'GBM' is unknown; there are ")
    assert refusals[4] == 'n=1.5: a whole number is expected'
    told = 'expected tokens as whole numbers from 0 to 31, shape (n, 4, 4, 4) with n from 1'
    assert refusals[5:] == [told] * 5
    drawn = np.load(tmp_path / 'drawn.npz')
    trained = load_transformer(tiny_transformer)
    sampler = trained.sampler(settings(trained), 2**32 - 5, partitioning.make_mesh({'data': 1}))
    for number, label in enumerate(trained.classes):
        tokens = sampler.tokens([number] * 3, [1, 2, 3])
        assert len({row.tobytes() for row in tokens}) == 3
        np.testing.assert_array_equal(drawn[f'{label}_tokens'], tokens.reshape(3, *trained.facts.grid))
        assert drawn[label].dtype == np.float32
        np.testing.assert_allclose(drawn[label], list(sampler.decode(tokens)), atol=1e-5)


def test_the_file_has_programs_for_all_platforms_and_no_more_weights_than_it_draws_with(exported, tiny_transformer):
    trained = load_transformer(tiny_transformer)
    with zipfile.ZipFile(exported / export.FILE) as file:
        assert file.testzip() is None
        for name in ('tokens', 'decode'):
            program = jax.export.deserialize(bytearray(file.read(f'{name}.jaxexport')))
            assert program.platforms == ('cpu', 'cuda', 'tpu')
        facts = json.loads(file.read('facts.json'))
        stored = sum(member.file_size for member in file.infolist() if member.filename.startswith('weights/'))
        assert (exported / export.README).read_bytes() == file.read(export.README)
        assert file.read('MODEL_CARD.md') == (tiny_transformer / 'MODEL_CARD.md').read_bytes()
    assert (facts['identity'], facts['checkpoint'], facts['trained_on']) == (trained.identity, 8, 'phantoms')
    assert facts['roi_size'] == [16, 16, 16]
    variables = trained.vqgan.variables
    needed = [
        trained.params,
        variables['codebook'],
        *(variables['params'][n] for n in ('decoder', 'post_quantisation')),
    ]
    arrays = jax.tree.leaves(needed)
    assert sum(a.nbytes for a in arrays) < stored < sum(a.nbytes for a in arrays) + 200 * 2 * len(arrays)


def test_the_readme_says_how_and_what_not_for(exported):
    text = (exported / export.README).read_text(encoding='utf-8')
    assert "sys.path.insert(0, 'generator.zip')" in text
    assert 'float32 [4, 16, 16, 16]' in text
    assert 'voxels are of 8 x 8 x 8 mm' in text
    assert 'Not for clinical use' in text
    assert 'trained on phantoms' in text


def test_a_bidirectional_model_of_bfloat16_with_guidance(tiny_transformer, tmp_path):
    """Fills masks in parallel; with the weights that it begins with."""
    trained = load_transformer(tiny_transformer)
    config = trained.config.copy_and_resolve_references().unlock()
    config.model.attention, config.label_dropout, config.dtype = 'bidirectional', 0.1, 'bfloat16'
    model = transformer.make_model(config, trained.facts.codes, 2, 64)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), np.zeros((1, 2), np.int32)))['params']
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)
    trained = dataclasses.replace(trained, model=model, params=params)
    chosen = settings(trained, guidance=0.7, top_p=0.9)
    export.export(trained, chosen, ('cpu', 'tpu'), tmp_path / export.FILE)
    spec = zipimport.zipimporter(str(tmp_path / export.FILE)).find_spec('generator')
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    weights = generator._weights('tokens')
    assert {array.dtype.name for name, array in weights.items() if name.endswith('kernel')} == {'bfloat16'}
    assert weights['token_embedding'].dtype == np.float32
    drawn = generator.tokens(trained.classes[1], n=2, seed=3, first=4)
    expected = trained.sampler(chosen, 3, partitioning.make_mesh({'data': 1})).tokens([1, 1], [4, 5])
    np.testing.assert_array_equal(drawn.reshape(2, 64), expected)


def test_the_same_command_again_leaves_what_is_there(exported, tiny_transformer, capsys):
    before = (exported / export.FILE).read_bytes()
    command = ['main', f'--config={CONFIG}:smoke', f'--workdir={exported}']
    assert main.main([*command, f'--config.transformer_workdir={tiny_transformer}']) == 0
    assert 'is there already' in capsys.readouterr().out
    assert (exported / export.FILE).read_bytes() == before


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'platforms': ('cpu', 'gpu')}, "config.platforms: 'gpu' is none of cpu, cuda, rocm, tpu"),
        ({'platforms': ()}, 'config.platforms is empty'),
        ({'transformer_workdir': ''}, 'no --config.transformer_workdir given'),
        ({'sampling.guidance': 1.0}, 'no null class'),
        ({'sampling.sub_batch': 0}, 'sampling.sub_batch=0'),
    ],
    ids=str,
)
def test_what_cannot_be_exported_is_told_and_leaves_nothing(change, message, tiny_transformer, tmp_path):
    config = runpy.run_path(str(CONFIG))['get_config']('smoke')
    config.transformer_workdir = str(tiny_transformer)
    config.update_from_flattened_dict(change)
    with pytest.raises(InputError, match=message):
        export.run(config, tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.name != '.lock']


def test_weights_that_python_could_not_import_from_are_refused(tiny_transformer, tmp_path, monkeypatch):
    monkeypatch.setattr(export, '_LARGEST', 1000)
    trained = load_transformer(tiny_transformer)
    with pytest.raises(InputError, match='GiB of weights; Python imports from files of up to'):
        export.export(trained, settings(trained), ('cpu',), tmp_path / 'generator.zip')
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.version_info >= (3, 13), reason='newer ones read the 64-bit form; users of the file may not')
def test_python_imports_from_no_archive_that_zipfile_would_write_in_its_64_bit_form(tmp_path, monkeypatch):
    assert export._LARGEST < zipfile.ZIP64_LIMIT
    weights = {'tokens': {name: np.zeros(100) for name in 'ab'}}
    for name, limit, found in (('plain.zip', zipfile.ZIP64_LIMIT, True), ('large.zip', 1000, False)):
        monkeypatch.setattr(zipfile, 'ZIP64_LIMIT', limit)
        export._write(tmp_path / name, {'generator.py': b''}, weights)
        try:
            spec = zipimport.zipimporter(str(tmp_path / name)).find_spec('generator')
        except zipimport.ZipImportError:
            spec = None
        assert (spec is not None) == found
