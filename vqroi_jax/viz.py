"""Figures: contact sheets of ROIs, reconstructions with importance overlays, and training curves.

Pure drawing, for commands and notebooks alike: arrays in, a matplotlib `Figure` out, which `save_figure` writes.
Nothing here touches pyplot, so it works in threads and without a display.

Volumes are [depth, height, width] = NIfTI axes 2, 0 and 1. For the orientation of BraTS (axes to the left, to the
back and up) the three planes come out in the radiological way: the patient's right is on the left of axial and
coronal slices, the front is up in axial and left in sagittal ones, the head's top is up in the other two.
"""

import dataclasses
import itertools
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator
from scipy import ndimage

_DARK, _LIGHT, _FAINT = '#161616', '#e8e8e8', '#a0a0a0'  # behind images; text; lesser text
_LINES = ('#e69f00', '#56b4e9', '#009e73', '#cc79a7', '#f0e442', '#d55e00', '#0072b2')  # Okabe and Ito's
_DIFFERENCES = LinearSegmentedColormap.from_list('differences', ('#8fd8ff', '#2b78c2', '#202020', '#c24f2b', '#ffb98f'))
_OVERLAY_OPACITY = 0.45
_DPI = 110
_MARGIN, _GAP, _CAPTION = 0.3, 0.15, 0.24  # inches
_SMALL, _TEXT, _TITLE = 7.5, 9.0, 12.0  # points
_VIEW = "axial, coronal and sagittal slice through the tumour's centre of mass; the patient's right is on the left"


