"""Weights to begin with: what is taken over, and what is refused. tests/parity has MedicalNet's own network."""

import re

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from vqroi_jax import torch_files, transfer
from vqroi_jax.errors import InputError
from vqroi_jax.models.resnet3d import ResNet3D

MODEL = ResNet3D(10, 2, width=2, layout='medicalnet', hidden=(3,))


def published(width=2):
    """Arrays by MedicalNet's names of a ResNet-10 with shortcuts B, each with values of its own."""
    shapes, inward = {'conv1.weight': (width, 1, 7, 7, 7), 'bn1': (width,)}, width
    for stage in range(4):
        outer, name = width * 2**stage, f'layer{stage + 1}.0'
        shapes |= {f'{name}.conv1.weight': (outer, inward, 3, 3, 3), f'{name}.bn1': (outer,)}
        shapes |= {f'{name}.conv2.weight': (outer, outer, 3, 3, 3), f'{name}.bn2': (outer,)}
        if stage:
            shapes |= {f'{name}.downsample.0.weight': (outer, inward, 1, 1, 1), f'{name}.downsample.1': (outer,)}
        inward = outer
    shapes |= {'conv_seg.0.weight': (4, 5)}
    rng, arrays = np.random.default_rng(0), {}
    for name, shape in shapes.items():
        for end in ('',) if name.endswith('weight') else ('.weight', '.bias', '.running_mean', '.running_var'):
            arrays[name + end] = rng.uniform(0.5, 1, shape).astype(np.float32)
    return arrays | {'bn1.num_batches_tracked': np.array(7)}


def test_each_of_medicalnets_arrays_has_its_place():
    arrays = published()
    params, statistics = transfer.from_medicalnet('x.pth', arrays, MODEL)
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), jnp.zeros((1, 16, 16, 16, 1)))
    assert jax.tree.map(np.shape, statistics) == jax.tree.map(np.shape, shapes['batch_stats'])
    assert params.keys() == shapes['params'].keys() - {'head_0', 'head'}
    assert all(jax.tree.map(np.shape, layer) == jax.tree.map(np.shape, shapes['params'][name])
               for name, layer in params.items())  # fmt: skip
    kernel = params['stage_2_block_0_shortcut']['kernel']
    np.testing.assert_array_equal(kernel[0, 0, 0], arrays['layer3.0.downsample.0.weight'][:, :, 0, 0, 0].T)
    kernel = params['stage_1_block_0_conv_0']['kernel']
    assert kernel[2, 0, 1, 1, 3] == arrays['layer2.0.conv1.weight'][3, 1, 2, 0, 1]
    norm = params['stage_3_block_0_norm_1'] | statistics['stage_3_block_0_norm_1']
    for ours, theirs in (('scale', 'weight'), ('bias', 'bias'), ('mean', 'running_mean'), ('var', 'running_var')):
        np.testing.assert_array_equal(norm[ours], arrays[f'layer4.0.bn2.{theirs}'])


@pytest.mark.parametrize(
    ('change', 'model', 'message'),
    [
        ({}, {'width': 4}, 'conv1.weight is (2, 1, 7, 7, 7), not (4, 1, 7, 7, 7)'),
        ({}, {'depth': 18, 'shortcut': 'A'}, 'has no layer1.1.conv1.weight'),
        ({}, {'shortcut': 'A'}, "has layer2.0.downsample.0.weight, which is not the network's"),
        ({'fc.weight': np.zeros((2, 2))}, {}, "has fc.weight, which is not the network's"),
        ({'conv1.weight': np.zeros((2, 3, 7, 7, 7))}, {}, 'conv1.weight is (2, 3, 7, 7, 7), not (2, 1, 7, 7, 7)'),
    ],
)
def test_weights_of_another_network_are_refused_by_name(change, model, message):
    other = ResNet3D(**{'depth': 10, 'classes': 2, 'width': 2, 'layout': 'medicalnet', **model})
    with pytest.raises(InputError, match=r'^x\.pth does not fit a ResNet-.*' + re.escape(message)):
        transfer.from_medicalnet('x.pth', published() | change, other)


def test_a_file_is_taken_for_medicalnets_in_its_layout_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_files, 'read', lambda path: published())
    path = str(tmp_path / 'x.pth')
    weights = transfer.read(path, MODEL)
    assert weights.patients == frozenset()
    assert weights.fact.startswith(path)
    with pytest.raises(InputError, match=r"needs config\.model\.layout='medicalnet', not 'hara'"):
        transfer.read(path, ResNet3D(10, 2, width=2))


def test_folders_that_are_no_part_are_refused(tmp_path):
    with pytest.raises(InputError, match='holds no run'):
        transfer.read(str(tmp_path), MODEL)
    (tmp_path / 'config.json').write_text(ml_collections.ConfigDict({'task': 'vqgan'}).to_json())
    with pytest.raises(InputError, match="is no part of an experiment: its task is 'vqgan'; name a folder such as"):
        transfer.read(str(tmp_path), MODEL)
