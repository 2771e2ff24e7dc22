"""Chips' facts, and machines that need not be there."""

import importlib.util

import pytest

from vqroi_jax.errors import InputError
from vqroi_jax.targets import CHIPS, GIB, find_target

CLOCKS = {'v4': 1.05e9, 'v5e': 1.5e9, 'v5p': 1.75e9}  # Hz, as Austin et al. 2025, How to Scale Your Model, have them


@pytest.mark.parametrize('name', CHIPS)
def test_facts_of_chips_are_plausible(name):
    chip = CHIPS[name]
    assert 16 * GIB <= chip.memory <= 96 * GIB
    assert 100 < chip.flops / chip.bandwidth < 600  # operations a byte at which products and memory balance
    assert 2 < chip.bandwidth / chip.links < 8
    assert chip.clock == pytest.approx(CLOCKS.get(name, 0.0), rel=0.01)
    assert chip.source


def test_this_machine_is_a_target():
    target = find_target('cpu')
    assert (target.platform, target.chip) == ('cpu', None)
    assert {device.platform for device in target.devices} == {'cpu'}
    assert GIB / 8 < target.memory < 1e15


def test_a_gpu_is_a_target_without_being_there():
    target = find_target('cuda:h100')
    assert (target.platform, target.chip, len(target.devices)) == ('cuda', CHIPS['h100'], 1)


@pytest.mark.parametrize('name', ['', 'v5e', 'v5e:4', 'v9:2x2', 'cuda', 'cuda:v5e', 'v5e:4x4x', 'h100:2x2'])
def test_an_unknown_target_is_refused(name):
    with pytest.raises(InputError, match=r'config.target=.*expected cpu, cuda:GPU \(one of a100, h100\).*v5e:4x4'):
        find_target(name)


def test_without_libtpu_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(InputError, match=r'pip install "vqroi_jax\[tpu\]"'):
        find_target('v5e:4x4')


@pytest.mark.parametrize(('name', 'chips'), [('v5e:4x4', 16), ('v5e:1x1', 1), ('v5p:2x2x1', 4), ('v4:2x2x1', 4)])
def test_tpu_topologies_are_described_by_libtpu(name, chips):
    pytest.importorskip('libtpu', reason='libtpu describes TPUs; pip install "vqroi_jax[tpu]"')
    assert len(find_target(name).devices) == chips


def test_a_topology_that_there_is_not_is_refused():
    pytest.importorskip('libtpu', reason='libtpu describes TPUs; pip install "vqroi_jax[tpu]"')
    with pytest.raises(InputError, match=r"config.target='v5e:3x3'"):
        find_target('v5e:3x3')
