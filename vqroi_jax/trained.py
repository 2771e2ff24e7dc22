"""Finished runs, loaded for use: stage 1 to encode and decode, stage 2 to draw samples.

Everything comes from the runs' own folders: sizes from their config.json, weights from their checkpoints, and, in a
folder of stage 2, what it took over from stage 1 (`stage1.json`). Commands, notebooks and evaluations go through here.
"""

import copy
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vqroi_jax import decoding
from vqroi_jax.data.learnt_from import LearntFrom, read_learnt_from
from vqroi_jax.decoding import UNKNOWN, Sampling
from vqroi_jax.errors import InputError
from vqroi_jax.models.transformer import Transformer
from vqroi_jax.models.vqgan import VQGAN
from vqroi_jax.training import partitioning, transformer
from vqroi_jax.training.checkpoints import read_checkpoint, saved_steps
from vqroi_jax.training.durations import to_steps
from vqroi_jax.training.vqgan import make_model
from vqroi_jax.workdir import CONFIG_FILE, read_config, write_atomically

STAGE1_FILE = 'stage1.json'  # in a folder of stage 2
TRAINING_ROIS_FILE = 'training_rois.json'  # in a folder of stage 1
RELEASE_FOLDER = 'release'  # in the folder of a run that was read from a file of the authors' code


@dataclasses.dataclass(frozen=True)
class TrainedVQGAN:
    """Stage 1 at one of its checkpoints.

    Attributes:
        workdir: the run's folder, absolute.
        step: of the checkpoint.
        identity: 16 hexadecimal digits of a hash of the weights and codes.
        config: that the run was started with.
        model: the network.
        variables: its parameters (the moving average where there is one) and codebook, NumPy.
    """

    workdir: Path
    step: int
    identity: str
    config: ConfigDict
    model: VQGAN
    variables: Any

    @property
    def roi_size(self) -> tuple[int, int, int]:
        """Voxels: depth, height, width."""
        return tuple(self.config.data.roi_size)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Latent regions: depth, height, width."""
        return tuple(side // 2 ** len(self.config.model.channels) for side in self.roi_size)

    @property
    def decoder_variables(self) -> dict[str, Any]:
        """Those of `variables` that `decode` takes: a tenth."""
        params = {name: self.variables['params'][name] for name in ('post_quantisation', 'decoder')}
        return {**self.variables, 'params': params}

    def encode(self, variables: Any, volume: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Pure: volumes `[B, D, H, W, 1]` in [-1, 1] to tokens int32 and scores float32, `[B, L]` in raster order."""
        tokens, scores = self.model.apply(variables, volume, method='tokens_and_scores')
        return tokens.reshape(len(volume), -1), scores.reshape(len(volume), -1)

    def decode(self, variables: Any, tokens: jax.Array) -> jax.Array:
        """Pure: tokens int `[B, L]` in [0, codes) to volumes float32 `[B, D, H, W]` in (-1, 1)."""
        grids = tokens.reshape(-1, *self.grid)
        return self.model.apply(variables, grids, method='decode_samples')[..., 0]


def load_vqgan(workdir: str | Path, checkpoint: str = 'latest') -> TrainedVQGAN:
    """Loads a run of stage 1.

    Args:
        workdir: its folder.
        checkpoint: 'latest', 'best' or a step.

    Raises:
        InputError: the folder holds no run of stage 1, or no such checkpoint.
    """
    workdir, config = _open_run(workdir, 'vqgan', 'stage 1', 'vqgan_workdir')
    weights = 'average' if config.ema_decay > 0 else 'params'
    step, stored = read_checkpoint(workdir, (weights, 'codebook'), _checkpoint(checkpoint))
    params = stored[weights]
    classes = params['classifier']['logits']['bias'].shape[0]
    return TrainedVQGAN(
        workdir=workdir,
        step=step,
        identity=_identity(params, stored['codebook']['codes']),
        config=config,
        model=make_model(config, classes),
        variables={'params': params, 'codebook': {'codebook': stored['codebook']}},
    )