def middle(volume: np.ndarray) -> tuple[int, int, int]:
    """Voxel of the tumour's centre of mass in a volume [D,H,W] with background -1; of an empty one, its middle."""
    tumour = volume > -1
    centre = ndimage.center_of_mass(tumour) if tumour.any() else [(side - 1) / 2 for side in volume.shape]
    return tuple(round(float(place)) for place in centre)


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
        tumour_volumes: for each class the tumour volumes (mL) of all its patients.
        spacing: mm a voxel along depth, height and width, for proportions and a scale bar; None if not known.
    """
    page = _sheet(volumes, labels, titles, spacing, below=2.9)
    axes = page.axes(_MARGIN + 0.5, page.height - 2.5, min(page.width - 2 * _MARGIN - 0.5, 8.0), 1.8)
    _style(axes)
    largest = max((max(values, default=0.0) for values in tumour_volumes.values()), default=0.0)
    edges = np.linspace(0, largest or 1.0, 25)
    for (label, values), colour in zip(tumour_volumes.items(), itertools.cycle(_LINES), strict=False):
        median = f', median {np.median(values):.3g} mL' if len(values) else ''
        axes.hist(values, edges, color=colour, alpha=0.3)
        axes.hist(values, edges, color=colour, histtype='step', linewidth=1.5, label=f'{label}: {len(values)}{median}')
    axes.set_xlabel('tumour volume [mL]')
    axes.set_ylabel('patients')
    axes.set_xlim(0, edges[-1])
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=_TEXT, labelcolor=_LIGHT)
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
    cell = _Cell.of(originals.shape[1:], spacing, panel=1.2)
    left, top, step = _MARGIN, 0.75, cell.height + _CAPTION + _GAP
    page = _Page(4 * cell.width + 3 * _GAP + 2 * left, top + len(originals) * step + 0.95)
    lefts = [left + column * (cell.width + _GAP) for column in range(4)]
    for x, name in zip(lefts, ('original', 'reconstruction', 'reconstruction - original', 'importance'), strict=True):
        page.text(x, 0.42, name, _TITLE)

    differences = recons.astype(np.float32) - originals
    limit = max(float(np.abs(differences).max()), 1e-3)
    importance = [_to_voxels(score, originals.shape[1:]) for score in scores]
    low, high = float(np.min(scores)), float(np.max(scores))
    heat = {'cmap': 'plasma', 'vmin': low, 'vmax': high if high > low else low + 1e-3}
    rows = zip(originals, recons, differences, importance, labels, ids, strict=True)
    for row, (original, recon, difference, score, label, name) in enumerate(rows):
        y, centre = top + row * step, middle(original)
        psnr = 10 * np.log10(4 / max(float(np.mean(difference**2)), 1e-12))
        page.text(left, y + 0.16, f'{label}  {name}', _TEXT)
        page.text(lefts[1], y + 0.16, f'PSNR {psnr:.1f} dB', _TEXT)
        panels = [page.cell(x, y + _CAPTION, cell) for x in lefts]
        cell.draw(panels[0], original, centre)
        cell.draw(panels[1], recon, centre)
        shades = cell.draw(panels[2], difference, centre, cmap=_DIFFERENCES, vmin=-limit, vmax=limit)
        cell.draw(panels[3], original, centre)
        glow = cell.draw(panels[3], score, centre, alpha=_OVERLAY_OPACITY, interpolation='bilinear', **heat)
        if row == 0:
            cell.scale_bar(panels[0])
    for x, image, name in ((lefts[2], shades, 'difference'), (lefts[3], glow, 'importance score')):
        page.colour_bar(x + 0.2, page.height - 0.8, cell.width - 0.4, image, name)
    page.text(left, page.height - 0.3, _VIEW, _SMALL, _FAINT)
    return page.figure


def curves(rows: Sequence[Mapping[str, float | None]], names: Sequence[str] | None = None) -> Figure:
    """Metrics over training steps, one panel a metric; `val/l1` shares the panel of `l1`.

    Args:
        rows: the rows of a run's `metrics.jsonl`: `step` and numbers, None where one was not finite.
        names: the metrics (panels) to show, such as 'l1'; None for all.
    """
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        for key, value in row.items():
            if key != 'step' and value is not None:
                split, name, series = _metric(key)
                if names is None or name in names:
                    line = panels.setdefault(name, {}).setdefault(' '.join((split, *series)), [])
                    line.append((row['step'], value))
    columns = min(4, max(1, len(panels)))
    page = _Page(3.6 * columns + 0.4, 2.5 * max(1, -(-len(panels) // columns)) + 0.2)
    for number, (name, lines) in enumerate(panels.items()):
        row, column = divmod(number, columns)
        axes = page.axes(0.8 + 3.6 * column, 0.4 + 2.5 * row, 2.7, 1.6)
        _style(axes)
        axes.set_title(name.replace('_', ' '), color=_LIGHT, fontsize=_TEXT + 1, loc='left')
        axes.set_xlabel('step')
        for (label, points), colour in zip(lines.items(), itertools.cycle(_LINES), strict=False):
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, color=colour, linewidth=1.3, marker='.' if len(steps) < 30 else '', label=label)
        if len(lines) > 1 or 'train' not in lines:
            axes.legend(frameon=False, fontsize=_SMALL, labelcolor=_LIGHT)
    return page.figure


def save_figure(figure: Figure, path: str | os.PathLike) -> None:
    """Writes a figure as PNG; the file is there as a whole or not at all. Its folder is made if need be."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(prefix=f'.{path.name}.', dir=path.parent)
    try:
        with os.fdopen(handle, 'wb') as file:
            figure.savefig(file, format='png')
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise


# ------------------------------------------------------------------------------------------------------ layout


