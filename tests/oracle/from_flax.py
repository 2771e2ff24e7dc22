"""Parameters of `vqroi_jax` under the names and in the layouts of the oracle.

The same mapping serves gradients, which have the parameters' structure. It is written out layer by layer: a
layer that either side renames, adds or drops makes it fail.
"""

from collections.abc import Mapping

import numpy as np
import torch
from flax.traverse_util import flatten_dict


def vqgan_state(parameters: Mapping, stages: int) -> dict[str, torch.Tensor]:
    """Parameters of `vqroi_jax.models.vqgan.VQGAN` with `stages` halvings, as the oracle's without the codebook."""
    paths = {
        'pre_quantisation': 'pre_quantisation',
        'post_quantisation': 'post_quantisation',
        f'decoder.{5 * stages}': 'decoder/last',
        'scorer.0': 'scorer/conv',
        'scorer.2': 'scorer/score',
        'scorer.3': 'scorer/norm',
        'classifier.0': 'classifier/hidden',
        'classifier.1': 'classifier/norm',
        'classifier.4': 'classifier/logits',
    }
    for stage in range(stages):
        paths |= _stage(f'encoder.{4 * stage}', f'encoder.{4 * stage + 1}', 'encoder', str(stage))
        paths |= _block(f'encoder.{4 * stage + 3}', f'encoder/block_{stage}_0')
        paths |= _stage(f'decoder.{5 * stage + 1}', f'decoder.{5 * stage + 2}', 'decoder', str(stage))
        paths |= _block(f'decoder.{5 * stage + 4}', f'decoder/block_{stage}_0')
    paths |= _stage(f'encoder.{4 * stages}', f'encoder.{4 * stages + 1}', 'encoder', 'hidden')
    paths |= _block(f'encoder.{4 * stages + 3}', 'encoder/block_hidden')
    return convert(parameters, paths)


def discriminator_state(parameters: Mapping, stages: int) -> dict[str, torch.Tensor]:
    """Parameters of `vqroi_jax.models.discriminator.Discriminator` with `stages` halvings, as the oracle's."""
    paths = {'head': 'logits', 'stages.0.0': 'conv_0'}
    for stage in range(1, stages):
        paths |= {f'stages.{stage}.0': f'conv_{stage}', f'stages.{stage}.1': f'norm_{stage}'}
    return convert(parameters, paths)


def transformer_state(parameters: Mapping) -> dict[str, torch.Tensor]:
    """Parameters of `vqroi_jax.models.transformer.Transformer`, its blocks stacked, as the oracle's."""
    blocks = parameters['blocks']
    layers = {'norm': 'norm'}
    flat = {'norm': parameters['norm']}
    for number in range(len(blocks['norm_1']['scale'])):
        flat[f'block_{number}'] = {
            name: {kind: array[number] for kind, array in layer.items()} for name, layer in blocks.items()
        }
        names = {'norm_1': 'norm_1', 'norm_2': 'norm_2', 'up': 'mlp.0', 'down': 'mlp.2'}
        names |= {name: f'attention.{name}' for name in ('query', 'key', 'value', 'projection')}
        layers |= {f'blocks.{number}.{theirs}': f'block_{number}/{ours}' for ours, theirs in names.items()}
    (kernel,) = parameters['head'].values()
    return convert(flat, layers) | {
        'head.weight': torch.tensor(np.asarray(kernel).T),
        'tokens.weight': torch.tensor(np.asarray(parameters['token_embedding'])),
        'positions': torch.tensor(np.asarray(parameters['position_embedding'])),
    }


def codebook_state(variables: Mapping) -> dict[str, torch.Tensor]:
    """The collection `codebook` of `vqroi_jax.models.quantizer.Codebook` as the oracle's buffers."""
    return {name: torch.tensor(np.asarray(variables[name])) for name in ('codes', 'usage')}


def part(state: Mapping[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """The entries of one submodule, named as it names them."""
    return {key.removeprefix(f'{name}.'): value for key, value in state.items() if key.startswith(f'{name}.')}


def convert(parameters: Mapping, paths: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Renames and transposes; every leaf has to be mapped, once.

    Args:
        parameters: nested mapping of arrays.
        paths: Flax path of each of the oracle's layers, separated by slashes.

    Raises:
        ValueError: the tree has leaves that the mapping lacks, or the other way round.
    """
    leaves, state = flatten_dict(parameters, sep='/'), {}
    for name, path in paths.items():
        weight = 'scale' if f'{path}/scale' in leaves else 'kernel'
        for theirs, ours in (('weight', weight), ('bias', 'bias')):
            if f'{path}/{ours}' not in leaves:
                raise ValueError(f'no {path}/{ours} for {name}.{theirs}')
            state[f'{name}.{theirs}'] = _to_channels_first(np.asarray(leaves.pop(f'{path}/{ours}')))
    if leaves:
        raise ValueError(f'not mapped: {", ".join(leaves)}')
    return state


def _stage(conv: str, norm: str, network: str, level: str) -> dict[str, str]:
    return {conv: f'{network}/conv_{level}', norm: f'{network}/norm_{level}'}


def _block(name: str, path: str) -> dict[str, str]:
    return {f'{name}.conv1': f'{path}/conv_0', f'{name}.conv2': f'{path}/conv_1', f'{name}.norm': f'{path}/norm'}


def _to_channels_first(array: np.ndarray) -> torch.Tensor:
    """Kernels [k, k, k, in, out] to [out, in, k, k, k] and [in, out] to [out, in]; vectors as they are."""
    if array.ndim > 1:
        array = np.moveaxis(array, (-1, -2), (0, 1))
    return torch.tensor(array)
