"""The command `convert`: files of the authors' PyTorch code to runs of ours, and back.

file -> names and shapes checked -> our parameters -> a run's folder (config.json, checkpoints/, stage1.json)
a run's folder -> the authors' names -> file

What a run has no place for is kept beside it, in `release/`, and written back. `vqroi_jax.release` has the names.
"""

import dataclasses
import functools
import hashlib
import json
import math
import operator
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vqroi_jax import release, torch_files
from vqroi_jax.errors import InputError
from vqroi_jax.trained import (
    RELEASE_FOLDER,
    Stage1Facts,
    TrainedTransformer,
    TrainedVQGAN,
    load_transformer,
    load_vqgan,
)
from vqroi_jax.training import loop, transformer, vqgan
from vqroi_jax.training.checkpoints import Checkpoints, saved_steps
from vqroi_jax.workdir import open_workdir, read_config, write_atomically

SOURCE_FILE = 'source.json'  # in the folder `release`: which file the run was read from
REST_FILE = 'rest.pth'  # likewise: what the run has no place for
STAGE1_FOLDER = 'vqgan'  # in a run of stage 2 that was read from a file


def run(config: ConfigDict, workdir: str | Path) -> None:
    """Runs `--config=configs/convert.py`."""
    if bool(config.release) == bool(config.run):
        raise InputError('give either --config.release (a file to read) or --config.run (a run to write as a file)')
    if config.release:
        read(config, workdir)
        return
    with open_workdir(workdir, config) as folder:
        write(config, folder)


@dataclasses.dataclass(frozen=True)
class Rest:
    """What a file has and a run has no place for, so that the file can be written again.

    Attributes:
        order: names of all of the stage's tensors in the file, dotted.
        tensors: those that the run does not have; of the positions' embeddings, those that no token has.
        others: entries of the file that are no network, such as an optimiser's state, as they are.
    """

    order: tuple[str, ...]
    tensors: Mapping[str, np.ndarray]
    others: Mapping[str, Any]

    def save(self, folder: Path) -> None:
        """Keeps it in the folder of a run."""
        torch_files.write(folder / RELEASE_FOLDER / REST_FILE, vars(self))

    @classmethod
    def find(cls, folder: Path) -> 'Rest | None':
        """What is kept in the folder of a run; None if that was trained here."""
        path = folder / RELEASE_FOLDER / REST_FILE
        return cls(**torch_files.read_contents(path)) if (folder / RELEASE_FOLDER).exists() else None

    def complete(self, used: release.Tensors) -> release.Tensors:
        """All of the stage's tensors, given those that the run has."""
        tensors = {**self.tensors, **used}
        return {name: tensors[name] for name in self.order}


# ------------------------------------------------------------------------------------------------------- file to run


@dataclasses.dataclass(frozen=True)
class _Run:
    """A run that is to be made."""

    config: ConfigDict
    state: Any
    rest: Rest
    grid: tuple[int, int, int]
    codes: int


def read(config: ConfigDict, workdir: str | Path) -> None:
    """Makes a run of a file.

    Args:
        config: as `configs/convert.py` has it.
        workdir: that becomes the run's folder.

    Raises:
        InputError: the file is not of the authors' code, its tensors do not fit each other or the config, or the
            folder holds another run.
    """
    _check_told(config)
    file = config.release
    stage, tensors, others = _recognise(file, torch_files.read_contents(file))
    digest = _sha256(file)
    if stage == 1:
        _save(workdir, _stage1_run(config, file, tensors, others), file, digest)
        print(f'{workdir} is a run of stage 1, from {file}')
        return
    names = {theirs: ours for ours, theirs in release.NETWORKS.items()}
    own = {name: array for name, array in tensors.items() if name.partition('.')[0] not in names}
    shown = f'{file} (its stage 1, by the names of a stage 1 file)'
    stage1 = _stage1_run(config, shown, release.rename(tensors, names), {})
    stage1_folder = Path(workdir).absolute() / STAGE1_FOLDER
    stage2 = _stage2_run(config, file, own, stage1, stage1_folder)

    def begin(folder: Path) -> None:
        _save(stage1_folder, stage1, file, digest)
        loaded = load_vqgan(stage1_folder, str(config.step))
        Stage1Facts.of(loaded, tuple(config.classes), tuple(config.spacing) or None, config.synthetic).record(
            folder, bool(saved_steps(folder))
        )

    _save(workdir, stage2, file, digest, begin)
    print(f'{workdir} is a run of stage 2, from {file}; its stage 1 is in {stage1_folder}')