class _Page:
    """A dark figure that is laid out in inches from its upper left corner, so that text keeps its size."""

    def __init__(self, width: float, height: float):
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width, height), dpi=_DPI, facecolor=_DARK)

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        bottom = self.height - top - height
        return self.figure.add_axes(
            (left / self.width, bottom / self.height, width / self.width, height / self.height), facecolor=_DARK
        )

    def cell(self, left: float, top: float, cell: '_Cell') -> Axes:
        axes = self.axes(left, top, cell.width, cell.height)
        axes.set_axis_off()
        axes.set_xlim(0, cell.width)
        axes.set_ylim(cell.height, 0)
        return axes

    def text(self, left: float, baseline: float, text: str, size: float, colour: str = _LIGHT) -> None:
        self.figure.text(left / self.width, 1 - baseline / self.height, text, fontsize=size, color=colour)

    def colour_bar(self, left: float, top: float, width: float, image: AxesImage, name: str) -> None:
        bar = self.figure.colorbar(image, cax=self.axes(left, top, width, 0.12), orientation='horizontal')
        bar.set_label(name, color=_LIGHT, fontsize=_TEXT)
        bar.outline.set_visible(False)
        bar.solids.set_alpha(1)
        bar.ax.tick_params(colors=_LIGHT, labelsize=_TEXT)


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

    def draw(self, axes: Axes, volume: np.ndarray, centre: Sequence[int], **style) -> AxesImage:
        """Draws the slices of a volume [D,H,W] through a voxel: grey from -1 to 1, if `style` does not say else."""
        style = {'cmap': 'gray', 'vmin': -1, 'vmax': 1, 'interpolation': 'nearest'} | style
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
        axes.plot((x, x + length * self.per_mm), (y, y), color=_LIGHT, linewidth=2, solid_capstyle='butt')
        axes.text(x, y - 0.05, f'{length} mm', color=_LIGHT, fontsize=_SMALL)


def _sheet(
    volumes: np.ndarray, labels: Sequence[str], titles: Sequence[str], spacing: Sequence[float] | None, below: float
) -> _Page:
    """The contact sheet, with `below` inches left free under it."""
    classes: dict[str, list[tuple[np.ndarray, str]]] = {}
    for volume, label, title in zip(volumes, labels, titles, strict=True):
        classes.setdefault(label, []).append((volume, title))
    columns = min(4, max(len(members) for members in classes.values()))
    cell = _Cell.of(volumes.shape[1:], spacing, panel={1: 2.4, 2: 1.6}.get(columns, 1.15))
    step, head = cell.height + _CAPTION + _GAP, 0.4
    lines = {label: -(-len(members) // columns) for label, members in classes.items()}
    height = sum(head + n * step for n in lines.values()) + 0.4 + below
    page = _Page(columns * (cell.width + _GAP) - _GAP + 2 * _MARGIN, height)
    top, first = 0.1, True
    for label, members in classes.items():
        page.text(_MARGIN, top + 0.25, label, _TITLE)
        for number, (volume, title) in enumerate(members):
            row, column = divmod(number, columns)
            left, upper = _MARGIN + column * (cell.width + _GAP), top + head + row * step
            page.text(left, upper + 0.16, title, _TEXT, _FAINT)
            axes = page.cell(left, upper + _CAPTION, cell)
            cell.draw(axes, volume, middle(volume))
            if first:
                cell.scale_bar(axes)
            first = False
        top += head + lines[label] * step
    page.text(_MARGIN, top + 0.15, _VIEW, _SMALL, _FAINT)
    return page


def _style(axes: Axes) -> None:
    axes.tick_params(colors=_LIGHT, labelsize=_TEXT)
    axes.xaxis.label.set(color=_LIGHT, fontsize=_TEXT)
    axes.yaxis.label.set(color=_LIGHT, fontsize=_TEXT)
    axes.grid(color='#3a3a3a', linewidth=0.5)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.ticklabel_format(axis='y', scilimits=(-3, 5), useOffset=False)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ('left', 'bottom'))
        spine.set_color(_FAINT)


def _to_voxels(scores: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Scores [d,h,w] of regions, interpolated linearly to the voxels of a volume of `shape`."""
    zoom = [voxels / regions for voxels, regions in zip(shape, scores.shape, strict=True)]
    return ndimage.zoom(scores.astype(np.float32), zoom, order=1, mode='nearest', grid_mode=True)


def _metric(key: str) -> tuple[str, str, list[str]]:
    """Split, metric and the rest of a name such as 'val/psnr/HGG'; all of a name without split is a training metric."""
    first, *rest = key.split('/')
    if first not in ('train', 'val', 'test') or not rest:
        return 'train', key, []
    return first, rest[0], rest[1:]
