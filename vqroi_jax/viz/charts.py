"""Charts of numbers: distributions, ROC curves, confusion matrices, training curves, plans."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from vqroi_jax.viz.page import COLOURS, FAINT, LIGHT, MARGIN, SMALL, TEXT, TITLE, Page, style


def distributions(
    real: Mapping[str, Sequence[float]],
    made: Mapping[str, Sequence[float]],
    distances: Mapping[str, float],
    quantity: str,
    reference: str = 'real ROI',
) -> Figure:
    """How a quantity is distributed, real beside synthetic: a panel a class.

    Args:
        real: for each class its values of patients, at least one.
        made: the same of samples, at least one; the same classes.
        distances: Kolmogorov-Smirnov's, of each class's real values and samples.
        quantity: its name and unit, such as 'tumour volume [mL]'.
        reference: what `real` are of.
    """
    page = Page(4.4 * len(real) + 0.4, 3.2)
    everything = np.concatenate([*real.values(), *made.values()])
    low, high = min(0.0, float(everything.min())), float(everything.max())
    edges = np.linspace(low, high if high > low else low + 1, 25).tolist()
    for number, (label, values) in enumerate(real.items()):
        axes = _panel(page, number, label, quantity, '% of the class')
        for name, part, colour in ((f'{reference}s', values, COLOURS[1]), ('synthetic', made[label], COLOURS[0])):
            weights = np.full(len(part), 100 / len(part))
            median = np.format_float_positional(float(np.median(part)), precision=3, fractional=False, trim='-')
            text = f'{name}: {len(part)}, median {median}'
            axes.hist(part, edges, weights=weights, color=colour, alpha=0.3)
            axes.hist(part, edges, weights=weights, color=colour, histtype='step', linewidth=1.5, label=text)
        axes.set_xlim(edges[0], edges[-1])
        _legend_above(axes, f'KS distance of all these {distances[label]:.2f}')
    return page.figure


def intensities(real: Mapping[str, np.ndarray], made: Mapping[str, np.ndarray], reference: str = 'real ROI') -> Figure:
    """How bright tumours are, real beside synthetic: a panel a class.

    Args:
        real: for each class the share of its tumours' voxels in equal bins of [-1, 1], each ROI counting the same.
        made: the same of samples; the same classes.
        reference: what `real` are of.
    """
    page = Page(4.4 * len(real) + 0.4, 3.2)
    for number, (label, shares) in enumerate(real.items()):
        axes = _panel(page, number, label, "intensity, -1 to the ROI's range's end at 1", '% of the tumour')
        for name, part, colour in ((f'{reference}s', shares, COLOURS[1]), ('synthetic', made[label], COLOURS[0])):
            edges = np.linspace(-1, 1, len(part) + 1)
            axes.stairs(100 * part, edges, color=colour, alpha=0.3, fill=True)
            axes.stairs(100 * part, edges, color=colour, linewidth=1.5, label=name)
        axes.set_xlim(-1, 1)
        _legend_above(axes)
    return page.figure


def roc(lines: Mapping[str, Sequence[Sequence[float]]]) -> Figure:
    """ROC curves, and the areas under them.

    Args:
        lines: by name, the share of negatives and that of positives told as positive, for falling thresholds.
    """
    page = Page(5.2, 4.6)
    axes = page.axes(0.8, 0.4, 4.0, 3.5)
    style(axes)
    axes.plot((0, 1), (0, 1), color=FAINT, linewidth=0.8, linestyle=':')
    for (name, (wrong, right)), colour in zip(lines.items(), itertools.cycle(COLOURS), strict=False):
        area = np.trapezoid(right, wrong)
        axes.plot(wrong, right, color=colour, linewidth=1.5, clip_on=False, label=f'{name}: area {area:.3f}')
    axes.set_xlabel('false positive rate')
    axes.set_ylabel('true positive rate')
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.legend(frameon=False, fontsize=SMALL, labelcolor=LIGHT, loc='lower right')
    return page.figure


def confusion(counts: Mapping[str, np.ndarray], classes: Sequence[str]) -> Figure:
    """Confusion matrices, a panel each.

    Args:
        counts: by name, int [classes, classes]: true class by row, predicted one by column.
        classes: names.
    """
    side = 0.7 * len(classes) + 0.6
    page = Page((side + 1.3) * len(counts) + 0.3, side + 1.1)
    for number, (name, matrix) in enumerate(counts.items()):
        axes = page.axes(1.0 + (side + 1.3) * number, 0.5, side, side)
        axes.set_title(name, color=LIGHT, fontsize=TEXT, loc='left')
        shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
        image = axes.imshow(shares, cmap='cividis', vmin=0, vmax=1)
        for row, column in np.ndindex(matrix.shape):
            ink = _ink(image.to_rgba(shares[row, column])[:3])
            axes.text(column, row, str(matrix[row, column]), ha='center', va='center', color=ink, fontsize=TEXT)
        axes.set_xticks(range(len(classes)), classes)
        axes.set_yticks(range(len(classes)), classes)
        axes.tick_params(colors=LIGHT, labelsize=SMALL, length=0)
        axes.set_xlabel('predicted', color=LIGHT, fontsize=SMALL)
        axes.set_ylabel('true', color=LIGHT, fontsize=SMALL)
    return page.figure


def curves(rows: Sequence[Mapping[str, Any]], names: Sequence[str] | None = None) -> Figure:
    """Metrics over training steps, one panel a metric; `val/l1` shares the panel of `l1`.

    A series, such as the validation of a class, has one colour in all panels.

    Args:
        rows: the rows of a run's `metrics.jsonl`: `step` and numbers, None where one was not finite.
        names: the metrics (panels) to show, such as 'l1'; None for all.
    """
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        for key, value in row.items():
            if key != 'step' and value is not None:
                split, name, rest = _metric(key)
                if names is None or name in names:
                    line = panels.setdefault(name, {}).setdefault(' '.join((split, *rest)), [])
                    line.append((row['step'], value))
    series = dict.fromkeys(label for lines in panels.values() for label in lines)
    colours = dict(zip(series, itertools.cycle(COLOURS), strict=False))
    columns = min(4, max(1, len(panels)))
    page = Page(3.6 * columns + 0.4, 2.5 * max(1, -(-len(panels) // columns)) + 0.2)
    for number, (name, lines) in enumerate(panels.items()):
        line_of, column = divmod(number, columns)
        axes = page.axes(0.8 + 3.6 * column, 0.4 + 2.5 * line_of, 2.7, 1.6)
        style(axes)
        axes.set_title(name.replace('_', ' '), color=LIGHT, fontsize=TEXT + 1, loc='left')
        axes.set_xlabel('step')
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True, min_n_ticks=1))
        for label, points in lines.items():
            steps, values = zip(*points, strict=True)
            marker = '.' if len(steps) < 30 else ''
            axes.plot(steps, values, color=colours[label], linewidth=1.3, marker=marker, label=label)
        if len(lines) > 1 or 'train' not in lines:
            axes.legend(frameon=False, fontsize=SMALL, labelcolor=LIGHT)
    return page.figure


def plan(
    title: str,
    names: Sequence[str],
    memory: Mapping[str, Sequence[float]],
    capacity: float,
    unit: str,
    seconds: Mapping[str, Sequence[float]],
) -> Figure:
    """What programs need of a chip: a bar each, of memory by kind, and of the least time that each part takes.

    Args:
        title: over all.
        names: of the programs.
        memory: by kind, for each program; kinds are put end to end.
        capacity: how much memory there is.
        unit: of memory and capacity, such as 'GiB'.
        seconds: by part, for each program; parts are put below one another. Empty: no such panel.
    """
    height = 0.45 * len(names)
    page = Page(12.6 if seconds else 7.4, height + 1.6)
    page.text(MARGIN, 0.35, title, TITLE)
    places = np.arange(len(names))

    def panel(left: float, label: str) -> Axes:
        axes = page.axes(left, 0.95, 4.4, height)
        style(axes)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_yticks(places, names)
        axes.set_xlabel(label)
        return axes

    axes, ends = panel(2.4, f'{unit} of memory'), np.zeros(len(names))
    for (kind, sizes), colour in zip(memory.items(), COLOURS, strict=False):
        if any(sizes):
            axes.barh(places, sizes, 0.65, ends, color=colour, label=kind)
        ends += sizes
    for place, end in enumerate(ends):
        axes.text(end, place, f' {end:.3g}', color=LIGHT, fontsize=SMALL, va='center')
    axes.set_xlim(0, 1.12 * max(ends))
    if capacity < 10 * max(ends):  # further away it would squeeze the bars
        axes.axvline(capacity, color=LIGHT, linewidth=1, linestyle='--', label=f'there are {capacity:.0f}')
        axes.set_xlim(0, 1.12 * max(*ends, capacity))
    panels = [axes]
    if seconds:
        axes = panel(7.8, 'least seconds a call, if nothing else were done')
        axes.set_yticklabels([])
        for number, ((part, times), colour) in enumerate(zip(seconds.items(), COLOURS, strict=False)):
            width = 0.8 / len(seconds)
            axes.barh(places + (number - (len(seconds) - 1) / 2) * width, times, 0.9 * width, color=colour, label=part)
        panels.append(axes)
    for axes in panels:
        axes.legend(
            frameon=False,
            fontsize=SMALL,
            labelcolor=LIGHT,
            ncols=5,
            loc='lower left',
            bbox_to_anchor=(0, 1),
            borderpad=0,
        )
    return page.figure


def _legend_above(axes: Axes, title: str | None = None) -> None:
    """A legend in the upper right corner, with room made for it over what is drawn, and no ticks there."""
    end = axes.get_ylim()[1]
    axes.set_ylim(0, 1.5 * end)
    axes.set_yticks([tick for tick in axes.get_yticks() if 0 <= tick <= end])
    legend = axes.legend(frameon=False, fontsize=SMALL, labelcolor=LIGHT, title=title, loc='upper right')
    legend.get_title().set(color=LIGHT, fontsize=SMALL)


def _ink(ground: ArrayLike) -> str:
    """White or black, whichever has more contrast (WCAG 2.2, at least 4.5 to 1) on a colour of RGB in [0, 1]."""
    return max(('white', 'black'), key=lambda ink: _contrast(to_rgb(ink), ground))


def _contrast(one: ArrayLike, other: ArrayLike) -> float:
    """The contrast ratio of two colours, 1 to 21, as WCAG 2.2 defines it.

    Args:
        one: sRGB, each part in [0, 1].
        other: likewise.
    """
    lights = []
    for colour in (one, other):
        parts = np.asarray(colour, np.float64)
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        lights.append(float(linear @ (0.2126, 0.7152, 0.0722)))
    return (max(lights) + 0.05) / (min(lights) + 0.05)


def _panel(page: Page, number: int, title: str, x: str, y: str) -> Axes:
    """One of several panels in a row, each 4.4 inches wide."""
    axes = page.axes(0.8 + 4.4 * number, 0.55, 3.4, 1.9)
    style(axes)
    axes.set_title(title, color=LIGHT, fontsize=TEXT + 1, loc='left')
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return axes


def _metric(key: str) -> tuple[str, str, list[str]]:
    """Split, metric and the rest of a name such as 'val/psnr/HGG'; all of a name without split is a training metric."""
    first, *rest = key.split('/')
    if first not in ('train', 'val', 'test') or not rest:
        return 'train', key, []
    return first, rest[0], rest[1:]
