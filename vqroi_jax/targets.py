"""Machines to compile for without having them, and what their makers say of one chip.

A target is `cpu` (this machine), `cuda:GPU` with a GPU of `CHIPS`, or a TPU topology such as `v5e:4x4`, which libtpu
describes and compiles for on any machine.
"""

import dataclasses
import importlib.util
import os
import re
from collections.abc import Sequence
from importlib import metadata

import jax
from jax.experimental import topologies

from vqroi_jax.errors import InputError

GB, MIB, GIB = 1e9, 2.0**20, 2.0**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Facts of one accelerator chip.

    Attributes:
        platform: as JAX calls it: 'tpu' or 'cuda'.
        memory: bytes of main memory (HBM).
        flops: bfloat16 matrix products a second at most, two operations a multiplication.
        bandwidth: of its main memory, bytes a second.
        links: bytes a second that it can send to other chips, over all links: half of a figure for both directions.
        clock: of its matrix units, Hz: `flops` over what these do a cycle; 0 where that is not documented.
        source: where all this is written.
    """

    platform: str
    memory: float
    flops: float
    bandwidth: float
    links: float
    clock: float
    source: str


_TPU = 'https://docs.cloud.google.com/tpu/docs/'
# A v4 and a v5p have two cores a chip with four matrix units of 128 x 128 each, a v5e one core with four.
_UNITS = 2 * 4 * 128**2
CHIPS = {
    'v4': Chip(
        'tpu', 32 * GIB, 275e12, 1200 * GB, 300 * GB, 275e12 / (2 * _UNITS), _TPU + 'v4; links: Jouppi et al. 2023'
    ),
    'v5e': Chip('tpu', 16 * GIB, 197e12, 819 * GB, 200 * GB, 197e12 / _UNITS, _TPU + 'v5e'),
    'v5p': Chip('tpu', 95 * GIB, 459e12, 2765 * GB, 600 * GB, 459e12 / (2 * _UNITS), _TPU + 'v5p'),
    'v6e': Chip('tpu', 32 * GIB, 918e12, 1638 * GB, 400 * GB, 0.0, _TPU + 'v6e'),
    'a100': Chip('cuda', 80 * GIB, 312e12, 2039 * GB, 300 * GB, 0.0, 'NVIDIA A100 data sheet (SXM, 80 GB)'),
    'h100': Chip('cuda', 80 * GIB, 989e12, 3350 * GB, 450 * GB, 0.0, 'NVIDIA H100 data sheet (SXM, dense)'),
}


@dataclasses.dataclass(frozen=True)
class Target:
    """A machine to compile for.

    Attributes:
        name: as the config has it.
        platform: that programs are lowered for: 'cpu', 'cuda' or 'tpu'.
        chip: its facts; None for this machine's CPU.
        memory: bytes of main memory for each device; this machine's is shared by its CPU devices.
        devices: to compile for; of a 'cuda' target, this machine's CPU.
        versions: of what compiles, by package.
    """

    name: str
    platform: str
    chip: Chip | None
    memory: float
    devices: Sequence[jax.Device]
    versions: dict[str, str]


def find_target(name: str) -> Target:
    """The target of this name.

    Args:
        name: 'cpu', 'cuda:GPU' or 'GENERATION:TOPOLOGY', such as 'v5e:4x4'.

    Raises:
        InputError: there is no such target, or libtpu is not installed.
    """
    versions = {package: metadata.version(package) for package in ('jax', 'jaxlib')}
    if name == 'cpu':
        devices = jax.devices('cpu')
        memory = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / len(devices)
        return Target(name, 'cpu', None, memory, devices, versions)
    family, _, rest = name.partition(':')
    if family == 'cuda' and rest in CHIPS and CHIPS[rest].platform == 'cuda':
        return Target(name, 'cuda', CHIPS[rest], CHIPS[rest].memory, jax.devices('cpu')[:1], versions)
    tpu = family in CHIPS and CHIPS[family].platform == 'tpu'
    if not tpu or not re.fullmatch(r'\d+(x\d+){1,2}', rest):
        gpus, tpus = (
            ', '.join(key for key, chip in CHIPS.items() if chip.platform == platform) for platform in ('cuda', 'tpu')
        )
        raise InputError(
            f'config.target={name!r}: expected cpu, cuda:GPU (one of {gpus}), or a TPU topology such as v5e:4x4 or '
            f'v5p:2x2x1 (generations {tpus})'
        )
    if importlib.util.find_spec('libtpu') is None:
        raise InputError(
            f'config.target={name!r}: compiling for TPUs needs libtpu, which is not installed; pip install '
            '"vqroi_jax[tpu]" (no TPU is needed)'
        )
    versions['libtpu'] = metadata.version('libtpu')
    return Target(name, 'tpu', CHIPS[family], CHIPS[family].memory, _describe(name, family, rest), versions)


def _describe(name: str, family: str, sides: str) -> Sequence[jax.Device]:
    """The devices of a TPU topology; of a v4, whole chips."""
    for variable, value in (
        ('TPU_SKIP_MDS_QUERY', '1'),  # asks no cloud what machine this is
        ('TPU_WORKER_HOSTNAMES', 'localhost'),  # without this and the next it complains; neither changes anything
        ('TPU_ACCELERATOR_TYPE', 'v5litepod-4'),
        ('ALLOW_MULTIPLE_LIBTPU_LOAD', '1'),  # uses no TPU, so it may run beside what does
    ):
        os.environ.setdefault(variable, value)
    options: dict[str, list[int] | str] = {}
    if set(sides.split('x')) == {'1'}:
        options['chips_per_host_bounds'] = [1, 1, 1]  # otherwise a host has 2 x 2
    if family == 'v4':
        options['chip_config_name'] = 'megacore'
    try:
        return topologies.get_topology_desc(platform='tpu', topology_name=name, **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise InputError(f'config.target={name!r}: {error}') from None
