"""Pictures of ROIs in slices: contact sheets, reconstructions with importance overlays, completions, neighbours."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator
from scipy import ndimage

from vqroi_jax.viz.page import CAPTION, COLOURS, FAINT, GAP, LIGHT, MARGIN, SMALL, TEXT, TITLE, Page, style

_DIFFERENCES = LinearSegmentedColormap.from_list('differences', ('#8fd8ff', '#2b78c2', '#202020', '#c24f2b', '#ffb98f'))
_OVERLAY_OPACITY = 0.45
_GLOW = 'importance score, over bright (above) to dark voxels'
_HAZE = -0.9  # what is darker in a decoded volume counts as background when its centre is looked for
_VIEW = "axial, coronal and sagittal slice through the tumour's centre of mass; the patient's right is on the left"


def middle(volume: np.ndarray) -> tuple[int, int, int]:
    """Voxel of the tumour's centre of mass in a volume [D,H,W] with background -1; of an empty one, its middle."""
    tumour = volume > -1
    centre = ndimage.center_of_mass(tumour) if tumour.any() else [(side - 1) / 2 for side in volume.shape]
    depth, height, width = (round(float(place)) for place in centre)
    return depth, height, width


def slices(volume: np.ndarray, centre: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Axial [W,H], coronal [D,H] and sagittal [D,W] slice of a volume [D,H,W] through a voxel, top row first."""
    depth, height, width = centre
    return volume[depth].T, volume[::-1, :, width], volume[::-1, height]


def contact_sheet(
    volumes: np.ndarray,
    labels: Sequence[str],
    titles: Sequence[str],
    spacing: Sequence[float] | None = None,
) -> Figure:
    """ROIs class by class, each as three slices through the tumour's centre of mass.

    Args:
        volumes: [n,D,H,W] in [-1,1], background -1.
        labels: [n] class names; classes are shown in the order of their first ROI.
        titles: [n] what to write over each ROI.
        spacing: mm a voxel along depth, height and width, for proportions and a scale bar; None if not known.

    Raises:
        ValueError: labels or titles are not as many as volumes.
    """
    return _sheet(volumes, labels, titles, spacing, below=0.0).figure


def cohort(
    volumes: np.ndarray,
    labels: Sequence[str],
    titles: Sequence[str],
    tumour_volumes: Mapping[str, Sequence[float]],
    spacing: Sequence[float] | None = None,
) -> Figure:
    """A contact sheet of some ROIs, and below it the histogram of all tumour volumes.

    Args:
        volumes: [n,D,H,W] in [-1,1], background -1: the ROIs to show.
        labels: [n] their class names.
        titles: [n] what to write over each.
        tumour_volumes: for each class the tumour volumes (mL) of all its scans.
        spacing: mm a voxel along depth, height and width, for proportions and a scale bar; None if not known.
    """
    page = _sheet(volumes, labels, titles, spacing, below=2.9)
    axes = page.axes(MARGIN + 0.5, page.height - 2.5, min(page.width - 2 * MARGIN - 0.5, 8.0), 1.8)
    style(axes)
    largest = max((max(values, default=0.0) for values in tumour_volumes.values()), default=0.0)
    edges = np.linspace(0, largest or 1.0, 25).tolist()
    for (label, values), colour in zip(tumour_volumes.items(), itertools.cycle(COLOURS), strict=False):
        median = f', median {np.median(values):.3g} mL' if len(values) else ''
        axes.hist(values, edges, color=colour, alpha=0.3)
        axes.hist(values, edges, color=colour, histtype='step', linewidth=1.5, label=f'{label}: {len(values)}{median}')
    axes.set_xlabel('tumour volume [mL]')
    axes.set_ylabel('scans')
    axes.set_xlim(0, edges[-1])
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=TEXT, labelcolor=LIGHT)
    return page.figure


def reconstructions(
    originals: np.ndarray,
    recons: np.ndarray,
    scores: np.ndarray,
    labels: Sequence[str],
    ids: Sequence[str],
    spacing: Sequence[float] | None = None,
) -> Figure:
    """One row an ROI: original, reconstruction, their difference, and what the scorer finds important.

    Each is shown as three slices through the original tumour's centre of mass. Scores lie on the latent grid and
    are interpolated to voxels. Differences and scores have one colour scale for all rows.

    Args:
        originals: [n,D,H,W] in [-1,1], background -1.
        recons: [n,D,H,W] in [-1,1].
        scores: [n,d,h,w] importance on the latent grid, in (0,1).
        labels: [n] class names.
        ids: [n] names of the scans.
        spacing: mm a voxel along depth, height and width, for proportions and a scale bar; None if not known.

    Raises:
        ValueError: the arguments are not equally many.
    """
    columns = ('original', 'reconstruction', 'reconstruction - original', 'importance')
    table = _Table.of(originals, columns, spacing, below=1.1)
    differences = recons.astype(np.float32) - originals
    limit = max(float(np.abs(differences).max()), 1e-3)
    overlay = _Overlay.of(scores, originals.shape[1:])
    rows = zip(originals, recons, differences, scores, labels, ids, strict=True)
    for row, (original, recon, difference, score, label, name) in enumerate(rows):
        centre = middle(original)
        psnr = 10 * np.log10(4 / max(float(np.mean(difference**2)), 1e-12))
        panels = table.row(row, (f'{label}  {name}', f'PSNR {psnr:.1f} dB'))
        table.cell.draw(panels[0], original, centre)
        table.cell.draw(panels[1], recon, centre)
        shades = table.cell.draw(panels[2], difference, centre, cmap=_DIFFERENCES, vmin=-limit, vmax=limit)
        glow = overlay.draw(table.cell, panels[3], original, score, centre)
    table.colour_bar(2, shades, 'difference')
    table.colour_bar(3, glow, _GLOW)
    return table.page.figure


def completions(
    originals: np.ndarray,
    recons: np.ndarray,
    halves: np.ndarray,
    samples: np.ndarray,
    scores: np.ndarray,
    labels: Sequence[str],
    ids: Sequence[str],
    spacing: Sequence[float] | None = None,
) -> Figure:
    """One row an ROI: original, importance, reconstruction, and what stage 2 draws from half of its tokens and none.

    Each is shown as three slices through its own centre of mass; importance lies on the original.

    Args:
        originals: [n,D,H,W] in [-1,1], background -1.
        recons: [n,D,H,W] in [-1,1], of the true tokens.
        halves: [n,D,H,W] in [-1,1], of tokens whose first half is the original's.
        samples: [n,D,H,W] in [-1,1], of tokens that are all drawn for the class.
        scores: [n,d,h,w] importance on the latent grid, in (0,1).
        labels: [n] class names.
        ids: [n] names of the scans.
        spacing: mm a voxel along depth, height and width, for proportions and a scale bar; None if not known.

    Raises:
        ValueError: the arguments are not equally many.
    """
    columns = ('original', 'importance', 'reconstruction', 'half of the tokens drawn', 'all tokens drawn')
    table = _Table.of(originals, columns, spacing, below=1.1)
    overlay = _Overlay.of(scores, originals.shape[1:])
    rows = zip(originals, recons, halves, samples, scores, labels, ids, strict=True)
    for row, (original, recon, half, sample, score, label, name) in enumerate(rows):
        panels = table.row(row, (f'{label}  {name}', '', '', '', label))
        glow = overlay.draw(table.cell, panels[1], original, score, middle(original))
        for panel, volume in ((0, original), (2, recon), (3, half), (4, sample)):
            table.cell.draw(panels[panel], volume, middle(_without_haze(volume)))
    table.colour_bar(1, glow, _GLOW)
    return table.page.figure


def neighbours(
    samples: np.ndarray,
    nearest: np.ndarray,
    names: Sequence[str],
    ids: Sequence[str],
    measures: Sequence[str],
    spacing: Sequence[float] | None = None,
    reference: str = 'real ROI',
) -> Figure:
    """One row a sample: it, the real ROI that is most like it, and their difference.

    Each is shown as three slices through the sample's centre of mass. Differences have one colour scale for all rows.

    Args:
        samples: [n,D,H,W] in [-1,1], background -1.
        nearest: [n,D,H,W] in [-1,1].
        names: [n] what to write over each sample.
        ids: [n] what to write over each real ROI.
        measures: [n] how near they are, to write over each difference.
        spacing: mm a voxel along depth, height and width, for proportions and a scale bar; None if not known.
        reference: what the ROIs are that samples are compared with.

    Raises:
        ValueError: the arguments are not equally many.
    """
    columns = ('synthetic', f'nearest {reference}', f'synthetic - {reference}')
    table = _Table.of(samples, columns, spacing, below=1.1)
    differences = samples.astype(np.float32) - nearest
    limit = max(float(np.abs(differences).max()), 1e-3)
    rows = zip(samples, nearest, differences, names, ids, measures, strict=True)
    for row, (sample, real, difference, *captions) in enumerate(rows):
        centre = middle(sample)
        panels = table.row(row, captions)
        table.cell.draw(panels[0], sample, centre)
        table.cell.draw(panels[1], real, centre)
        shades = table.cell.draw(panels[2], difference, centre, cmap=_DIFFERENCES, vmin=-limit, vmax=limit)
    table.colour_bar(2, shades, 'difference')
    return table.page.figure


@dataclasses.dataclass(frozen=True)
class _Cell:
    """Three slices of one volume side by side, in inches."""

    sizes: tuple[tuple[float, float], ...]  # [3] width and height of each slice
    per_mm: float | None  # inches a millimetre, None if not known

    @classmethod
    def of(cls, shape: Sequence[int], spacing: Sequence[float] | None, panel: float) -> '_Cell':
        """A cell for volumes of `shape` [D,H,W] voxels, whose longest side takes `panel` inches."""
        depth, height, width = (n * mm for n, mm in zip(shape, spacing or (1, 1, 1), strict=True))
        scale = panel / max(depth, height, width)
        sides = ((height, width), (height, depth), (width, depth))
        return cls(tuple((x * scale, y * scale) for x, y in sides), scale if spacing is not None else None)

    @property
    def width(self) -> float:
        return sum(width for width, _ in self.sizes) + 0.08

    @property
    def height(self) -> float:
        return max(height for _, height in self.sizes)

    def draw(self, axes: Axes, volume: np.ndarray, centre: Sequence[int], **style: Any) -> AxesImage:
        """Draws the slices of a volume [D,H,W] through a voxel: grey from -1 to 1, if `style` does not say else."""
        style = {'cmap': 'gray', 'vmin': -1, 'vmax': 1, 'interpolation': 'nearest', **style}
        left = 0.0
        for part, (width, height) in zip(slices(volume, centre), self.sizes, strict=True):
            image = axes.imshow(part, extent=(left, left + width, height, 0), aspect='auto', **style)
            left += width + 0.04
        axes.set_xlim(0, self.width)
        axes.set_ylim(self.height, 0)
        return image

    def scale_bar(self, axes: Axes) -> None:
        """A bar of 10, 20 or 50 mm in the lower left corner, if the voxels' size is known."""
        if self.per_mm is None:
            return
        length = max((mm for mm in (1, 2, 5, 10, 20, 50) if mm * self.per_mm < 0.5), default=1)
        x, y = 0.08, self.height - 0.08
        axes.plot((x, x + length * self.per_mm), (y, y), color=LIGHT, linewidth=2, solid_capstyle='butt')
        axes.text(x, y - 0.05, f'{length} mm', color=LIGHT, fontsize=SMALL)


@dataclasses.dataclass(frozen=True)
class _Table:
    """A page with a row a ROI and a column a kind of picture."""

    page: Page
    cell: _Cell
    lefts: tuple[float, ...]  # inches, of the columns

    @classmethod
    def of(cls, volumes: np.ndarray, columns: Sequence[str], spacing: Sequence[float] | None, below: float) -> '_Table':
        """A table for volumes [n,D,H,W] with its column titles, and `below` inches under the rows."""
        cell = _Cell.of(volumes.shape[1:], spacing, panel=1.2)
        number = len(columns)
        width = number * cell.width + (number - 1) * GAP + 2 * MARGIN
        page = Page(width, cls._top(cell, len(volumes)) + below)
        lefts = tuple(MARGIN + column * (cell.width + GAP) for column in range(number))
        for x, name in zip(lefts, columns, strict=True):
            page.text(x, 0.42, name, TITLE)
        page.text(MARGIN, page.height - 0.3, _VIEW, SMALL, FAINT)
        return cls(page, cell, lefts)

    @staticmethod
    def _top(cell: _Cell, row: int) -> float:
        return 0.75 + row * (cell.height + CAPTION + GAP)

    def row(self, row: int, captions: Sequence[str]) -> list[Axes]:
        """The panels of a row, the first columns with captions, and a scale bar in the very first."""
        y = self._top(self.cell, row)
        for x, caption in zip(self.lefts, captions, strict=False):
            self.page.text(x, y + 0.16, caption, TEXT)
        panels = [self.page.panel(x, y + CAPTION, self.cell.width, self.cell.height) for x in self.lefts]
        if row == 0:
            self.cell.scale_bar(panels[0])
        return panels

    def colour_bar(self, column: int, image: AxesImage, name: str) -> None:
        """A colour bar under a column."""
        left, width = self.lefts[column] + 0.2, self.cell.width - 0.4
        self.page.colour_bar(left, self.page.height - 0.95, width, image, name)


@dataclasses.dataclass(frozen=True)
class _Overlay:
    """Importance as a glow over an ROI, on one scale for several."""

    shape: tuple[int, ...]  # of the volumes [D,H,W]
    low: float
    high: float

    @classmethod
    def of(cls, scores: np.ndarray, shape: Sequence[int]) -> '_Overlay':
        low, high = float(np.min(scores)), float(np.max(scores))
        return cls(tuple(shape), low, high if high > low else low + 1e-3)

    def draw(self, cell: _Cell, axes: Axes, volume: np.ndarray, score: np.ndarray, centre: Sequence[int]) -> AxesImage:
        """Draws a volume [D,H,W], and over it its scores [d,h,w] interpolated to voxels."""
        cell.draw(axes, volume, centre)
        style = {'cmap': 'plasma', 'vmin': self.low, 'vmax': self.high, 'interpolation': 'bilinear'}
        return cell.draw(axes, _to_voxels(score, self.shape), centre, alpha=_OVERLAY_OPACITY, **style)


def _without_haze(volume: np.ndarray) -> np.ndarray:
    """A decoded volume with its background at -1, where it is only nearly so."""
    return np.where(volume > _HAZE, volume, -1)


def _sheet(
    volumes: np.ndarray, labels: Sequence[str], titles: Sequence[str], spacing: Sequence[float] | None, below: float
) -> Page:
    """The contact sheet, with `below` inches left free under it."""
    classes: dict[str, list[tuple[np.ndarray, str]]] = {}
    for volume, label, title in zip(volumes, labels, titles, strict=True):
        classes.setdefault(label, []).append((volume, title))
    columns = min(4, max(len(members) for members in classes.values()))
    cell = _Cell.of(volumes.shape[1:], spacing, panel={1: 2.4, 2: 1.6}.get(columns, 1.15))
    step, head = cell.height + CAPTION + GAP, 0.4
    lines = {label: -(-len(members) // columns) for label, members in classes.items()}
    height = sum(head + n * step for n in lines.values()) + 0.4 + below
    page = Page(columns * (cell.width + GAP) - GAP + 2 * MARGIN, height)
    top, first = 0.1, True
    for label, members in classes.items():
        page.text(MARGIN, top + 0.25, label, TITLE)
        for number, (volume, title) in enumerate(members):
            row, column = divmod(number, columns)
            left, upper = MARGIN + column * (cell.width + GAP), top + head + row * step
            page.text(left, upper + 0.16, title, TEXT, FAINT)
            axes = page.panel(left, upper + CAPTION, cell.width, cell.height)
            cell.draw(axes, volume, middle(volume))
            if first:
                cell.scale_bar(axes)
            first = False
        top += head + lines[label] * step
    page.text(MARGIN, top + 0.15, _VIEW, SMALL, FAINT)
    return page


def _to_voxels(scores: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Scores [d,h,w] of regions, interpolated linearly to the voxels of a volume of `shape`."""
    zoom = [voxels / regions for voxels, regions in zip(shape, scores.shape, strict=True)]
    return ndimage.zoom(scores.astype(np.float32), zoom, order=1, mode='nearest', grid_mode=True)