def _check_told(config: ConfigDict) -> None:
    """Refuses what a config says of a file, if it makes no sense."""
    if config.step < 1:
        raise InputError(f'config.step={config.step}: expected 1 or more')
    if len(set(config.classes)) != len(config.classes) or not all(config.classes):
        raise InputError(f'config.classes={tuple(config.classes)}: expected a name for each class, all different')
    if config.spacing and (len(config.spacing) != 3 or min(config.spacing) <= 0):
        raise InputError(f'config.spacing={tuple(config.spacing)}: expected millimetres along depth, height and width')


def _recognise(file: str, contents: Any) -> tuple[int, release.Tensors, Mapping[str, Any]]:
    """The stage of a file, its tensors by dotted names, and what is in it beside the networks."""
    if isinstance(contents, Mapping) and 'Encoder' in contents:
        networks = {name: state for name, state in contents.items() if name in release.NETWORKS}
        if strange := [name for name, state in networks.items() if not isinstance(state, Mapping)]:
            raise InputError(f'{file}: {strange[0]} is no state dict')
        tensors = {f'{network}.{name}': array for network in networks for name, array in networks[network].items()}
        stage, others = 1, {name: value for name, value in contents.items() if name not in networks}
    elif isinstance(contents, Mapping) and release.POSITIONS in contents:
        stage, tensors, others = 2, dict(contents), {}
    else:
        raise InputError(
            f"{file} is no file of the authors' code: neither the networks {', '.join(release.NETWORKS)} of stage 1 "
            f'are in it, nor tensors of stage 2 such as {release.POSITIONS}'
        )
    if strange := [n for n, value in tensors.items() if not (isinstance(n, str) and isinstance(value, np.ndarray))]:
        raise InputError(f'{file}: {strange[0]} is no tensor')
    return stage, tensors, others


def _stage1_run(config: ConfigDict, file: str, tensors: release.Tensors, others: Mapping[str, Any]) -> _Run:
    """A run of stage 1 with the tensors of a stage 1 file."""
    sizes = release.VQGANSizes.read(file, tensors)
    if sizes.classes != len(config.classes):
        raise InputError(
            f'{file} has {sizes.classes} classes, config.classes names {len(config.classes)}; name all in the order of '
            'their numbers'
        )
    grid = release.find_grid(file, sizes.regions, config.grid)
    roi_size = tuple(side * 2 ** len(sizes.channels) for side in grid)
    settings = _filled(
        config.vqgan,
        'vqgan',
        {
            'data.roi_size': roi_size,
            'data.classes': tuple(config.classes),
            'model.channels': sizes.channels,
            'model.hidden': sizes.hidden,
            'model.code_features': sizes.code_features,
            'model.encoder_res_blocks': sizes.encoder_res_blocks,
            'model.decoder_res_blocks': sizes.decoder_res_blocks,
            'model.classifier_hidden': sizes.classifier_hidden,
            'codebook.codes': sizes.codes,
            'discriminator.channels': (),
            'ema_decay': 0.0,
            'training.duration': f'{config.step} steps',
        },
    )
    vqgan.check_sizes(settings)
    model = vqgan.make_model(settings, sizes.classes)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *roi_size, 1), np.float32))
    shapes = {'params': shapes['params'], 'codebook': shapes['codebook']['codebook']}
    places, unused = sizes.places(), sizes.unused()
    _check(file, tensors, places, shapes, unused, 'stage 1')
    tree = release.to_tree(file, tensors, places)
    release.check_codes(file, tree['codebook']['codes'])
    state = vqgan.VQGANState(
        step=jnp.asarray(config.step, jnp.int32),
        params=tree['params'],
        discriminator=None,
        codebook=tree['codebook'],
        optimizer=None,
        discriminator_optimizer=None,
        average=None,
    )
    rest = Rest(tuple(tensors), {name: tensors[name] for name in unused}, others)
    return _Run(settings, state, rest, grid, sizes.codes)


