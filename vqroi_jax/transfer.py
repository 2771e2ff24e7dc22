"""Weights that a classifier's features begin with: of an earlier experiment's part, or of MedicalNet's files.

weights on disk -> `read` -> `Weights` -> the start of `train_classifier`'s first stage

The head is never taken over.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from vqroi_jax import torch_files
from vqroi_jax.errors import InputError
from vqroi_jax.models.resnet3d import BLOCKS, ResNet3D, is_head
from vqroi_jax.training.checkpoints import read_checkpoint, saved_steps
from vqroi_jax.training.durations import to_steps
from vqroi_jax.workdir import CONFIG_FILE, read_config

ROIS_FILE = 'rois.json'  # of a part: what it learns from

_SAME = ('layout', 'standardise')  # what a network's features depend on, and their shapes do not show
_MEDICALNET = {'weight': ('params', 'scale'), 'bias': ('params', 'bias'),
               'running_mean': ('batch_stats', 'mean'), 'running_var': ('batch_stats', 'var')}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Weights:
    """What a stage of training begins with, or has learnt.

    Attributes:
        params: float32 parameters of a `ResNet3D`, with or without its head.
        statistics: its collection `batch_stats`.
        patients: real patients that they were learnt from, as far as is known; none of MedicalNet's are.
        generators: patients that the generators of the synthetic ROIs which they were learnt from were trained on; None
            where that is not known.
        fact: where they come from and what a reader should know of that, as a line of text.
    """

    params: dict[str, Any]
    statistics: dict[str, Any]
    patients: frozenset[str]
    generators: frozenset[str] | None
    fact: str

    @functools.cached_property
    def sha256(self) -> str:
        """Of all of it but the fact."""
        digest = hashlib.sha256()
        for name, array in sorted(flatten_dict({'params': self.params, 'statistics': self.statistics}).items()):
            digest.update(f'{name}'.encode())
            digest.update(np.ascontiguousarray(array).data)
        known = [None if group is None else sorted(group) for group in (self.patients, self.generators)]
        digest.update(json.dumps(known).encode())
        return digest.hexdigest()


def read(path: str, model: ResNet3D) -> Weights:
    """Reads the features of a part's folder, or of a file of MedicalNet's weights.

    Args:
        path: as the user gave it.
        model: the network that they are for.

    Raises:
        InputError: there is nothing like that, or it is of another network.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        return _read_part(place, model)
    if model.layout != 'medicalnet':
        raise InputError(
            f'{path} is no folder of a part of an experiment; if it is a file of MedicalNet, its network needs '
            f"config.model.layout='medicalnet', not {model.layout!r}: see configs/classifier.py:medicalnet"
        )
    params, statistics = from_medicalnet(path, torch_files.read(place), model)
    fact = (
        f"{path}, weights of MedicalNet, learnt by segmenting scans of public challenges. If the cohort's scans are "
        'public too, as those of BraTS are, the weights may know images of test patients, though not their classes.'
    )
    return Weights(params, statistics, frozenset(), frozenset(), fact)


def from_medicalnet(
    path: str, arrays: Mapping[str, np.ndarray], model: ResNet3D
) -> tuple[dict[str, Any], dict[str, Any]]:
    """MedicalNet's arrays as parameters and statistics of a network.

    Args:
        path: of their file, for messages.
        arrays: by MedicalNet's names. Those of its segmentation head (`conv_seg`), and the numbers of batches that its
            norms have counted, are left out.
        model: the network; its layout should be 'medicalnet'.

    Raises:
        InputError: they are of another network.
    """
    shapes = _shapes(model)
    places = {}  # by MedicalNet's name: collection, layer, array
    for theirs, ours in _medicalnet_layers(model):
        if 'kernel' in shapes['params'][ours]:
            places[f'{theirs}.weight'] = 'params', ours, 'kernel'
        else:
            places |= {f'{theirs}.{name}': (kind, ours, array) for name, (kind, array) in _MEDICALNET.items()}
    wanted = {}
    for name, (kind, layer, array) in places.items():
        shape = shapes[kind][layer][array].shape
        wanted[name] = (*shape[:-3:-1], *shape[:-2]) if array == 'kernel' else shape
    arrays = {
        name: array
        for name, array in arrays.items()
        if not name.startswith('conv_seg.') and not name.endswith('.num_batches_tracked')
    }
    torch_files.check(path, arrays, wanted, _described(model))
    found: dict[str, dict] = {'params': {}, 'batch_stats': {}}
    for name, (kind, layer, array) in places.items():
        value = arrays[name].astype(np.float32)
        found[kind].setdefault(layer, {})[array] = np.moveaxis(value, (0, 1), (-1, -2)) if array == 'kernel' else value
    return found['params'], found['batch_stats']


