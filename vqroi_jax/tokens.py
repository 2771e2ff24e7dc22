"""The cohort as stage 1 sees it: tokens and importance scores, encoded once and kept beside the run of stage 1.

    prepared ROIs, or their mirrored views -> stage 1's encoder -> tokens, scores -> batches of stage 2

A file's name tells the weights and the cohort that it was made from, so another checkpoint or cohort makes another.
"""

import dataclasses
import io
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from vqroi_jax import progress
from vqroi_jax.data.pipeline import Batch, PreparedCohort, RoiSource, is_prepared, open_cohort
from vqroi_jax.data.splits import SPLITS
from vqroi_jax.errors import InputError
from vqroi_jax.trained import TrainedVQGAN
from vqroi_jax.training import partitioning
from vqroi_jax.training.transformer import AXES
from vqroi_jax.workdir import is_primary, write_atomically

FOLDER = 'tokens'  # in the folder of stage 1


@dataclasses.dataclass(frozen=True)
class TokenSource:
    """One split of a cohort as tokens; what `vqroi_jax.data.pipeline.RoiSource` is for ROIs."""

    name: str
    ids: tuple[str, ...]
    labels: np.ndarray  # int32 [n]
    tokens: np.ndarray  # int32 [n, L], raster order; or [n, V, L] of V views
    scores: np.ndarray  # float32 in (0, 1), the same shape

    def __len__(self) -> int:
        return len(self.ids)

    def load(self, index: np.ndarray) -> Batch:
        """tokens int32 and scores float32 [b,(V,)L], label and index int32 [b] of the ROIs at `index` [b]."""
        return {
            'tokens': self.tokens[index],
            'scores': self.scores[index],
            'label': self.labels[index],
            'index': index.astype(np.int32),
        }


def find_cohort(vqgan: TrainedVQGAN, path: str) -> PreparedCohort:
    """The prepared cohort to train stage 2 on.

    Args:
        vqgan: stage 1.
        path: a folder that the command `prepare` has filled; empty: the cohort that stage 1 was trained on, with the
            same splits.

    Raises:
        InputError: there is none, or its ROIs have another size or other classes than stage 1 knows.
    """
    of_stage1 = Path(vqgan.config.data.path or vqgan.workdir / 'cohort').expanduser()
    folder = Path(path).expanduser() if path else of_stage1 if is_prepared(of_stage1) else vqgan.workdir / 'cohort'
    if not path and not is_prepared(folder):
        raise InputError(
            f'the cohort that stage 1 was trained on is not at {of_stage1} any more; say where a prepared one is with '
            '--config.data.path'
        )
    cohort = open_cohort(folder)
    if cohort.roi_size != vqgan.roi_size:
        raise InputError(f'{folder} has ROIs of {cohort.roi_size} voxels, stage 1 was trained on {vqgan.roi_size}')
    if len(cohort.classes) != vqgan.model.classes:
        raise InputError(
            f'{folder} has {len(cohort.classes)} classes ({", ".join(cohort.classes)}), stage 1 was trained on '
            f'{vqgan.model.classes}'
        )
    return cohort


def encode_cohort(vqgan: TrainedVQGAN, cohort: PreparedCohort, mesh: Mesh) -> dict[str, TokenSource]:
    """Tokens and scores of every split, from the file beside stage 1 if it is there.

    Args:
        vqgan: stage 1.
        cohort: of ROIs of its size.
        mesh: devices to encode on, each an ROI at a time; of several processes each reads its own.
    """
    sources = {name: cohort.split(name) for name in SPLITS}
    arrays = _kept(vqgan, cohort, sources, '', mesh)
    return {
        name: TokenSource(name, source.ids, source.labels, arrays[f'{name}_tokens'], arrays[f'{name}_scores'])
        for name, source in sources.items()
    }


