"""From a prepared cohort to batches: the last step of the data's way, before the accelerator.

`open_cohort` reads what `vqroi_jax.prepare` left in a folder; `Batches` is the endless shuffled stream that training
reads, `eval_batches` goes once through a split. Records are read at random places (ArrayRecord, by TFDS) and Grain
shuffles, repeats and prefetches.

The layout of batches: global batch n is rows [n*B, (n+1)*B) of the stream, and process p of P reads the p-th of P
contiguous slices of it. So any number of processes sees the same global batches.
"""

import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import grain
import numpy as np
import tensorflow_datasets as tfds

from vqroi_jax.data.roi import Roi, scale
from vqroi_jax.data.splits import SPLITS
from vqroi_jax.errors import InputError

COHORT_FILE = 'cohort.json'  # written last: a folder that has it is prepared to the end
DATASET_FOLDER = 'brats_roi'
FORMAT = 2  # of cohort.json and the records: raise it when either changes, in what it means too

Batch = dict[str, np.ndarray]

_STREAM_ROWS = 2**50  # ROIs that a training stream holds: for ever


class OtherFormatError(InputError):
    """A cohort that another version of this package has prepared."""


class Source(Protocol):
    """A split that batches are made of: ROIs, or what stands for them."""

    @property
    def name(self) -> str:
        """For messages."""

    @property
    def ids(self) -> tuple[str, ...]:
        """Names of its members."""

    def __len__(self) -> int: ...

    def load(self, index: np.ndarray) -> Batch:
        """The members at `index` int [b], stacked."""


class Records(Protocol):
    """Records by their places."""

    def __getitem__(self, index: int, /) -> dict: ...


class RoiSource:
    """Random access to the ROIs of one split, in the order of `cohort.json`; what Grain calls a data source."""

    def __init__(self, name: str, ids: Sequence[str], labels: Sequence[int], records: Records):
        self.name = name
        self.ids = tuple(ids)
        self.labels = np.asarray(labels, np.int32)  # [n], known without reading a record
        self._records = records

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict:
        """The record at `index`: the features of the TFDS builder `brats_roi`, with str for its bytes."""
        record = self._records[int(index)]
        return {key: value.decode() if isinstance(value, bytes) else value for key, value in record.items()}

    def roi(self, index: int) -> Roi:
        """The record as it was cropped, for `vqroi_jax.data.roi.put_back`; `counts` is in `PreparedCohort.scans`."""
        record = self[index]
        return Roi(
            raw=record['volume'],
            mask=record['mask'],
            offset=tuple(record['offset'].tolist()),
            shape=tuple(record['shape'].tolist()),
            affine=record['affine'],
            range=tuple(record['range'].tolist()),
            background=float(record['background']),
            counts={},
        )

    def volume(self, index: int) -> np.ndarray:
        """float32 [D,H,W,1] in [-1, 1]."""
        record = self._records[int(index)]
        return scale(record['volume'], record['range'])[..., None]

    def load(self, index: np.ndarray) -> Batch:
        """volume float32 [b,D,H,W,1] in [-1, 1], label and index int32 [b] of the ROIs at `index` [b]."""
        return {
            'volume': np.stack([self.volume(position) for position in index]),
            'label': self.labels[index],
            'index': index.astype(np.int32),
        }


class _StoredRecords:
    """The records of one split, from the files of a prepared cohort."""

    def __init__(self, folder: Path, builder: tfds.core.DatasetBuilder, split: str):
        self._folder = folder
        self._split = builder.info.splits[split]
        self._records = builder.as_data_source(split)

    def __getitem__(self, index: int) -> dict:
        """The record at `index`.

        Raises:
            InputError: its file is damaged or gone.
        """
        try:
            return self._records[index]
        except (RuntimeError, ValueError) as error:  # all that ArrayRecord has; and a record that is not there
            shard = int(np.searchsorted(np.cumsum(self._split.shard_lengths), index, side='right'))
            reason = str(error).strip().partition('\n')[0]
            raise InputError(
                f'{self._split.filepaths[shard]}: record {index} of the {self._split.name} split cannot be read '
                f'({reason}); remove {self._folder / COHORT_FILE} and prepare it again with --config=configs/prepare.py'
            ) from error


