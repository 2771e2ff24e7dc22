"""Contents of files as the authors' code saves them, at small sizes and with random tensors.

Names and shapes are those of `release_tensors.json`; each number of a shape is replaced by a small one, network by
network. Which names are one tensor is written out here by hand.
"""

import json
import math
import pathlib
import re
from collections.abc import Iterator

import numpy as np

LISTED = json.loads(pathlib.Path(__file__).with_name('release_tensors.json').read_text())
LAYERS = 24  # of the listed transformer

CHANNELS = {32: 8, 64: 16, 128: 24, 256: 32, 512: 40}  # of encoder and decoder
HIDDEN, FEATURES, CODES, CLASSES, WIDTH = 96, 16, 20, 3, 32


def listed_stage2(layers: int = LAYERS) -> dict[str, list[int]]:
    """Names and shapes of the listed tensors of a stage 2 file that are not stage 1's, with so many layers."""
    names = {}
    for name, shape in LISTED['stage2'].items():
        names |= {name.replace('.N.', f'.{n}.'): shape for n in range(layers if '.N.' in name else 1)}
    return names


def as_in_stage2(tensors: dict) -> dict:
    """Stage 1's tensors under the names that they have in a stage 2 file."""
    prefixes = LISTED['stage2_prefixes']
    return {prefixes[name.partition('.')[0]] + name.partition('.')[2]: value for name, value in tensors.items()}


def stage1(grid: tuple[int, int, int], seed: int = 0) -> dict[str, np.ndarray]:
    """Tensors of a stage 1 file by dotted names, for a latent grid."""
    latent = {128: FEATURES, 512: CHANNELS[512]}
    numbers = {
        'Encoder': CHANNELS,
        'Decoder': CHANNELS,
        'preV_conv': latent,
        'postV_conv': latent,
        'ScoreNet': {128: FEATURES, 1024: HIDDEN, 65536: FEATURES * math.prod(grid), 2: CLASSES},
        'Codebook': {128: FEATURES, 1024: CODES},
    }
    shapes = {
        name: [numbers[name.partition('.')[0]].get(n, n) for n in shape] for name, shape in LISTED['stage1'].items()
    }
    tensors = _random(shapes, seed)
    for name, others in _same(tensors):
        tensors |= {other: tensors[name].copy() for other in others}
    return tensors


def stage1_file(tensors: dict[str, np.ndarray]) -> dict:
    """What a stage 1 file holds: a dict a network, and the optimiser's state."""
    contents = {}
    for name, array in tensors.items():
        network, _, rest = name.partition('.')
        contents.setdefault(network, {})[rest] = array
    moment = np.random.default_rng(9).normal(size=(3, 2)).astype(np.float32)
    group = {'lr': 5e-5, 'betas': (0.5, 0.9), 'foreach': None, 'params': [0, 1]}
    contents['OptimizerV_state_dict'] = {
        'state': {0: {'step': np.array(7.0, np.float32), 'exp_avg': moment}},
        'param_groups': [group],
    }
    return contents


def stage2(grid: tuple[int, int, int], layers: int = 2, seed: int = 1) -> dict[str, np.ndarray]:
    """Tensors of a stage 2 file; as many positions as codes, which are more than there are tokens."""
    vocabulary = CODES + 1 + CLASSES
    shapes = {}
    for name, shape in listed_stage2(layers).items():
        numbers = {1024: WIDTH, 4096: 4 * WIDTH, 1027: vocabulary, 2: CLASSES}
        shapes[name] = [numbers.get(n, n) for n in shape]
    shapes['transformer.pos_emb'] = [1, CODES, WIDTH]
    for layer in range(layers):
        shapes[f'transformer.blocks.{layer}.attn.mask'] = [1, 1, CODES, CODES]
    return as_in_stage2(stage1(grid, seed)) | _random(shapes, seed + 1)


def _random(shapes: dict[str, list[int]], seed: int) -> dict[str, np.ndarray]:
    """None left at zero or one; kernels of the scale of their fan-in, codes of unit length."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in shapes.items():
        array = rng.normal(size=shape)
        if name == 'Codebook.embedding.weight':
            array /= np.linalg.norm(array, axis=1, keepdims=True)
        elif name.endswith('cluster_size'):
            array = np.abs(array)
        elif name.endswith('.weight') and len(shape) > 1:
            array *= math.prod(shape[1:]) ** -0.5
        elif name.endswith('.weight'):
            array = 1 + 0.1 * array
        else:
            array *= 0.1
        tensors[name] = array.astype(np.float32)
    return tensors


def _same(tensors: dict[str, np.ndarray]) -> Iterator[tuple[str, list[str]]]:
    """Each tensor that stands in a file under several names, with its other names."""
    for name in tensors:
        if name.startswith('ScoreNet.groupnorm1.'):
            yield name, [name.replace('groupnorm1', 'score_pred_net.4')]
        elif name.startswith('ScoreNet.group_norm.'):
            yield name, [name.replace('group_norm', 'classifier.1')]
        elif match := re.match(r'(Encoder|Decoder)\.(conv|upsize|res_block)\d\.group_norm\.', name):
            parts = {'conv': ['conv.1'], 'upsize': ['up.2'], 'res_block': ['conv_module.1', 'conv_module.4']}
            yield name, [name.replace('group_norm', part) for part in parts[match[2]]]