def encode_mirrored(vqgan: TrainedVQGAN, cohort: PreparedCohort, axes: Sequence[str], mesh: Mesh) -> TokenSource:
    """Tokens and scores of the ROIs to train on, each in all its views, from the file beside stage 1 if it is there.

    Args:
        vqgan: stage 1.
        cohort: of ROIs of its size.
        axes: names of those to mirror along: with k of them an ROI has V = 2**k views, the first of them as it is.
        mesh: devices to encode on, each a view at a time.
    """
    places = tuple(place for place, axis in enumerate(AXES) if axis in axes)
    rois = cohort.split('train')
    arrays = _kept(vqgan, cohort, {'train': _Views(rois, places)}, ''.join(f'_{AXES[place]}' for place in places), mesh)
    tokens, scores = (arrays[f'train_{name}'].reshape(len(rois), 2 ** len(places), -1) for name in ('tokens', 'scores'))
    return TokenSource('train', rois.ids, rois.labels, tokens, scores)


@dataclasses.dataclass(frozen=True)
class _Views:
    """Volumes of ROIs, each mirrored along every choice of some axes, its views one after the other."""

    rois: RoiSource
    axes: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.rois) << len(self.axes)

    def volume(self, position: int) -> np.ndarray:
        """Float32 [D, H, W, 1]."""
        roi, view = divmod(position, 1 << len(self.axes))
        return np.flip(self.rois.volume(roi), tuple(axis for bit, axis in enumerate(self.axes) if view >> bit & 1))


def _kept(
    vqgan: TrainedVQGAN, cohort: PreparedCohort, sources: Mapping[str, RoiSource | _Views], end: str, mesh: Mesh
) -> dict[str, np.ndarray]:
    """`_encode`, from a file if it is there and whole, which is kept otherwise; its name ends in `end`."""
    path = vqgan.workdir / FOLDER / f'step_{vqgan.step}_{vqgan.identity}_{cohort.report["key"][:16]}{end}.npz'
    arrays = _read(path)
    # Encoding takes all processes: where one does not see the file (yet), none uses it.
    if not partitioning.everywhere(arrays is not None):
        arrays = None
    if arrays is not None:
        return arrays
    arrays = _encode(vqgan, sources, mesh)
    if is_primary():
        try:
            _save(path, arrays)
        except OSError as error:
            print(f'warning: {path} cannot be written ({error.strerror}): the next run will encode the cohort again')
    return arrays


def _encode(vqgan: TrainedVQGAN, sources: Mapping[str, RoiSource | _Views], mesh: Mesh) -> dict[str, np.ndarray]:
    """ROI by ROI on each device, so that tokens do not depend on how many there are."""
    variables = partitioning.put_whole(vqgan.variables, mesh)
    encode = partitioning.jit_on_each_device(vqgan.encode, mesh)
    rows, length = partitioning.row_parts(mesh), int(np.prod(vqgan.grid))
    arrays: dict[str, np.ndarray] = {}
    total = sum(map(len, sources.values()))
    with progress.bar('encoding', 'ROI', total=total, shown=is_primary()) as bar:
        for name, source in sources.items():
            parts = [(np.zeros((0, length), np.int32), np.zeros((0, length), np.float32))]
            for start in range(0, len(source), rows):
                wanted = range(start, min(start + rows, len(source)))

                def read(row: int, source: RoiSource | _Views = source, wanted: range = wanted) -> np.ndarray:
                    return source.volume(wanted[min(row, len(wanted) - 1)])  # the last one again, if there are too few

                volumes = partitioning.put_rows(read, (rows, *vqgan.roi_size, 1), mesh)
                parts.append(tuple(a[: len(wanted)] for a in partitioning.gather(encode(variables, (volumes,)))))
                bar.update(len(wanted))
            tokens, scores = (np.concatenate(part) for part in zip(*parts, strict=True))
            arrays |= {f'{name}_tokens': tokens, f'{name}_scores': scores}
    return arrays


def _read(path: Path) -> dict[str, np.ndarray] | None:
    """The arrays of a file; None if there is none, or none that can be read."""
    try:
        with np.load(path) as stored:
            return dict(stored)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error):
        return None


def _save(path: Path, arrays: dict[str, Any]) -> None:
    content = io.BytesIO()
    np.savez(content, **arrays)
    write_atomically(path, content.getvalue())
