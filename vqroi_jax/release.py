"""The tensors of the authors' PyTorch code, by name, and where each stands in our parameters: pure functions on NumPy.

The authors' stage 1 file has six networks (`Encoder`, `Decoder`, `ScoreNet`, `Codebook`, `preV_conv`, `postV_conv`)
and an optimiser's state, but no discriminator; a stage 2 file has the transformer and a copy of those six networks
under other names. Names here are dotted, as in `Encoder.conv1.conv.0.weight`. Some tensors stand in a file under
several names (the two norms of a ResBlock, for instance, are one), and some are never read by the authors' code.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vqroi_jax.errors import InputError

Tensors = dict[str, np.ndarray]

# Stage 1's networks under their names in its own file, and in a file of stage 2.
NETWORKS = {
    'Encoder': 'vqgan_encoder',
    'Decoder': 'vqgan_decoder',
    'preV_conv': 'prev_conv',
    'postV_conv': 'postV_conv',
    'ScoreNet': 'score_net',
    'Codebook': 'codebook',
}
GROUPS = 8  # of the group normalisations in the authors' code
HEADS = 16  # of the attention in the authors' code
POSITIONS = 'transformer.pos_emb'  # of which the authors' code has as many as there are codes, tokens or not

_UNIT = 1e-3  # by which a code's length may differ from 1


class Place(NamedTuple):
    """Where a tensor stands in our parameters."""

    path: str  # in the tree, separated by slashes
    layer: int | None = None  # along the first axis, where layers are stacked


class Unused(NamedTuple):
    """A tensor that the authors' code has and never reads, or that is a constant; we have no place for it."""

    shape: tuple[int, ...]
    fill: float = 0.0  # its value before training
    lower_triangle: bool = False  # 0 above the diagonal of the last two axes

    def make(self) -> np.ndarray:
        """The tensor before training, float32."""
        array = np.full(self.shape, self.fill, np.float32)
        return np.tril(array) if self.lower_triangle else array


