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
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from scipy import ndimage, stats

from vqroi_jax.masking import Role

_DARK, _LIGHT, _FAINT = '#161616', '#e8e8e8', '#a0a0a0'  # behind images; text; lesser text
_LINES = ('#e69f00', '#56b4e9', '#009e73', '#cc79a7', '#f0e442', '#d55e00', '#0072b2')  # Okabe and Ito's
_DIFFERENCES = LinearSegmentedColormap.from_list('differences', ('#8fd8ff', '#2b78c2', '#202020', '#c24f2b', '#ffb98f'))
_OVERLAY_OPACITY = 0.45
_HAZE = -0.9  # what is darker in a decoded volume counts as background when its centre is looked for
_DPI = 110
_MARGIN, _GAP, _CAPTION = 0.3, 0.15, 0.24  # inches
_SMALL, _TEXT, _TITLE = 7.5, 9.0, 12.0  # points
_SLICES = 8  # of a grid of tokens, at most
_SLICE, _NAME = 0.85, 0.95  # inches: the longer side of a slice of tokens; what a strip is called
_ROLES = {  # of a token: colour and meaning
    Role.START: (_LINES[0], 'start: drawn to become [MASK]'),
    Role.NEIGHBOUR: (_LINES[4], 'neighbour: beside a start, becomes [MASK]'),
    Role.FILL: (_LINES[3], 'fill: next in importance, becomes [MASK]'),
    Role.RANDOM: (_LINES[1], 'random: becomes a random code'),
    Role.KEPT: ('#3a3a3a', 'kept: stays as it is'),
}
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
        tumour_volumes: for each class the tumour volumes (mL) of all its patients.
        spacing: mm a voxel along depth, height and width, for proportions and a scale bar; None if not known.
    """
    page = _sheet(volumes, labels, titles, spacing, below=2.9)
    axes = page.axes(_MARGIN + 0.5, page.height - 2.5, min(page.width - 2 * _MARGIN - 0.5, 8.0), 1.8)
    _style(axes)
    largest = max((max(values, default=0.0) for values in tumour_volumes.values()), default=0.0)
    edges = np.linspace(0, largest or 1.0, 25).tolist()
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
    table.colour_bar(3, glow, 'importance score')
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
    table.colour_bar(1, glow, 'importance score')
    return table.page.figure


def masking(scores: np.ndarray, roles: np.ndarray, labels: Sequence[str], ids: Sequence[str]) -> Figure:
    """What stage 2 must restore: for each ROI the importance of its tokens and, below, what becomes of each.

    Shown are axial slices of the latent grid, evenly spaced where there are more than eight. Importance has one colour
    scale for all ROIs.

    Args:
        scores: [n,d,h,w] importance on the latent grid, in (0,1).
        roles: [n,d,h,w] integers, values of `masking.Role`.
        labels: [n] class names.
        ids: [n] names of the scans.

    Raises:
        ValueError: the arguments are not equally many.
    """
    strips = _Strips.of(scores.shape)
    low, high = float(scores.min()), float(scores.max())
    heat = {'cmap': 'plasma', 'vmin': low, 'vmax': high if high > low else low + 1e-3}
    colours = {'cmap': ListedColormap([_ROLES[role][0] for role in Role]), 'vmin': -0.5, 'vmax': len(Role) - 0.5}
    for row, (score, role, label, name) in enumerate(zip(scores, roles, labels, ids, strict=True)):
        counts = ', '.join(f'{member.name.lower()} {np.sum(role == member)}' for member in _ROLES if member in role)
        top = strips.caption(row, f'{label}  {name}', f'of {role.size} tokens: {counts}')
        glow = strips.draw(top, 'importance', score, heat)
        strips.draw(top + strips.height + 0.05, 'role', role, colours)
    strips.page.colour_bar(_MARGIN, strips.bottom + 0.1, 1.9, glow, 'importance score')
    strips.legend([meaning for role, meaning in _ROLES.items() if role in roles])
    return strips.page.figure


def distributions(real: Mapping[str, Sequence[float]], made: Mapping[str, Sequence[float]], quantity: str) -> Figure:
    """How a quantity is distributed, real beside synthetic: a panel a class, with the Kolmogorov-Smirnov distance.

    Args:
        real: for each class its values of patients, at least one.
        made: the same of samples, at least one; the same classes.
        quantity: its name and unit, such as 'tumour volume [mL]'.
    """
    page = _Page(4.4 * len(real) + 0.4, 3.2)
    everything = np.concatenate([*real.values(), *made.values()])
    low, high = min(0.0, float(everything.min())), float(everything.max())
    edges = np.linspace(low, high if high > low else low + 1, 25).tolist()
    for number, (label, values) in enumerate(real.items()):
        axes = _panel(page, number, label, quantity, '% of the class')
        distance = stats.ks_2samp(values, made[label]).statistic
        for name, part, colour in (('real', values, _LINES[1]), ('synthetic', made[label], _LINES[0])):
            weights = np.full(len(part), 100 / len(part))
            text = f'{name}: {len(part)}, median {np.median(part):.3g}'
            axes.hist(part, edges, weights=weights, color=colour, alpha=0.3)
            axes.hist(part, edges, weights=weights, color=colour, histtype='step', linewidth=1.5, label=text)
        axes.set_xlim(edges[0], edges[-1])
        _legend_above(axes, f'KS distance {distance:.2f}')
    return page.figure


def intensities(real: Mapping[str, np.ndarray], made: Mapping[str, np.ndarray]) -> Figure:
    """How bright tumours are, real beside synthetic: a panel a class.

    Args:
        real: for each class the share of its tumours' voxels in equal bins of [-1, 1], each ROI counting the same.
        made: the same of samples; the same classes.
    """
    page = _Page(4.4 * len(real) + 0.4, 3.2)
    for number, (label, shares) in enumerate(real.items()):
        axes = _panel(page, number, label, "intensity, -1 to the ROI's range's end at 1", '% of the tumour')
        for name, part, colour in (('real', shares, _LINES[1]), ('synthetic', made[label], _LINES[0])):
            edges = np.linspace(-1, 1, len(part) + 1)
            axes.stairs(100 * part, edges, color=colour, alpha=0.3, fill=True)
            axes.stairs(100 * part, edges, color=colour, linewidth=1.5, label=name)
        axes.set_xlim(-1, 1)
        _legend_above(axes)
    return page.figure


def _legend_above(axes: Axes, title: str | None = None) -> None:
    """A legend in the upper right corner, with room made for it over what is drawn."""
    axes.set_ylim(0, 1.5 * axes.get_ylim()[1])
    legend = axes.legend(frameon=False, fontsize=_SMALL, labelcolor=_LIGHT, title=title, loc='upper right')
    legend.get_title().set(color=_LIGHT, fontsize=_SMALL)


def _panel(page: '_Page', number: int, title: str, x: str, y: str) -> Axes:
    """One of several panels in a row, each 4.4 inches wide."""
    axes = page.axes(0.8 + 4.4 * number, 0.55, 3.4, 1.9)
    _style(axes)
    axes.set_title(title, color=_LIGHT, fontsize=_TEXT + 1, loc='left')
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return axes


def neighbours(
    samples: np.ndarray,
    nearest: np.ndarray,
    captions: Sequence[str],
    ids: Sequence[str],
    spacing: Sequence[float] | None = None,
) -> Figure:
    """One row a sample: it, the real ROI that is most like it, and their difference.

    Each is shown as three slices through the sample's centre of mass. Differences have one colour scale for all rows.

    Args:
        samples: [n,D,H,W] in [-1,1], background -1.
        nearest: [n,D,H,W] in [-1,1].
        captions: [n] what to write over each sample.
        ids: [n] what to write over each real ROI.
        spacing: mm a voxel along depth, height and width, for proportions and a scale bar; None if not known.

    Raises:
        ValueError: the arguments are not equally many.
    """
    table = _Table.of(samples, ('synthetic', 'nearest real ROI', 'synthetic - real'), spacing, below=1.1)
    differences = samples.astype(np.float32) - nearest
    limit = max(float(np.abs(differences).max()), 1e-3)
    rows = zip(samples, nearest, differences, captions, ids, strict=True)
    for row, (sample, real, difference, caption, name) in enumerate(rows):
        centre = middle(sample)
        panels = table.row(row, (caption, name))
        table.cell.draw(panels[0], sample, centre)
        table.cell.draw(panels[1], real, centre)
        shades = table.cell.draw(panels[2], difference, centre, cmap=_DIFFERENCES, vmin=-limit, vmax=limit)
    table.colour_bar(2, shades, 'difference')
    return table.page.figure


def roc(lines: Mapping[str, Sequence[Sequence[float]]]) -> Figure:
    """ROC curves, and the areas under them.

    Args:
        lines: by name, the share of negatives and that of positives told as positive, for falling thresholds.
    """
    page = _Page(5.2, 4.6)
    axes = page.axes(0.8, 0.4, 4.0, 3.5)
    _style(axes)
    axes.plot((0, 1), (0, 1), color=_FAINT, linewidth=0.8, linestyle=':')
    for (name, (wrong, right)), colour in zip(lines.items(), itertools.cycle(_LINES), strict=False):
        area = np.trapezoid(right, wrong)
        axes.plot(wrong, right, color=colour, linewidth=1.5, clip_on=False, label=f'{name}: area {area:.3f}')
    axes.set_xlabel('false positive rate')
    axes.set_ylabel('true positive rate')
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.legend(frameon=False, fontsize=_SMALL, labelcolor=_LIGHT, loc='lower right')
    return page.figure


def confusion(counts: Mapping[str, np.ndarray], classes: Sequence[str]) -> Figure:
    """Confusion matrices, a panel each.

    Args:
        counts: by name, int [classes, classes]: true class by row, predicted one by column.
        classes: names.
    """
    side = 0.7 * len(classes) + 0.6
    page = _Page((side + 1.3) * len(counts) + 0.3, side + 1.1)
    for number, (name, matrix) in enumerate(counts.items()):
        axes = page.axes(1.0 + (side + 1.3) * number, 0.5, side, side)
        axes.set_title(name, color=_LIGHT, fontsize=_TEXT, loc='left')
        shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
        axes.imshow(shares, cmap='cividis', vmin=0, vmax=1)
        for row, column in np.ndindex(matrix.shape):
            ink = _DARK if shares[row, column] > 0.6 else _LIGHT
            axes.text(column, row, str(matrix[row, column]), ha='center', va='center', color=ink, fontsize=_TEXT)
        axes.set_xticks(range(len(classes)), classes)
        axes.set_yticks(range(len(classes)), classes)
        axes.tick_params(colors=_LIGHT, labelsize=_SMALL, length=0)
        axes.set_xlabel('predicted', color=_LIGHT, fontsize=_SMALL)
        axes.set_ylabel('true', color=_LIGHT, fontsize=_SMALL)
    return page.figure


def curves(rows: Sequence[Mapping[str, Any]], names: Sequence[str] | None = None) -> Figure:
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
        line_of, column = divmod(number, columns)
        axes = page.axes(0.8 + 3.6 * column, 0.4 + 2.5 * line_of, 2.7, 1.6)
        _style(axes)
        axes.set_title(name.replace('_', ' '), color=_LIGHT, fontsize=_TEXT + 1, loc='left')
        axes.set_xlabel('step')
        for (label, points), colour in zip(lines.items(), itertools.cycle(_LINES), strict=False):
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, color=colour, linewidth=1.3, marker='.' if len(steps) < 30 else '', label=label)
        if len(lines) > 1 or 'train' not in lines:
            axes.legend(frameon=False, fontsize=_SMALL, labelcolor=_LIGHT)
    return page.figure


def plan(
    title: str,
    names: Sequence[str],
    memory: Mapping[str, Sequence[float]],
    capacity: float,
    seconds: Mapping[str, Sequence[float]],
) -> Figure:
    """What programs need of a chip: a bar each, of memory by kind, and of the least time that each part takes.

    Args:
        title: over all.
        names: of the programs.
        memory: by kind, GiB for each program; kinds are put end to end.
        capacity: GiB that there are.
        seconds: by part, for each program; parts are put below one another. Empty: no such panel.
    """
    height = 0.45 * len(names)
    page = _Page(12.6 if seconds else 7.4, height + 1.9)
    page.text(_MARGIN, 0.35, title, _TITLE)
    places = np.arange(len(names))

    def panel(left: float, label: str) -> Axes:
        axes = page.axes(left, 0.95, 4.4, height)
        _style(axes)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_yticks(places, names)
        axes.set_xlabel(label)
        return axes

    axes, ends = panel(2.4, 'GiB of memory'), np.zeros(len(names))
    for (kind, sizes), colour in zip(memory.items(), _LINES, strict=False):
        if any(sizes):
            axes.barh(places, sizes, 0.65, ends, color=colour, label=kind)
        ends += sizes
    for place, end in enumerate(ends):
        axes.text(end, place, f' {end:.3g}', color=_LIGHT, fontsize=_SMALL, va='center')
    axes.set_xlim(0, 1.12 * max(ends))
    if capacity < 2 * max(ends):
        axes.axvline(capacity, color=_LIGHT, linewidth=1, linestyle='--', label=f'there are {capacity:.0f}')
        axes.set_xlim(0, 1.12 * max(*ends, capacity))
    panels = [axes]
    if seconds:
        axes = panel(7.8, 'least seconds a call, if nothing else were done')
        axes.set_yticklabels([])
        for number, ((part, times), colour) in enumerate(zip(seconds.items(), _LINES, strict=False)):
            width = 0.8 / len(seconds)
            axes.barh(places + (number - (len(seconds) - 1) / 2) * width, times, 0.9 * width, color=colour, label=part)
        panels.append(axes)
    for axes in panels:
        axes.legend(
            frameon=False,
            fontsize=_SMALL,
            labelcolor=_LIGHT,
            ncols=5,
            loc='lower left',
            bbox_to_anchor=(0, 1),
            borderpad=0,
        )
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
        if bar.solids is not None:
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
        axes.plot((x, x + length * self.per_mm), (y, y), color=_LIGHT, linewidth=2, solid_capstyle='butt')
        axes.text(x, y - 0.05, f'{length} mm', color=_LIGHT, fontsize=_SMALL)


@dataclasses.dataclass(frozen=True)
class _Table:
    """A page with a row a ROI and a column a kind of picture."""

    page: _Page
    cell: _Cell
    lefts: tuple[float, ...]  # inches, of the columns

    @classmethod
    def of(cls, volumes: np.ndarray, columns: Sequence[str], spacing: Sequence[float] | None, below: float) -> '_Table':
        """A table for volumes [n,D,H,W] with its column titles, and `below` inches under the rows."""
        cell = _Cell.of(volumes.shape[1:], spacing, panel=1.2)
        number = len(columns)
        width = number * cell.width + (number - 1) * _GAP + 2 * _MARGIN
        page = _Page(width, cls._top(cell, len(volumes)) + below)
        lefts = tuple(_MARGIN + column * (cell.width + _GAP) for column in range(number))
        for x, name in zip(lefts, columns, strict=True):
            page.text(x, 0.42, name, _TITLE)
        page.text(_MARGIN, page.height - 0.3, _VIEW, _SMALL, _FAINT)
        return cls(page, cell, lefts)

    @staticmethod
    def _top(cell: _Cell, row: int) -> float:
        return 0.75 + row * (cell.height + _CAPTION + _GAP)

    def row(self, row: int, captions: Sequence[str]) -> list[Axes]:
        """The panels of a row, the first columns with captions, and a scale bar in the very first."""
        y = self._top(self.cell, row)
        for x, caption in zip(self.lefts, captions, strict=False):
            self.page.text(x, y + 0.16, caption, _TEXT)
        panels = [self.page.cell(x, y + _CAPTION, self.cell) for x in self.lefts]
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


@dataclasses.dataclass(frozen=True)
class _Strips:
    """A page with, for each ROI, strips of axial slices of its latent grid."""

    page: _Page
    shown: tuple[int, ...]  # slices
    depth: int  # slices there are
    width: float  # inches a slice
    height: float
    bottom: float  # inches, where the last ROI ends

    @classmethod
    def of(cls, shape: Sequence[int]) -> '_Strips':
        """A page for grids `shape` [n,d,h,w] with the numbers of the slices, and room for a legend."""
        number, depth, *sides = shape
        shown = np.unique(np.linspace(0, depth - 1, min(depth, _SLICES)).round().astype(int))
        width, height = (_SLICE * side / max(sides) for side in sides)  # the grid's height runs across
        bottom = cls._top(number, height)
        page = _Page(max(_MARGIN + _NAME + len(shown) * (width + 0.04) + _MARGIN, 8.0), bottom + 1.45)
        strips = cls(page, tuple(shown.tolist()), depth, width, height, bottom)
        page.text(_MARGIN, 0.3, 'slice', _TEXT, _FAINT)
        for column, place in enumerate(strips.shown):
            page.text(strips._left(column), 0.3, str(place), _TEXT, _FAINT)
        return strips

    @staticmethod
    def _top(row: int, height: float) -> float:
        return 0.4 + row * (2 * height + 2 * _CAPTION + _GAP)

    def _left(self, column: int) -> float:
        return _MARGIN + _NAME + column * (self.width + 0.04)

    def caption(self, row: int, title: str, text: str) -> float:
        """Writes over a row; returns where it begins, in inches."""
        top = self._top(row, self.height)
        self.page.text(_MARGIN, top + 0.14, title, _TEXT)
        self.page.text(_MARGIN + _NAME, top + 0.32, text, _SMALL, _FAINT)
        return top + 0.4

    def draw(self, top: float, name: str, grid: np.ndarray, style: Mapping[str, Any]) -> AxesImage:
        """Draws the slices of one grid [d,h,w]."""
        self.page.text(_MARGIN, top + self.height / 2 + 0.05, name, _TEXT)
        for column, place in enumerate(self.shown):
            axes = self.page.axes(self._left(column), top, self.width, self.height)
            axes.set_axis_off()
            image = axes.imshow(grid[place].T, aspect='auto', interpolation='nearest', **style)
        return image

    def legend(self, entries: Sequence[tuple[str, str]]) -> None:
        """What the colours mean, and which slices there are."""
        handles = [Patch(facecolor=colour, label=meaning) for colour, meaning in entries]
        axes = self.page.axes(_MARGIN + 2.3, self.bottom, self.page.width - 2 * _MARGIN - 2.3, 1.2)
        axes.set_axis_off()
        axes.legend(handles=handles, loc='upper left', frameon=False, fontsize=_TEXT, labelcolor=_LIGHT, borderpad=0)
        view = "the patient's right is on the left, rows of tokens run from top (front) to bottom (back)"
        note = f'axial slices of the tokens, {len(self.shown)} of {self.depth}; {view}'
        self.page.text(_MARGIN, self.page.height - 0.15, note, _SMALL, _FAINT)


def _without_haze(volume: np.ndarray) -> np.ndarray:
    """A decoded volume with its background at -1, where it is only nearly so."""
    return np.where(volume > _HAZE, volume, -1)


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