@dataclasses.dataclass(frozen=True)
class PreparedCohort:
    """A folder that `vqroi_jax.prepare` has filled.

    Attributes:
        folder: Where it is.
        classes: Names of the classes in the order of their numbers.
        roi_size: Depth, height and width of the ROIs, in voxels.
        splits: Scan ids of 'train', 'val' and 'test', in the order of the records.
        scans: What `cohort.json` says of each scan, by id (see `brats_roi.crops.describe`).
        report: All of `cohort.json`.
    """

    folder: Path
    classes: tuple[str, ...]
    roi_size: tuple[int, int, int]
    splits: dict[str, list[str]]
    scans: dict[str, dict]
    report: dict

    def split(self, name: str) -> RoiSource:
        """The ROIs of 'train', 'val' or 'test'; a split without scans has length 0."""
        ids = self.splits[name]
        labels = [self.classes.index(self.scans[scan]['label']) for scan in ids]
        return RoiSource(name, ids, labels, _StoredRecords(self.folder, self._builder, name) if ids else ())

    def spacing(self, ids: Sequence[str] | None = None) -> tuple[float, ...] | None:
        """Millimetres a voxel along depth, height and width of some scans (None: of all); None where they differ."""
        spacings = {tuple(self.scans[scan]['spacing']) for scan in (self.scans if ids is None else ids)}
        return spacings.pop() if len(spacings) == 1 else None

    @functools.cached_property
    def _builder(self) -> tfds.core.DatasetBuilder:
        return tfds.builder_from_directory(self.folder / DATASET_FOLDER / self.report['version'])


def is_prepared(folder: Path) -> bool:
    """Whether `folder` holds a cohort that was prepared to the end."""
    return (folder / COHORT_FILE).is_file()


def open_cohort(folder: Path) -> PreparedCohort:
    """Opens a prepared cohort.

    Raises:
        InputError: There is none, its preparation was interrupted, or a part of it is missing or of another version.
    """
    folder = Path(folder)
    remedy = 'prepare it with --config=configs/prepare.py'
    if not is_prepared(folder):
        raise InputError(f'{folder} holds no prepared cohort (no {COHORT_FILE}); {remedy}')
    try:
        report = json.loads((folder / COHORT_FILE).read_text(encoding='utf-8'))
        if report['format'] != FORMAT:
            raise OtherFormatError(
                f'{folder / COHORT_FILE} was written by another version of vqroi_jax; remove it and {remedy}'
            )
        scans = {scan['id']: scan for scan in report['scans']}
        splits = {name: [i for i, scan in scans.items() if scan['split'] == name] for name in SPLITS}
        cohort = PreparedCohort(folder, tuple(report['classes']), tuple(report['roi_size']), splits, scans, report)
        stored = {name: info.num_examples for name, info in cohort._builder.info.splits.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f'{folder}: the prepared cohort is damaged ({error}); remove it and {remedy}') from error
    if stored != {name: len(ids) for name, ids in splits.items() if ids}:
        raise InputError(f'{folder}: {COHORT_FILE} and the records do not belong together; remove it and {remedy}')
    return cohort