def _medicalnet_layers(model: ResNet3D) -> Iterator[tuple[str, str]]:
    """Pairs of names: of MedicalNet's layers, and of ours."""
    yield 'conv1', 'conv'
    yield 'bn1', 'norm'
    ours = _shapes(model)['params']
    for stage, number in enumerate(BLOCKS[model.depth]):
        for block in range(number):
            theirs, name = f'layer{stage + 1}.{block}', f'stage_{stage}_block_{block}'
            for layer in range(2 if model.depth < 50 else 3):
                yield f'{theirs}.conv{layer + 1}', f'{name}_conv_{layer}'
                yield f'{theirs}.bn{layer + 1}', f'{name}_norm_{layer}'
            if f'{name}_shortcut' in ours:
                yield f'{theirs}.downsample.0', f'{name}_shortcut'
                yield f'{theirs}.downsample.1', f'{name}_shortcut_norm'


def _read_part(folder: Path, model: ResNet3D) -> Weights:
    config = read_config(folder)
    if not config.task.startswith('classifier.'):
        raise InputError(
            f'{folder} is no part of an experiment: its task is {config.task!r}; name a folder such as '
            'EXPERIMENT/parts/ARM/run_0/finetune'
        )
    step, stored = read_checkpoint(folder, ('params', 'statistics'), 'best')
    kept = {kind: _features_of(stored[kind]) for kind in ('params', 'statistics')}
    shapes = _shapes(model)
    wanted = {'params': _features_of(shapes['params']), 'statistics': shapes['batch_stats']}
    there, here = ({'/'.join(name): leaf for name, leaf in flatten_dict(tree).items()} for tree in (kept, wanted))
    torch_files.check(folder, there, {name: leaf.shape for name, leaf in here.items()}, _described(model))
    for field in _SAME:
        if config.model[field] != getattr(model, field):
            raise InputError(
                f'{folder / CONFIG_FILE} has model.{field}={config.model[field]!r}, config.model.{field} is '
                f'{getattr(model, field)!r}: the features would not be the same'
            )
    learnt = json.loads((folder / ROIS_FILE).read_text(encoding='utf-8'))
    total = to_steps(config.training.duration, len(learnt['train']) / config.batch_size, 'training.duration')
    if (last := saved_steps(folder)[-1]) < total:
        raise InputError(f'{folder} is unfinished (step {last} of {total}); train it to the end')
    fact, generators = f'{folder}, step {step}', learnt.get('generators')  # parts of old have no such record
    if generators is None:
        fact += '; from which patients the generator of their synthetic ROIs has learnt is not known'
    return Weights(
        **kept,
        patients=frozenset(learnt['patients']),
        generators=None if generators is None else frozenset(generators),
        fact=fact,
    )


def _features_of(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {name: leaf for name, leaf in tree.items() if not is_head(name)}


def _shapes(model: ResNet3D) -> dict[str, Any]:
    """Shapes of the network's collections; they do not depend on the size of the volumes."""
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 16, 16, 16, 1)))


def _described(model: ResNet3D) -> str:
    return f'a ResNet-{model.depth} of width {model.width} with shortcuts {model.shortcut} (config.model)'
