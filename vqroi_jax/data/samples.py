"""Generated ROIs on disk: NIfTI files, and the manifest that lists those that are whole.

Last step of the data's way: `vqroi_jax.generate` writes here what a trained model draws, and whoever reads samples
back begins with `read_manifest`. A file is written under another name and renamed, its line is appended after: what
the manifest lists was whole when it was listed, whenever the process died. Files of the same content are the same to
the bit.
"""

import csv
import gzip
import io
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import nibabel
import numpy as np

from vqroi_jax.errors import InputError
from vqroi_jax.workdir import write_atomically

MANIFEST_FILE = 'manifest.csv'
KEY = 'file'  # the manifest's column that names a sample

_UNREADABLE = (OSError, EOFError, ValueError, OverflowError, zlib.error)  # what nibabel raises at a damaged file


def class_folder(label: str) -> str:
    """The name of a class as that of a folder: what cannot stand in one is %XX, so that no two classes share one."""
    return re.sub(r'[%/\\:*?"<>|\x00-\x1f]|^\.+', lambda bad: ''.join(f'%{ord(c):02X}' for c in bad[0]), label)


def centred_affine(size: Sequence[int], spacing: Sequence[float]) -> np.ndarray:
    """An affine with the axes of BraTS (to the left, to the back and up) and the ROI's middle at 0 mm.

    Args:
        size: voxels of the ROI along (D, H, W).
        spacing: mm a voxel along (D, H, W).

    Returns:
        float64 [4, 4] for NIfTI voxels (i, j, k) = (H, W, D).
    """
    (depth, height, width), (by_depth, by_height, by_width) = size, spacing
    affine = np.diag([-by_height, -by_width, by_depth, 1.0])
    affine[:3, 3] = -affine[:3, :3] @ ((np.array([height, width, depth]) - 1) / 2)
    return affine


def load_nifti(path: str | Path, name: str) -> nibabel.Nifti1Image:
    """Opens a NIfTI file; its voxels are read when they are asked for, see `read_voxels`.

    Args:
        path: of a .nii or .nii.gz file.
        name: what messages call it, such as 'config.reference=PATH'.

    Raises:
        InputError: there is no such file, it is empty or no NIfTI file, or its affine is none.
    """
    path = Path(path).expanduser()
    if path.is_file() and not path.stat().st_size:
        raise InputError(f'{name}: empty file')
    try:
        image = nibabel.load(path)
    except FileNotFoundError:
        raise InputError(f'{name}: there is no such file') from None
    except (nibabel.filebasedimages.ImageFileError, nibabel.spatialimages.HeaderDataError, *_UNREADABLE) as error:
        raise InputError(f'{name}: not a NIfTI file (.nii or .nii.gz) that can be read') from error
    if not isinstance(image, nibabel.Nifti1Image):  # Nifti2Image is one
        raise InputError(f'{name}: a NIfTI file (.nii or .nii.gz) is expected')
    if not np.isfinite(image.affine).all() or not np.linalg.det(image.affine):
        raise InputError(f'{name}: its affine does not map voxels to places')
    return image


def read_voxels(image: nibabel.Nifti1Image, name: str) -> np.ndarray:
    """Reads the voxels of an image that `load_nifti` opened.

    Args:
        image: three axes; further ones must have length 1.
        name: what messages call it.

    Returns:
        [i, j, k]: whole numbers as they are stored if the header does not scale them, float32 otherwise.

    Raises:
        InputError: the file is truncated or damaged, or holds no volume of finite real numbers.
    """
    shape = image.shape
    if len(shape) < 3 or any(side != 1 for side in shape[3:]) or 0 in shape:
        raise InputError(f'{name}: a volume of three axes is needed, this has shape {shape}')
    if image.get_data_dtype().kind not in 'iuf':
        raise InputError(f'{name}: real numbers are needed, this has {image.get_data_dtype()}')
    try:
        voxels = np.asanyarray(image.dataobj).reshape(shape[:3], order='F')
    except _UNREADABLE as error:
        reason = ' '.join(str(error).split())
        raise InputError(f'{name}: truncated or damaged ({reason}); copy it again') from error
    if voxels.dtype.kind == 'f':
        voxels = voxels.astype(np.float32)
    if not np.isfinite(voxels).all():
        raise InputError(f'{name}: it has voxels that are not finite')
    return voxels