def check_finished(vqgan: TrainedVQGAN, checkpoint: str, training_rois: int | None) -> None:
    """Refuses a run of stage 1 that has not come to its end, unless a step after its warm-up was asked for by number.

    Args:
        vqgan: the run.
        checkpoint: what was asked for.
        training_rois: that it is trained on, which make its epochs; None: not known.

    Raises:
        InputError: it is not finished, or whether it is cannot be told.
    """
    if checkpoint.isdigit():
        warmup = vqgan.config.codebook.warmup
        if training_rois is not None or 'step' in warmup:
            epoch = (training_rois or 1) / vqgan.config.batch_size
            if vqgan.step <= to_steps(warmup, epoch, f'{vqgan.workdir / CONFIG_FILE}: codebook.warmup', 0):
                raise InputError(
                    f'step {vqgan.step} of stage 1 in {vqgan.workdir} belongs to its warm-up ({warmup}), which has no '
                    'codebook yet; take a later one'
                )
        return
    duration, last = vqgan.config.training.duration, saved_steps(vqgan.workdir)[-1]
    as_it_is = f'take it as it is with --config.vqgan_checkpoint={last}'
    if training_rois is None and 'epoch' in duration:
        raise InputError(
            f'stage 1 in {vqgan.workdir} was to be trained for {duration}, and how many ROIs it was trained on is not '
            f'known: if step {last} is its end, {as_it_is}'
        )
    epoch = (training_rois or 1) / vqgan.config.batch_size
    total = to_steps(duration, epoch, f'{vqgan.workdir / CONFIG_FILE}: training.duration')
    if last < total:
        raise InputError(
            f'stage 1 in {vqgan.workdir} is unfinished (step {last} of {total}); train it to the end, or {as_it_is}'
        )


def check_trainable(workdir: str | Path, lacking: str) -> None:
    """Refuses to train on a run that was read from a file of the authors' code.

    Args:
        workdir: the run's folder; it need not exist.
        lacking: what such files do not have.

    Raises:
        InputError: it was.
    """
    if (Path(workdir) / RELEASE_FOLDER).exists():
        raise InputError(
            f"{workdir} was read from a file of the authors' code, which has no {lacking}: it can be used, but not "
            'trained further; name another --workdir'
        )


@dataclasses.dataclass(frozen=True)
class TrainingRois:
    """What a run of stage 1 is trained on; the contents of `training_rois.json` in its folder."""

    number: int  # of ROIs in the training split
    identity: str  # of the cohort's ROIs, see `rois_identity`

    @classmethod
    def of_scans(cls, scans: Sequence[Mapping[str, Any]]) -> 'TrainingRois':
        """Of the scans of a cohort, as `cohort.json` has them."""
        return cls(sum(scan['split'] == 'train' for scan in scans), rois_identity(scans))

    def record(self, run: Path, begun: bool) -> None:
        """Writes the file of a training run, or compares it with the one there: a run goes on with its ROIs.

        Args:
            run: its folder.
            begun: whether it has checkpoints. One that has, but no file, keeps none: what it began with is not known.

        Raises:
            InputError: the run was begun with other ROIs, or its file is damaged.
        """
        if not begun:
            write_atomically(run / TRAINING_ROIS_FILE, json.dumps(dataclasses.asdict(self), indent=2) + '\n')
            return
        there = self.read(run)
        if there is not None and there != self:
            raise InputError(
                f'{run} was started with other ROIs than its cohort has now ({there.number} to train on and identity '
                f'{there.identity} then, {self.number} and {self.identity} now); bring back the files that the cohort '
                'was prepared from, or name another --workdir'
            )

    @classmethod
    def read(cls, run: Path) -> 'TrainingRois | None':
        """Reads the file of a run's folder; None if there is none.

        Raises:
            InputError: it is damaged.
        """
        path = run / TRAINING_ROIS_FILE
        try:
            return cls(**json.loads(path.read_text(encoding='utf-8')))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise InputError(f'{path} is damaged ({error}); restore it, or remove it') from None


