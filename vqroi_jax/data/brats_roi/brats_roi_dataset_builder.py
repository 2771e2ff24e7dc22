"""The TFDS builder `brats_roi`: one record a tumour ROI, stored as ArrayRecord, read without TensorFlow.

It is a `ShardBasedBuilder`, which writes each record as it comes. A `GeneratorBasedBuilder` collects a split in
memory first and, above 1 GB (a hundred patients of 128³), goes on through TensorFlow's file system.
"""

import contextlib
import errno
import functools
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from vqroi_jax import progress
from vqroi_jax.data.brats_roi.crops import load_crop

_SHARD_BYTES = 2**28  # of decoded records: what TFDS holds in memory until a shard is written

_DESCRIPTION = """\
Tumour regions of interest cut out of brain MRI by vqroi_jax: the image times its tumour mask, in a box of fixed size
around the tumour, with all that is needed to put it back into its brain."""


class Builder(tfds.core.ShardBasedBuilder):
    """Stores crops (see `crops.save_crop`) by split, in the given order.

    Args:
        roi_size: Depth, height and width of every ROI, in voxels.
        dtype: Of the raw intensities: float32, or float64 if some image needs it to come back exactly (`Roi.raw`).
        classes: Names of the classes in the order of their numbers.
        splits: For each split that is not empty, (id, patient, label, crop file) of each record.
        data_dir: Folder that will hold `brats_roi/VERSION`.
    """

    VERSION = tfds.core.Version('1.0.0')

    def __init__(
        self,
        *,
        roi_size: Sequence[int],
        dtype: str,
        classes: Sequence[str],
        splits: Mapping[str, Sequence[tuple[str, str, str, Path]]],
        **kwargs: Any,
    ):
        self._roi_size = tuple(roi_size)
        self._dtype = np.dtype(dtype)
        self._classes = tuple(classes)
        self._splits = splits
        self._bar: Any = None  # while it is built
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        # Raw bytes: ten times faster to decode than zlib's, ArrayRecord compresses records by itself, and float64
        # stays float64 (the protocol buffer's own floats are float32).
        tensor = functools.partial(tfds.features.Tensor, encoding=tfds.features.Encoding.BYTES)
        features = {
            'volume': tensor(shape=self._roi_size, dtype=self._dtype, doc='raw intensities, 0 outside the mask'),
            'mask': tensor(shape=self._roi_size, dtype=np.bool_, doc='tumour'),
            'label': tfds.features.ClassLabel(names=list(self._classes)),
            'id': tfds.features.Text(),
            'patient': tfds.features.Text(doc='the unit of splits'),
            'offset': tensor(shape=(3,), dtype=np.int32, doc='of voxel 0 in the full volume: depth, height, width'),
            'shape': tensor(
                shape=(3,), dtype=np.int32, doc='of the full volume, with BraTS axes: depth, height, width'
            ),
            'affine': tensor(
                shape=(4, 4), dtype=np.float64, doc='of the full NIfTI volume, with BraTS axes: i, j, k to mm'
            ),
            'range': tensor(shape=(2,), dtype=np.float64, doc='intensities that become -1 and 1'),
            'background': tensor(shape=(), dtype=np.float64, doc='intensity subtracted from the image'),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=_DESCRIPTION,
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
        )

    def _shard_iterators_per_split(self, dl_manager: Any) -> dict[str, list]:
        """Shards of equal numbers of records, so small that TFDS may hold one in memory."""
        del dl_manager
        length = max(1, _SHARD_BYTES // ((self._dtype.itemsize + 1) * int(np.prod(self._roi_size))))
        return {
            split: [
                functools.partial(self._generate, records[start : start + length])
                for start in range(0, len(records), length)
            ]
            for split, records in self._splits.items()
        }

    def _generate(self, records: Sequence[tuple[str, str, str, Path]]) -> Iterator[tuple[str, dict]]:
        for scan, patient, label, path in records:
            crop = load_crop(path)
            crop['volume'] = crop['volume'].astype(self._dtype)
            yield scan, {'id': scan, 'patient': patient, 'label': label, **crop}
            self._bar.update()

    def build(self) -> Path:
        """Writes the dataset; our progress bar stands in for TFDS's.

        Returns:
            The dataset's folder.

        Raises:
            OSError: The disk is full, or what else keeps it from being written.
        """
        tfds.disable_progress_bar()
        total = sum(len(records) for records in self._splits.values())
        quiet = contextlib.redirect_stdout(io.StringIO())  # TFDS's notes on downloads
        with quiet, progress.bar('storing', 'patient', total=total) as self._bar:
            try:
                self.download_and_prepare(file_format='array_record', download_dir=self._data_dir_root)
            except RuntimeError as error:  # all that ArrayRecord has
                if os.strerror(errno.ENOSPC) in str(error):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.data_dir) from error
                raise
        return Path(self.data_dir)