class Batches:
    """The endless stream of training batches: every epoch all ROIs once, in a new order.

    A batch may span two epochs, and a split smaller than a batch goes round within it.

    Args:
        source: The split.
        batch_size: Rows of a global batch, over all processes.
        seed: Of the shuffle; 0 to 2**32 - 1.
        shuffle: False keeps the order of the split.
        process_index: Which of the processes this is (`jax.process_index()`).
        process_count: How many there are (`jax.process_count()`).
        prefetch: Batches read ahead, each in a thread of its own; 0 reads in the caller's.

    Raises:
        InputError: The split is empty, or the batch does not divide by the processes.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        seed: int,
        *,
        shuffle: bool = True,
        process_index: int = 0,
        process_count: int = 1,
        prefetch: int = 4,
    ):
        rows = process_rows(batch_size, process_index, process_count)
        if not len(source):
            raise InputError(f'the {source.name} split has no patients; lower data.split.val and data.split.test')
        self.steps_per_epoch = len(source) / batch_size
        self._source = source
        self._prefetch = prefetch
        order = grain.MapDataset.range(len(source))
        if shuffle:
            order = order.shuffle(seed=seed)  # Grain adds the epoch's number to the seed
        # Not `repeat()`: the length of an endless stream in batches of 1 does not fit Python's `len`.
        order = order.repeat(_STREAM_ROWS // len(source) + 1)
        self._batches = order.batch(batch_size).map(lambda index: source.load(index[rows]))

    def batch_at(self, n: int) -> Batch:
        """This process's rows of global batch `n`.

        Returns:
            What the source loads: of ROIs volume, label and index (position in the split).
        """
        return self._batches[n]

    def iterator(self) -> grain.DatasetIterator:
        """Yields `batch_at(0)`, `batch_at(1)`, ...; `get_state()` and `set_state(state)` say and set which is next."""
        return iter(self._batches.to_iter_dataset(_read_options(self._prefetch)))

    def ids(self, index: Sequence[int]) -> list[str]:
        """Names of the scans at positions in the split."""
        return [self._source.ids[position] for position in np.asarray(index)]


def eval_batches(
    source: Source,
    batch_size: int,
    *,
    process_index: int = 0,
    process_count: int = 1,
    prefetch: int = 4,
) -> Iterator[Batch]:
    """Goes once through a split in its order; no batch at all if it is empty.

    Args:
        source: The split.
        batch_size: Rows of a global batch; the last one is filled up with copies of the last ROI.
        process_index: Which of the processes this is.
        process_count: How many there are; all get the same number of batches.
        prefetch: Batches read ahead.

    Yields:
        As `Batches.batch_at`, and weight float32 [b]: 1, but 0 for a row that only fills up.

    Raises:
        InputError: The batch does not divide by the processes.
    """
    rows = process_rows(batch_size, process_index, process_count)

    def load(number: int) -> Batch:
        position = np.arange(number * batch_size, (number + 1) * batch_size)[rows]
        batch = source.load(np.minimum(position, len(source) - 1))
        return {**batch, 'weight': (position < len(source)).astype(np.float32)}

    batches = grain.MapDataset.range(-(-len(source) // batch_size)).map(load)
    return iter(batches.to_iter_dataset(_read_options(prefetch)))


def check_classes(source: RoiSource, classes: Sequence[str]) -> None:
    """Refuses a split that lacks a class.

    Raises:
        InputError: naming the class.
    """
    counts = np.bincount(source.labels, minlength=len(classes))
    if not counts.all():
        raise InputError(
            f'the {source.name} split has no ROI of class {classes[int(np.argmin(counts))]!r}; prepare the cohort '
            'without that class (data.classes), or with patients of it'
        )


def first_of_each_class(labels: np.ndarray, number: int) -> np.ndarray:
    """Positions [up to `number`] of the first few of each class, as evenly as there are, in order."""
    turns = [np.sum(labels[:i] == label) for i, label in enumerate(labels)]  # of each within its class
    return np.sort(np.argsort(turns, kind='stable')[:number])


def process_rows(batch_size: int, process_index: int, process_count: int) -> slice:
    """The rows of a global batch that a process reads.

    Raises:
        InputError: The batch does not divide by the processes.
    """
    if batch_size < 1 or batch_size % process_count:
        raise InputError(
            f'a batch of {batch_size} does not divide by {process_count} processes; '
            f'expected a multiple of {process_count}'
        )
    local = batch_size // process_count
    return slice(process_index * local, (process_index + 1) * local)


def _read_options(prefetch: int) -> grain.ReadOptions:
    return grain.ReadOptions(num_threads=prefetch, prefetch_buffer_size=prefetch)
