"""The command `export`: a trained generator as one file that draws without this package.

    stage 2 run -> programs (StableHLO for several platforms) and weights -> generator.zip

The file is a zip archive that Python imports from: `exported_generator.py` as `generator`, two programs that
`jax.export` has serialised, the weights beside them as .npy files, and facts and README as text. Weights are arguments
of the programs: as constants in them they would take twice the time and many times the memory to compile.
"""

import dataclasses
import json
import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vqroi_jax import decoding
from vqroi_jax.code_version import code_version
from vqroi_jax.decoding import UNKNOWN, Sampling
from vqroi_jax.errors import InputError
from vqroi_jax.model_card import CARD_FILE
from vqroi_jax.templates import render_text
from vqroi_jax.trained import TrainedTransformer, load_transformer
from vqroi_jax.workdir import open_workdir, require_space, write_atomically

FILE = 'generator.zip'
README = 'README.txt'
PLATFORMS = ('cpu', 'cuda', 'rocm', 'tpu')
FORMAT = 1  # of the file

# Bytes that Python imports from: zip archives without the 64-bit extension, which is written from 2 GiB on.
_LARGEST = 2**31 - 2**24
_DISK_RESERVE = 2**24  # bytes, for what is small


def run(config: ConfigDict, workdir: str | Path) -> None:
    """Runs `--config=configs/export.py`."""
    if unknown := [name for name in config.platforms if name not in PLATFORMS]:
        raise InputError(f'config.platforms: {unknown[0]!r} is none of {", ".join(PLATFORMS)}')
    if not config.platforms:
        raise InputError(f'config.platforms is empty: expected some of {", ".join(PLATFORMS)}')
    with open_workdir(workdir, config) as folder:
        path = folder / FILE
        if path.exists():
            print(f'{path} is there already; name another --workdir for another')
        else:
            transformer = load_transformer(config.transformer_workdir, config.checkpoint, config.vqgan_workdir)
            export(transformer, config.sampling, tuple(config.platforms), path)
            print(
                f'{path}, {path.stat().st_size / 2**20:.1f} MiB, draws {", ".join(transformer.classes)} on '
                f'{", ".join(config.platforms)}. {folder / README} says how'
            )


def export(transformer: TrainedTransformer, settings: ConfigDict, platforms: tuple[str, ...], path: Path) -> None:
    """Writes the file, and its README beside it.

    Args:
        transformer: the trained model.
        settings: the block `sampling` of a config, see `configs/generate.py`.
        platforms: some of `PLATFORMS`.
        path: of the file, in an existing folder.

    Raises:
        InputError: a setting cannot be used, the disk has no room, or the weights are too many for one such file.
    """
    sampling = Sampling.read(settings, transformer.model, transformer.facts.codes, len(transformer.classes))
    weights = weights_of(transformer)
    size = sum(array.nbytes for arrays in weights.values() for array in arrays.values())
    if size > _LARGEST:
        raise InputError(
            f'{transformer.workdir} has {size / 2**30:.2f} GiB of weights; Python imports from files of up to '
            f'{_LARGEST / 2**30:.2f} GiB'
        )
    require_space(path.parent, size + _DISK_RESERVE, path.name)
    facts = describe(transformer, sampling, platforms)
    readme = render_text('exported_readme.txt.jinja', file=path.name, size=size, facts=facts)
    members = {
        'generator.py': Path(__file__).with_name('exported_generator.py').read_bytes(),
        'facts.json': (json.dumps(facts, indent=2) + '\n').encode(),
        README: readme.encode(),
    }
    card = transformer.workdir / CARD_FILE
    if card.exists():  # a run of before there were cards has none
        members[CARD_FILE] = card.read_bytes()
    for name, exported in programs_of(transformer, sampling, platforms).items():
        members[f'{name}.jaxexport'] = bytes(exported.serialize())
    write_atomically(path.parent / README, readme)
    _write(path, members, weights)