def rois_identity(scans: Sequence[Mapping[str, Any]]) -> str:
    """16 hexadecimal digits of a hash of a cohort's ROIs: names, classes, splits and voxels.

    Unlike the cohort's key it does not depend on where the scans lie and when they were written.

    Args:
        scans: as `cohort.json` has them.
    """
    fields = ('id', 'patient', 'label', 'split', 'range', 'sha256')
    rois = sorted([scan[field] for field in fields] for scan in scans)
    return hashlib.sha256(json.dumps(rois).encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Stage1Facts:
    """What a run of stage 2 has taken over from stage 1 and its cohort; the contents of `stage1.json`."""

    workdir: str  # of stage 1, absolute
    step: int  # of its checkpoint
    identity: str  # of its weights
    codes: int  # in the codebook, K
    grid: tuple[int, ...]  # latent regions: depth, height, width
    roi_size: tuple[int, ...]  # voxels
    classes: tuple[str, ...]  # names, in the order of their numbers
    spacing: tuple[float, ...] | None  # mm a voxel: depth, height, width; None if the cohort's differ
    synthetic: bool  # trained on phantoms
    rois: str = ''  # `rois_identity` of the cohort; empty: not known, as of runs of before it was recorded

    @classmethod
    def of(
        cls,
        vqgan: TrainedVQGAN,
        classes: tuple[str, ...],
        spacing: tuple[float, ...] | None,
        synthetic: bool,
        rois: str = '',
    ) -> 'Stage1Facts':
        """Of a loaded stage 1 and its cohort; the attributes say what the arguments are."""
        return cls(
            workdir=str(vqgan.workdir),
            step=vqgan.step,
            identity=vqgan.identity,
            codes=vqgan.model.codes,
            grid=vqgan.grid,
            roi_size=vqgan.roi_size,
            classes=classes,
            spacing=spacing,
            synthetic=synthetic,
            rois=rois,
        )

    def record(self, folder: Path, begun: bool) -> None:
        """Writes the file, or compares it with the one there: a run goes on with the stage 1 and ROIs it began with.

        Where stage 1 was moved, the file then says where it is.

        Args:
            folder: of the run.
            begun: whether it has checkpoints.

        Raises:
            InputError: stage 1 or the cohort has changed since.
        """
        path = folder / STAGE1_FILE
        there = self.read(folder) if begun and path.exists() else self
        for field in dataclasses.fields(self):
            before, now = getattr(there, field.name), getattr(self, field.name)
            known = field.name != 'rois' or before
            if field.name != 'workdir' and known and before != now:
                raise InputError(
                    f'{folder} was started with another stage 1 or cohort ({field.name} {before} then, {now} now); '
                    'name another --workdir'
                )
        if not begun or not path.exists() or there.workdir != self.workdir:
            facts = dataclasses.asdict(there) | {'workdir': self.workdir}
            write_atomically(path, json.dumps(facts, indent=2) + '\n')

    @classmethod
    def read(cls, folder: Path) -> 'Stage1Facts':
        """Reads the file of a folder of stage 2.

        Raises:
            InputError: it is missing or damaged.
        """
        path = folder / STAGE1_FILE
        try:
            plain: dict[str, Any] = json.loads(path.read_text(encoding='utf-8'))
            frozen: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in plain.items()}
            return cls(**frozen)
        except FileNotFoundError:
            raise InputError(f'{folder} was never started as a run of stage 2: {path} is missing') from None
        except (ValueError, TypeError) as error:
            raise InputError(f'{path} is damaged ({error}); restore it') from None


@dataclasses.dataclass(frozen=True)
class TrainedTransformer:
    """Stage 2 at one of its checkpoints, with the stage 1 that it was trained on.

    Attributes:
        workdir: the run's folder, absolute.
        step: of the checkpoint.
        identity: 16 hexadecimal digits of a hash of the weights of both stages.
        config: that the run was started with.
        facts: what it took over from stage 1.
        model: the network.
        params: its parameters (the moving average where there is one), NumPy.
        vqgan: stage 1.
    """

    workdir: Path
    step: int
    identity: str
    config: ConfigDict
    facts: Stage1Facts
    model: Transformer
    params: Any
    vqgan: TrainedVQGAN

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes in the order of their numbers."""
        return self.facts.classes

    @property
    def roi_size(self) -> tuple[int, ...]:
        """Voxels: depth, height, width."""
        return self.facts.roi_size

    @property
    def spacing(self) -> tuple[float, ...] | None:
        """Millimetres a voxel along depth, height and width; None if the cohort's differ."""
        return self.facts.spacing

    @property
    def method(self) -> str:
        """How it is sampled: 'autoregressive' or 'parallel'."""
        return decoding.method_of(self.model)

    @property
    def synthetic(self) -> bool:
        """Whether the training data were phantoms."""
        return self.facts.synthetic

    @property
    def learnt_from(self) -> LearntFrom | None:
        """The patients that either stage was trained on; None if one of the runs does not say.

        Raises:
            InputError: a run's file is damaged.
        """
        stage1, stage2 = read_learnt_from(self.vqgan.workdir), read_learnt_from(self.workdir)
        return stage1 | stage2 if stage1 and stage2 else None

    def sampler(self, sampling: ConfigDict, seed: int, mesh: Mesh) -> 'Sampler':
        """What draws samples; see `Sampler`.

        Args:
            sampling: the block of a config, see `configs/generate.py`.
            seed: of all draws.
            mesh: devices to draw on.

        Raises:
            InputError: a setting cannot be used.
        """
        return Sampler(self.model, self.vqgan, len(self.classes), sampling, seed, mesh).use(self.params)