def _stage2_run(config: ConfigDict, file: str, tensors: release.Tensors, stage1: _Run, stage1_folder: Path) -> _Run:
    """A run of stage 2 with the tensors of a stage 2 file, those of stage 1 left out."""
    sizes = release.TransformerSizes.read(file, tensors)
    codes, classes, length = stage1.codes, len(config.classes), math.prod(stage1.grid)
    if (sizes.vocabulary, sizes.classes) != (codes + 1 + classes, classes):
        raise InputError(
            f'{file}: transformer.tok_emb.weight has {sizes.vocabulary} tokens and linear_prob_head.weight '
            f'{sizes.classes} classes; the {codes} codes, [MASK] and {classes} classes of stage 1 are '
            f'{codes + 1 + classes} tokens'
        )
    settings = _filled(
        config.transformer,
        'transformer',
        {
            'vqgan_workdir': str(stage1_folder),
            'vqgan_checkpoint': 'latest',
            'model.layers': sizes.layers,
            'model.width': sizes.width,
            'model.attention': 'causal',
            'label_dropout': 0.0,
            'ema_decay': 0.0,
            'training.duration': f'{config.step} steps',
        },
    )
    model = transformer.make_model(settings, codes, classes, length)
    cut, beyond = release.cut_positions(file, tensors, length)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, length), np.int32))
    places, unused = sizes.places(), sizes.unused()
    _check(file, cut, places, shapes, unused, 'stage 2')
    state = transformer.TransformerState(
        step=jnp.asarray(config.step, jnp.int32),
        params=release.to_tree(file, cut, places)['params'],
        optimizer=None,
        average=None,
    )
    kept = {name: tensors[name] for name in unused}
    return _Run(settings, state, Rest(tuple(tensors), {**kept, release.POSITIONS: beyond}, {}), stage1.grid, codes)


def _filled(block: ConfigDict, name: str, told: Mapping[str, Any]) -> ConfigDict:
    """A stage's config with what the file tells; what was given already has to agree."""
    settings = block.copy_and_resolve_references()
    for field, value in told.items():
        given = functools.reduce(operator.getitem, field.split('.'), settings)
        if given and given != value:
            raise InputError(f'config.{name}.{field}={given!r} does not agree with the file: {value!r} is expected')
    settings.update_from_flattened_dict(told)
    return settings


def _check(
    file: str,
    tensors: release.Tensors,
    places: Mapping[str, release.Place],
    shapes: Any,
    unused: Mapping[str, release.Unused],
    network: str,
) -> None:
    """Refuses tensors that are not exactly those of a network."""
    expected = release.shapes(places, shapes) | {name: tensor.shape for name, tensor in unused.items()}
    torch_files.check(file, tensors, expected, network)


def _save(workdir: str | Path, run: _Run, file: str, digest: str, begin: Callable[[Path], None] | None = None) -> None:
    """Writes the folder of a run, or goes on where that was stopped; its checkpoint is the last that is written.

    Args:
        workdir: that becomes the run's folder.
        run: what to write.
        file: that it comes from.
        digest: SHA-256 of that file.
        begin: what to do in the folder before the rest is written.
    """
    with open_workdir(workdir, run.config) as folder:
        record = folder / RELEASE_FOLDER / SOURCE_FILE
        if record.exists():
            there = json.loads(record.read_text(encoding='utf-8'))
            if there['sha256'] != digest:
                raise InputError(f'{folder} was read from another file, {there["file"]}; name another --workdir')
        else:
            record.parent.mkdir(exist_ok=True)
            write_atomically(record, json.dumps({'file': str(file), 'sha256': digest}, indent=2) + '\n')
        if begin:
            begin(folder)
        step = int(run.state.step)
        if step in saved_steps(folder):
            return
        run.rest.save(folder)
        loop.write_parameters(folder, run.state.params)
        with Checkpoints(folder, run.config.training) as checkpoints:
            checkpoints.save(step, run.state, loop={}, metrics={})


def _sha256(file: str) -> str:
    with open(Path(file).expanduser(), 'rb') as stream:
        return hashlib.file_digest(stream, 'sha256').hexdigest()


# ------------------------------------------------------------------------------------------------------- run to file