def make_nifti(voxels: np.ndarray, affine: np.ndarray, description: str) -> nibabel.Nifti1Image:
    """A NIfTI image in mm, with `affine` as both sform and qform.

    Args:
        voxels: [i, j, k] of a type that NIfTI has.
        affine: [4, 4].
        description: the header's text, at most 79 ASCII characters.
    """
    image = nibabel.Nifti1Image(voxels, affine, dtype=voxels.dtype)
    image.set_sform(affine, code='scanner')
    image.set_qform(affine, code='scanner')
    image.header.set_xyzt_units('mm')
    image.header['descrip'] = description.encode('ascii')
    return image


def pack(image: nibabel.Nifti1Image) -> bytes:
    """The content of a .nii.gz file, without a time stamp: the same voxels and header give the same bytes."""
    return gzip.compress(image.to_bytes(), compresslevel=1, mtime=0)  # level 1: more takes long and saves little


def read_manifest(path: Path) -> list[dict[str, str]]:
    """The rows of a manifest, by column; none if there is no such file.

    A last line that an interruption tore is left out.

    Raises:
        InputError: another line is damaged.
    """
    try:
        lines = list(csv.reader(io.StringIO(_whole_lines(path).decode(), newline=''), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f'{path} is damaged ({error}); restore it, or use another workdir') from None
    rows = []
    for number, line in enumerate(lines[1:], 2):
        if len(line) != len(lines[0]):
            raise InputError(f'{path} is damaged: row {number} has {len(line)} of {len(lines[0])} columns')
        rows.append(dict(zip(lines[0], line, strict=True)))
    return rows


class Manifest:
    """A manifest that samples are added to. A torn last line is cut off when it is opened.

    Attributes:
        rows: by the column `KEY`, in the order of the file: what is listed.

    Args:
        path: of the CSV file; made with the first row, if missing.
        columns: its first line; `KEY` is one of them.

    Raises:
        InputError: it is damaged, lists a sample twice or has other columns.
    """

    def __init__(self, path: Path, columns: Sequence[str]):
        self._path, self._columns = path, tuple(columns)
        rows = read_manifest(path)
        self.rows = {row.get(KEY): row for row in rows}
        if rows and tuple(rows[0]) != self._columns:
            raise InputError(f'{path} has other columns than {", ".join(columns)}; restore it, or use another workdir')
        if len(self.rows) < len(rows):
            raise InputError(f'{path} is damaged: it lists a file twice; restore it, or use another workdir')
        if not rows:
            path.unlink(missing_ok=True)
        elif torn := len(path.read_bytes()) - len(_whole_lines(path)):
            os.truncate(path, path.stat().st_size - torn)

    def append(self, row: Mapping[str, str]) -> None:
        """Adds a line, on the disk when this returns.

        Raises:
            OSError: it cannot be written; nothing is left of it.
        """
        line = _line([row[name] for name in self._columns])
        if self.rows:
            _append(self._path, line)
        else:
            write_atomically(self._path, _line(self._columns) + line)
        self.rows[row[KEY]] = dict(row)


def _append(path: Path, line: bytes) -> None:
    end = path.stat().st_size
    try:
        with open(path, 'ab') as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        os.truncate(path, end)
        raise


def _whole_lines(path: Path) -> bytes:
    """A file's content without a last line that has no end; nothing if there is no such file."""
    content = path.read_bytes() if path.exists() else b''
    return content[: content.rfind(b'\n') + 1]


def _line(values: Sequence[str]) -> bytes:
    text = io.StringIO(newline='')
    csv.writer(text, lineterminator='\n').writerow(values)
    return text.getvalue().encode()