def load_transformer(workdir: str | Path, checkpoint: str = 'latest', vqgan_workdir: str = '') -> TrainedTransformer:
    """Loads a run of stage 2 and its stage 1.

    Args:
        workdir: its folder.
        checkpoint: 'latest', 'best' or a step.
        vqgan_workdir: where stage 1 is, if it was moved.

    Raises:
        InputError: one of the folders holds no such run or checkpoint, or stage 1 is not the one it was trained on.
    """
    workdir, config = _open_run(workdir, 'transformer', 'stage 2', 'transformer_workdir')
    facts = Stage1Facts.read(workdir)
    vqgan = load_vqgan(vqgan_workdir or facts.workdir, str(facts.step))
    if vqgan.identity != facts.identity:
        raise InputError(
            f'{vqgan.workdir} is not the stage 1 that {workdir} was trained on: the weights of step {facts.step} differ'
        )
    weights = 'average' if config.ema_decay > 0 else 'params'
    step, stored = read_checkpoint(workdir, (weights,), _checkpoint(checkpoint))
    return TrainedTransformer(
        workdir=workdir,
        step=step,
        identity=_identity(vqgan.identity, stored[weights]),
        config=config,
        facts=facts,
        model=transformer.make_model(config, facts.codes, len(facts.classes), math.prod(facts.grid)),
        params=stored[weights],
        vqgan=vqgan,
    )