def write(config: ConfigDict, folder: Path) -> None:
    """Writes a run as a file: `vqgan.pth` or `transformer.pth`.

    A run that was read from a file gives that file back. One that was trained here gets what it lacks as the authors'
    code has it before training, and no optimiser's state.

    Args:
        config: as `configs/convert.py` has it.
        folder: to write to.

    Raises:
        InputError: there is no such run, PyTorch is not installed, or the authors' code has no such network.
    """
    task = read_config(Path(config.run).expanduser()).task
    if task not in ('vqgan', 'transformer'):
        raise InputError(f'--config.run={config.run} is neither a run of stage 1 nor of stage 2: its task is {task!r}')
    path = folder / f'{task}.pth'
    torch_files.pytorch(f'write {path}')
    trained: TrainedVQGAN | TrainedTransformer
    if task == 'vqgan':
        trained = load_vqgan(config.run, config.checkpoint)
        tensors, others = _stage1_tensors(trained)
        contents: dict[str, Any] = {}
        for name, array in tensors.items():
            network, _, rest = name.partition('.')
            contents.setdefault(network, {})[rest] = array
        contents |= others
        untold = _untold(trained)
    else:
        trained = load_transformer(config.run, config.checkpoint, config.vqgan_workdir)
        contents = release.rename(_stage1_tensors(trained.vqgan)[0], release.NETWORKS) | _stage2_tensors(trained)
        heads = trained.model.heads
        untold, facts = _untold(trained.vqgan), trained.facts
        print(
            f'whoever reads the file back has to say --config.classes="{facts.classes}" '
            f'--config.spacing="{facts.spacing or ()}" --config.synthetic={facts.synthetic}'
        )
        if heads != release.HEADS:
            untold.append(f'{heads} heads (--config.transformer.model.heads={heads})')
    torch_files.write(path, contents)
    print(f'{path} has step {trained.step} of {trained.workdir}')
    if untold:
        print(f"warning: the file cannot tell, and the authors' code does not expect, {'; '.join(untold)}")


def _stage1_tensors(trained: TrainedVQGAN) -> tuple[release.Tensors, Mapping[str, Any]]:
    """All tensors of a stage 1 file, and what is in it beside the networks."""
    model = trained.model
    for field in ('encoder_res_blocks', 'decoder_res_blocks'):
        if max(getattr(model, field)) > 1:
            raise InputError(
                f"{trained.workdir}: model.{field}={tuple(getattr(model, field))}: the authors' code has one block a "
                'level at most'
            )
    sizes = release.VQGANSizes(
        channels=tuple(model.channels),
        hidden=model.hidden,
        codes=model.codes,
        code_features=model.code_features,
        encoder_res_blocks=tuple(model.encoder_res_blocks),
        decoder_res_blocks=tuple(model.decoder_res_blocks),
        classifier_hidden=model.classifier_hidden,
        classes=model.classes,
        regions=math.prod(trained.grid),
    )
    variables = trained.variables
    tree = {'params': variables['params'], 'codebook': variables['codebook']['codebook']}
    used = release.from_tree(tree, sizes.places())
    rest = Rest.find(trained.workdir) or _untrained_rest(used, sizes.unused())
    return rest.complete(used), rest.others


def _stage2_tensors(trained: TrainedTransformer) -> release.Tensors:
    """The tensors of a stage 2 file that are not stage 1's."""
    model, field = trained.model, None
    if not model.causal:
        field = f'model.attention={trained.config.model.attention!r}'
    if trained.config.label_dropout > 0:
        field = f'label_dropout={trained.config.label_dropout}'
    if field:
        raise InputError(f"{trained.workdir}: {field}: the authors' code has no such network")
    sizes = release.TransformerSizes(
        layers=model.layers,
        width=model.width,
        vocabulary=model.vocabulary,
        classes=len(trained.classes),
        positions=max(model.positions, trained.facts.codes),
    )
    used = release.from_tree({'params': trained.params}, sizes.places())
    beyond = np.zeros((1, sizes.positions - model.positions, model.width), np.float32)
    rest = Rest.find(trained.workdir) or _untrained_rest(used, sizes.unused(), {release.POSITIONS: beyond})
    return rest.complete(release.join_positions(used, rest.tensors[release.POSITIONS]))


def _untrained_rest(
    used: release.Tensors, unused: Mapping[str, release.Unused], more: Mapping[str, np.ndarray] | None = None
) -> Rest:
    made = {name: tensor.make() for name, tensor in unused.items()}
    return Rest((*used, *made), {**made, **(more or {})}, {})


def _untold(trained: TrainedVQGAN) -> list[str]:
    """What whoever reads a run's file must know of stage 1, because the file does not say it."""
    untold, groups = [], trained.model.num_groups
    if groups != release.GROUPS:
        untold.append(f'{groups} groups of channels (--config.vqgan.model.num_groups={groups})')
    if len(set(trained.grid)) > 1:
        untold.append(f'a latent grid that is no cube (--config.grid={trained.grid})')
    return untold