def programs_of(
    transformer: TrainedTransformer, sampling: Sampling, platforms: tuple[str, ...]
) -> dict[str, jax.export.Exported]:
    """The programs.

    Args:
        transformer: the trained model.
        sampling: how it is to draw.
        platforms: some of `PLATFORMS`.

    Returns:
        `tokens`, of (weights, seed uint32, class number uint32, indices uint32 `[rows]`): int32 `[rows, d, h, w]`; and
        `decode`, of (weights, tokens int32 `[d, h, w]`): float32 `[D, H, W]` in (-1, 1).
    """
    facts, vqgan, rows = transformer.facts, transformer.vqgan, sampling.sub_batch
    params, variables = _drawing_weights(transformer), transformer.vqgan.decoder_variables

    def draw(weights: dict[str, jax.Array], seed: jax.Array, label: jax.Array, indices: jax.Array) -> jax.Array:
        labels = jnp.full(rows, label, jnp.int32)
        given = jnp.full((rows, math.prod(facts.grid)), UNKNOWN, jnp.int32)
        tree = _unflatten(params, weights)
        drawn = decoding.sample(transformer.model, tree, seed, labels, indices, given, facts.codes, sampling)
        return drawn.reshape(rows, *facts.grid)

    def decode(weights: dict[str, jax.Array], tokens: jax.Array) -> jax.Array:
        return vqgan.decode(_unflatten(variables, weights), tokens.reshape(1, -1))[0]

    number = jax.ShapeDtypeStruct((), jnp.uint32)
    calls: dict[str, tuple[Callable, Any, tuple]] = {
        'tokens': (draw, params, (number, number, jax.ShapeDtypeStruct((rows,), jnp.uint32))),
        'decode': (decode, variables, (jax.ShapeDtypeStruct(facts.grid, jnp.int32),)),
    }
    return {
        name: jax.export.export(jax.jit(function), platforms=platforms)(_shapes(tree), *arguments)
        for name, (function, tree, arguments) in calls.items()
    }


def weights_of(transformer: TrainedTransformer) -> dict[str, dict[str, np.ndarray]]:
    """The weights of the programs, by their names in the model: of stage 1 those that decode alone."""
    return {'tokens': _flat(_drawing_weights(transformer)), 'decode': _flat(transformer.vqgan.decoder_variables)}


def describe(transformer: TrainedTransformer, sampling: Sampling, platforms: tuple[str, ...]) -> dict[str, Any]:
    """What the file says of itself, as JSON has it."""
    return {
        'format': FORMAT,
        'classes': list(transformer.classes),
        'roi_size': list(transformer.roi_size),
        'spacing': None if transformer.spacing is None else list(transformer.spacing),
        'grid': list(transformer.facts.grid),
        'codes': transformer.facts.codes,
        'rows': sampling.sub_batch,
        'sampling': dataclasses.asdict(sampling) | {'method': transformer.method},
        'trained_on': 'phantoms' if transformer.synthetic else 'patients',
        'checkpoint': transformer.step,
        'identity': transformer.identity,
        'platforms': list(platforms),
        'code': str(code_version()),
        'jax': jax.__version__,
    }


def _drawing_weights(transformer: TrainedTransformer) -> Any:
    return decoding.drawing_params(transformer.model, transformer.params)


def _flat(tree: Any) -> dict[str, np.ndarray]:
    """The arrays of a tree by their names in it, such as 'blocks/0/query/kernel'."""
    return {
        jax.tree_util.keystr(path, simple=True, separator='/'): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _unflatten(like: Any, flat: dict[str, jax.Array]) -> Any:
    """A tree with the structure of another from its arrays by name."""
    return jax.tree.unflatten(jax.tree.structure(like), [flat[name] for name in _flat(like)])


def _shapes(tree: Any) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in _flat(tree).items()}


def _write(path: Path, members: dict[str, bytes], weights: dict[str, dict[str, np.ndarray]]) -> None:
    """Writes the archive, whole or not at all; weights hardly pack, so they are stored as they are."""
    temporary = path.with_name(f'{path.name}.tmp')
    with zipfile.ZipFile(temporary, 'w') as file:
        for name, content in members.items():
            file.writestr(_member(name), content, zipfile.ZIP_DEFLATED)
        for name, arrays in weights.items():
            for key, array in arrays.items():
                with file.open(_member(f'weights/{name}/{key}.npy'), 'w') as stream:
                    np.lib.format.write_array(stream, np.ascontiguousarray(array), allow_pickle=False)
    temporary.replace(path)


def _member(name: str) -> zipfile.ZipInfo:
    """Without the time of writing, so that the same export is the same file."""
    return zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