class Sampler:
    """Draws tokens and volumes. What a sample becomes depends on its seed, class and index, and on nothing else.

    To the last bit: each device computes groups of `sub_batch` rows, whatever was asked for, and the sample of index i
    always stands in row i modulo `sub_batch`. Volumes are decoded one by one.

    Args:
        model: stage 2's; its parameters are given to `use`.
        vqgan: stage 1.
        classes: their number.
        sampling: the block of a config, see `configs/generate.py`.
        seed: of all draws.
        mesh: devices to draw on, each a group at a time.

    Raises:
        InputError: a setting cannot be used.
    """

    def __init__(
        self,
        model: Transformer,
        vqgan: TrainedVQGAN,
        classes: int,
        sampling: ConfigDict,
        seed: int,
        mesh: Mesh,
    ):
        self._sampling = Sampling.read(sampling, model, vqgan.model.codes, classes)
        self._group, self._classes = self._sampling.sub_batch, classes
        self._model, self._vqgan, self._mesh = model, vqgan, mesh
        self._params: Any = None
        self.reseed(seed)
        self._variables = partitioning.put_whole(vqgan.decoder_variables, mesh)
        draw = draw_function(model, vqgan.model.codes, self._sampling)
        self._draw_tokens = partitioning.on_each_device(draw, mesh)
        self._decode = partitioning.on_each_device(vqgan.decode, mesh)

    def use(self, params: Any) -> 'Sampler':
        """A sampler that draws with these parameters, by the programs of this one.

        It holds them whole on each device (see `decoding.drawing_params`), for as long as it is kept.

        Args:
            params: blocks stacked; NumPy's, or those of a state on the sampler's mesh, however they are split.
        """
        if all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params)):
            arranged = partitioning.put_whole(decoding.drawing_params(self._model, params), self._mesh)
        else:
            whole = partitioning.replicated(self._mesh)
            arrange = jax.jit(decoding.drawing_params, static_argnums=0, out_shardings=whole)
            arranged = arrange(self._model, params)
        result = copy.copy(self)
        result._params = arranged
        return result

    def reseed(self, seed: int) -> 'Sampler':
        """Draws with this seed from now on, 0 to 2**32 - 1; returns itself."""
        self._seed = partitioning.put_whole(np.uint32(seed), self._mesh)
        return self

    @property
    def rows(self) -> int:
        """Samples that are computed together: a group on each device."""
        return self._group * partitioning.row_parts(self._mesh)

    def draw(self, label: int, indices: Sequence[int]) -> Iterator[np.ndarray]:
        """Volumes of a class, float32 `[D, H, W]` in (-1, 1), in the order of `indices`."""
        yield from self.decode(self.tokens(np.full(len(indices), label), indices))

    def tokens(
        self, labels: Sequence[int] | np.ndarray, indices: Sequence[int], given: np.ndarray | None = None
    ) -> np.ndarray:
        """Draws tokens.

        Args:
            labels: class numbers int `[n]`.
            indices: of the samples, `[n]`, each from 0 up.
            given: int `[n, L]`: tokens that are to stay, `UNKNOWN` where to draw; None: all are drawn.

        Returns:
            int32 `[n, L]` in [0, codes).

        Raises:
            InputError: a label is not one of the model's classes.
        """
        shape = len(indices), math.prod(self._vqgan.grid)
        of_class, of_sample = np.asarray(labels, np.int32), np.asarray(indices, np.uint32)
        if len(labels) and not 0 <= min(labels) <= max(labels) < self._classes:
            raise InputError(f'labels {min(labels)} to {max(labels)}: the model knows classes 0 to {self._classes - 1}')
        given = np.full(shape, UNKNOWN, np.int32) if given is None else np.asarray(given, np.int32)
        result = np.zeros(shape, np.int32)
        for places in self._places(of_sample):
            # Where nothing is wanted, the last sample is drawn once more: rows do not see each other.
            rows = of_class[places], of_sample[places], given[places]
            drawn = partitioning.gather(self._draw_tokens((self._params, self._seed), *rows))
            result[places[places >= 0]] = drawn[places >= 0]
        return result

    def decode(self, tokens: np.ndarray) -> Iterator[np.ndarray]:
        """Volumes float32 `[D, H, W]` in (-1, 1) of tokens `[n, L]`, a batch in memory at a time."""
        rows = partitioning.row_parts(self._mesh)
        yield from partitioning.in_batches(self._decode, self._variables, tokens.astype(np.int32), rows)

    def _places(self, indices: np.ndarray) -> Iterator[np.ndarray]:
        """For each call, int `[rows]`: the place in `indices` of the sample that stands in each row; -1 for none."""
        groups: list[np.ndarray] = []
        for place, row in enumerate(indices % self._group):
            free = next((group for group in groups if group[row] < 0), None)
            if free is None:
                free = np.full(self._group, -1)
                groups.append(free)
            free[row] = place
        number = partitioning.row_parts(self._mesh)
        for start in range(0, len(groups), number):
            rows = np.full((number, self._group), -1)
            rows[: len(groups) - start] = groups[start : start + number]
            yield rows.reshape(-1)


def draw_function(model: Transformer, codes: int, sampling: Sampling) -> Callable:
    """What a device draws tokens with: pure, of ((parameters, seed), labels, indices, given), rows first.

    See `decoding.sample` for what these are, and what comes out.
    """

    def draw(whole: tuple[Any, jax.Array], label: jax.Array, index: jax.Array, given: jax.Array) -> jax.Array:
        return decoding.sample(model, *whole, label, index, given, codes, sampling)

    return draw


def _open_run(workdir: str | Path, task: str, stage: str, field: str) -> tuple[Path, ConfigDict]:
    """The absolute folder of a run and its config, if it is one of the task."""
    if not str(workdir):
        raise InputError(f'no --config.{field} given; name the folder of a run of {stage}')
    folder = Path(workdir).expanduser().absolute()
    config = read_config(folder)
    if config.task != task:
        raise InputError(f'{folder} is no run of {stage}: its task is {config.task!r}, {task!r} is needed')
    return folder, config


def _checkpoint(text: str) -> int | str:
    """A config's text for a checkpoint, as `read_checkpoint` takes it."""
    if text in ('latest', 'best'):
        return text
    if not text.isdigit():
        raise InputError(f"checkpoint {text!r}: expected 'latest', 'best' or the number of a step")
    return int(text)


def _identity(*parts: Any) -> str:
    """A hash of texts and of all arrays in trees."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(parts):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(leaf.encode() if isinstance(leaf, str) else np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()[:16]