@dataclasses.dataclass(frozen=True)
class VQGANSizes:
    """Everything that scales stage 1, the latent grid's shape excepted."""

    channels: tuple[int, ...]  # after each halving
    hidden: int
    codes: int
    code_features: int
    encoder_res_blocks: tuple[int, ...]  # 0 or 1 after each halving
    decoder_res_blocks: tuple[int, ...]  # 0 or 1 after each doubling, from the latent grid outwards
    classifier_hidden: int
    classes: int
    regions: int  # of the latent grid

    @classmethod
    def read(cls, path: Any, tensors: Mapping[str, np.ndarray]) -> 'VQGANSizes':
        """Sizes of the tensors of a file, by the names of a stage 1 file.

        Args:
            path: of the file, for messages.
            tensors: by name.

        Raises:
            InputError: a tensor that tells a size is missing.
        """

        def shape(name: str, axes: int) -> tuple[int, ...]:
            return _shape(path, tensors, name, axes)

        levels = _count(tensors, 'Encoder.conv') - 1
        if levels < 1:
            raise InputError(f'{path} has no Encoder.conv2: expected an encoder with one halving or more')
        inputs = shape('ScoreNet.classifier.0.weight', 2)
        codes, code_features = shape('Codebook.embedding.weight', 2)
        if inputs[1] % code_features:
            raise InputError(
                f'{path}: ScoreNet.classifier.0.weight reads {inputs[1]} numbers, which are no whole number of codes '
                f'of {code_features}'
            )
        return cls(
            channels=tuple(shape(f'Encoder.conv{level + 1}.conv.0.weight', 5)[0] for level in range(levels)),
            hidden=shape(f'Encoder.conv{levels + 1}.conv.0.weight', 5)[0],
            codes=codes,
            code_features=code_features,
            encoder_res_blocks=tuple(_has(tensors, f'Encoder.res_block{n + 1}.') for n in range(levels)),
            decoder_res_blocks=tuple(_has(tensors, f'Decoder.res_block{levels - n}.') for n in range(levels)),
            classifier_hidden=inputs[0],
            classes=shape('ScoreNet.classifier.4.weight', 2)[0],
            regions=inputs[1] // code_features,
        )

    def places(self) -> dict[str, Place]:
        """Where each tensor that we use stands in {'params': …, 'codebook': …} of stage 1."""
        levels = len(self.channels)
        places: dict[str, Place] = {}
        for level in range(levels + 1):
            here = 'hidden' if level == levels else str(level)
            norm, conv, same = (f'Encoder.conv{level + 1}.{part}' for part in ('group_norm', 'conv.0', 'conv.1'))
            places |= _convolution(norm, conv, same, f'params/encoder/conv_{here}', f'params/encoder/norm_{here}')
            if level == levels or self.encoder_res_blocks[level]:
                block = 'block_hidden' if level == levels else f'block_{level}_0'
                places |= _res_block(f'Encoder.res_block{level + 1}', f'params/encoder/{block}')
        for level in range(levels):
            norm, conv, same = (f'Decoder.upsize{levels - level}.{part}' for part in ('group_norm', 'up.1', 'up.2'))
            places |= _convolution(norm, conv, same, f'params/decoder/conv_{level}', f'params/decoder/norm_{level}')
            if self.decoder_res_blocks[level]:
                places |= _res_block(f'Decoder.res_block{levels - level}', f'params/decoder/block_{level}_0')
        return {
            **places,
            **_layer('Decoder.final_conv', 'params/decoder/last'),
            **_layer('preV_conv.conv', 'params/pre_quantisation'),
            **_layer('postV_conv.conv', 'params/post_quantisation'),
            **_norm('ScoreNet.groupnorm1', 'params/scorer/norm'),
            **_layer('ScoreNet.score_pred_net.1', 'params/scorer/conv'),
            **_layer('ScoreNet.score_pred_net.3', 'params/scorer/score'),
            **_norm('ScoreNet.score_pred_net.4', 'params/scorer/norm'),
            **_norm('ScoreNet.group_norm', 'params/classifier/norm'),
            **_layer('ScoreNet.classifier.0', 'params/classifier/hidden'),
            **_norm('ScoreNet.classifier.1', 'params/classifier/norm'),
            **_layer('ScoreNet.classifier.4', 'params/classifier/logits'),
            'Codebook.cluster_size': Place('codebook/usage'),
            'Codebook.embedding.weight': Place('codebook/codes'),
        }

    def unused(self) -> dict[str, Unused]:
        """The tensors that have no place."""
        features, found = self.code_features, {}
        for norm in ('att.norm', 'group_norm_att'):
            found[f'ScoreNet.{norm}.gn.weight'] = Unused((features,), fill=1.0)
            found[f'ScoreNet.{norm}.gn.bias'] = Unused((features,))
        for name, axes in (('q', 3), ('k', 3), ('v', 3), ('proj_out', 2)):
            found[f'ScoreNet.att.{name}.weight'] = Unused((features, features, *[1] * axes))
            found[f'ScoreNet.att.{name}.bias'] = Unused((features,))
        return {
            **found,
            'Codebook.embedding.cluster_size': Unused((self.codes,)),
            'Codebook.embedding.embed_avg': Unused((self.codes, features)),
            'Codebook.embedding.initted': Unused((1,), fill=1.0),
        }


@dataclasses.dataclass(frozen=True)
class TransformerSizes:
    """Everything that scales stage 2's network, the number of heads excepted."""

    layers: int
    width: int
    vocabulary: int
    classes: int
    positions: int  # that the file has; at least as many as there are tokens

    @classmethod
    def read(cls, path: Any, tensors: Mapping[str, np.ndarray]) -> 'TransformerSizes':
        """Sizes of the tensors of a file of stage 2.

        Args:
            path: of the file, for messages.
            tensors: by name.

        Raises:
            InputError: a tensor that tells a size is missing.
        """
        vocabulary, width = _shape(path, tensors, 'transformer.tok_emb.weight', 2)
        layers = _count(tensors, 'transformer.blocks.', first=0)
        if layers < 1:
            raise InputError(f'{path} has no transformer.blocks.0')
        return cls(
            layers=layers,
            width=width,
            vocabulary=vocabulary,
            classes=_shape(path, tensors, 'linear_prob_head.weight', 2)[0],
            positions=_shape(path, tensors, POSITIONS, 3)[1],
        )

    def places(self) -> dict[str, Place]:
        """Where each tensor that we use stands in {'params': …} of stage 2."""
        places = {
            POSITIONS: Place('params/position_embedding'),
            'transformer.tok_emb.weight': Place('params/token_embedding'),
        }
        names = {'ln1': 'norm_1', 'ln2': 'norm_2', 'mlp.0': 'up', 'mlp.2': 'down', 'attn.proj': 'projection'}
        names |= {f'attn.{name}': name for name in ('key', 'query', 'value')}
        for layer in range(self.layers):
            for theirs, ours in names.items():
                weight = 'scale' if ours.startswith('norm') else 'kernel'
                for end, leaf in (('weight', weight), ('bias', 'bias')):
                    places[f'transformer.blocks.{layer}.{theirs}.{end}'] = Place(f'params/blocks/{ours}/{leaf}', layer)
        return {
            **places,
            'transformer.ln_f.weight': Place('params/norm/scale'),
            'transformer.ln_f.bias': Place('params/norm/bias'),
            'transformer.head.weight': Place('params/head/kernel'),
        }

    def unused(self) -> dict[str, Unused]:
        """The tensors that have no place."""
        mask = Unused((1, 1, self.positions, self.positions), fill=1.0, lower_triangle=True)
        return {
            **{f'transformer.blocks.{layer}.attn.mask': mask for layer in range(self.layers)},
            'linear_prob_head.weight': Unused((self.classes, self.vocabulary)),
            'linear_prob_head.bias': Unused((self.classes,)),
        }


def rename(tensors: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The tensors of some networks, which are the first part of a name, under those networks' other names."""
    parts = ((name.partition('.'), value) for name, value in tensors.items())
    return {f'{names[network]}.{rest}': value for (network, _, rest), value in parts if network in names}


def shapes(places: Mapping[str, Place], tree: Any) -> dict[str, tuple[int, ...]]:
    """The shape in a file of each tensor that stands in our parameters.

    Args:
        places: of the tensors.
        tree: of our parameters, or their shapes.

    Raises:
        ValueError: the tree has leaves without a place, or the other way round.
    """
    leaves = flatten_dict(tree, sep='/')
    if left := leaves.keys() ^ {place.path for place in places.values()}:
        raise ValueError(f'not on both sides: {", ".join(sorted(left))}')
    result = {}
    for name, place in places.items():
        shape = leaves[place.path].shape
        empty = jax.ShapeDtypeStruct(shape if place.layer is None else shape[1:], np.float32)
        result[name] = jax.eval_shape(lambda array, place=place: _to_theirs(array, place), empty).shape
    return result


def to_tree(path: Any, tensors: Mapping[str, np.ndarray], places: Mapping[str, Place]) -> dict:
    """Tensors of a file as our parameters, float32, bit by bit.

    Args:
        path: of the file, for messages.
        tensors: by name; of the right shapes.
        places: of those to take.

    Raises:
        InputError: a tensor is not float32, has values that are not finite, or differs from another that is the same
            in the authors' code.
    """
    leaves: dict[str, list[np.ndarray]] = {}
    taken: dict[Place, str] = {}
    for name, place in places.items():
        array = tensors[name]
        if array.dtype != np.float32:
            raise InputError(f'{path}: {name} is {array.dtype}, float32 is expected')
        if not np.isfinite(array).all():
            raise InputError(f'{path}: {name} has values that are not finite')
        if place in taken:
            if array.tobytes() != tensors[taken[place]].tobytes():
                raise InputError(f'{path}: {name} and {taken[place]} are one tensor in the network and differ here')
            continue
        taken[place] = name
        leaves.setdefault(place.path, []).append(_to_ours(array, place))
    stacked = {place.path for place in places.values() if place.layer is not None}
    arrays = {path: np.stack(parts) if path in stacked else parts[0] for path, parts in leaves.items()}
    return unflatten_dict({path: np.array(array, order='C') for path, array in arrays.items()}, sep='/')


def from_tree(tree: Any, places: Mapping[str, Place]) -> Tensors:
    """Our parameters as the tensors of a file: what `to_tree` has read, bit by bit."""
    leaves = flatten_dict(tree, sep='/')
    tensors = {}
    for name, place in places.items():
        leaf = np.asarray(leaves[place.path])
        tensors[name] = _to_theirs(leaf if place.layer is None else leaf[place.layer], place)
    return tensors


def cut_positions(path: Any, tensors: Mapping[str, np.ndarray], length: int) -> tuple[Tensors, np.ndarray]:
    """Takes away the embeddings of positions that no token has.

    Args:
        path: of the file, for messages.
        tensors: by name; the embeddings are float `[1, P, W]`.
        length: tokens a sample, L.

    Returns:
        The tensors with L positions, and what was taken away, `[1, P - L, W]`.

    Raises:
        InputError: there are fewer positions than tokens.
    """
    embedding = tensors[POSITIONS]
    if embedding.shape[1] < length:
        raise InputError(f'{path}: {POSITIONS} has {embedding.shape[1]} positions, the latent grid {length} tokens')
    return {**tensors, POSITIONS: embedding[:, :length]}, embedding[:, length:]


def join_positions(tensors: Tensors, rest: np.ndarray) -> Tensors:
    """The reverse of `cut_positions`."""
    return {**tensors, POSITIONS: np.concatenate([tensors[POSITIONS], rest], axis=1)}


def check_codes(path: Any, codes: np.ndarray) -> None:
    """Refuses a codebook `[K, C]` whose codes are not of unit length, as those of one that was never trained.

    Raises:
        InputError: saying how long they are.
    """
    lengths = np.linalg.norm(codes.astype(np.float64), axis=1)
    if np.abs(lengths - 1).max() > _UNIT:
        raise InputError(
            f'{path}: the codebook was not trained: its codes have lengths from {lengths.min():.3g} to '
            f'{lengths.max():.3g}, 1 is expected'
        )


def find_grid(path: Any, regions: int, grid: tuple[int, ...]) -> tuple[int, int, int]:
    """The latent grid's depth, height and width, of which a file tells the product alone.

    Args:
        path: of the file, for messages.
        regions: the product.
        grid: what is known of it; empty: it is a cube.

    Raises:
        InputError: the product is another, or that of no cube.
    """
    side = round(regions ** (1 / 3))
    found = tuple(grid) or (side,) * 3
    if len(found) != 3 or min(found) < 1 or math.prod(found) != regions:
        given = f'config.grid={tuple(grid)}' if grid else 'no cube'
        raise InputError(
            f'{path} has a latent grid of {regions} regions, which is {given}: give its depth, height and width with '
            '--config.grid'
        )
    return found


def _to_ours(array: np.ndarray, place: Place) -> np.ndarray:
    """Convolutions [out, in, d, h, w] to [d, h, w, in, out], linear layers [out, in] to [in, out]."""
    if place.path.endswith('/kernel'):
        return array.transpose(*range(2, array.ndim), 1, 0)
    return array[0] if place.path.endswith('/position_embedding') else array


def _to_theirs(array: Any, place: Place) -> Any:
    """The reverse; of NumPy's arrays or JAX's."""
    if place.path.endswith('/kernel'):
        return array.transpose(array.ndim - 1, array.ndim - 2, *range(array.ndim - 2))
    return array[None] if place.path.endswith('/position_embedding') else array


def _layer(name: str, path: str) -> dict[str, Place]:
    return {f'{name}.weight': Place(f'{path}/kernel'), f'{name}.bias': Place(f'{path}/bias')}


def _norm(name: str, path: str) -> dict[str, Place]:
    return {f'{name}.gn.weight': Place(f'{path}/scale'), f'{name}.gn.bias': Place(f'{path}/bias')}


def _convolution(norm: str, conv: str, same_norm: str, conv_path: str, norm_path: str) -> dict[str, Place]:
    """A convolution and the norm behind it, which stands in the file twice."""
    return {**_norm(norm, norm_path), **_layer(conv, conv_path), **_norm(same_norm, norm_path)}


def _res_block(name: str, path: str) -> dict[str, Place]:
    """A ResBlock, whose one norm stands in the file three times."""
    return {
        **_norm(f'{name}.group_norm', f'{path}/norm'),
        **_layer(f'{name}.conv_module.0', f'{path}/conv_0'),
        **_norm(f'{name}.conv_module.1', f'{path}/norm'),
        **_layer(f'{name}.conv_module.3', f'{path}/conv_1'),
        **_norm(f'{name}.conv_module.4', f'{path}/norm'),
    }


def _has(names: Collection[str], beginning: str) -> int:
    return int(any(name.startswith(beginning) for name in names))


def _count(names: Collection[str], beginning: str, first: int = 1) -> int:
    """How many numbered parts there are, by the highest number that follows `beginning`; at most one a name."""
    numbers = (name.removeprefix(beginning).partition('.')[0] for name in names if name.startswith(beginning))
    return min(max((int(n) - first + 1 for n in numbers if n.isdecimal()), default=0), len(names))


def _shape(path: Any, tensors: Mapping[str, np.ndarray], name: str, axes: int) -> tuple[int, ...]:
    if name not in tensors:
        raise InputError(f'{path} has no {name}')
    shape = tensors[name].shape
    if len(shape) != axes or 0 in shape:
        raise InputError(f'{path}: {name} has the shape {shape}; {axes} axes are expected')
    return shape
