"""What all figures are drawn on: a dark page that is laid out in inches, its colours and sizes of text."""

import io
import os
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import FuncFormatter, MaxNLocator

from vqroi_jax.workdir import write_atomically

DARK, LIGHT, FAINT = '#161616', '#e8e8e8', '#a0a0a0'  # behind images; text; lesser text
COLOURS = ('#e69f00', '#56b4e9', '#009e73', '#cc79a7', '#f0e442', '#d55e00', '#0072b2')  # Okabe and Ito's
_DPI = 110
MARGIN, GAP, CAPTION = 0.3, 0.15, 0.24  # inches
SMALL, TEXT, TITLE = 7.5, 9.0, 12.0  # points


class Page:
    """A dark figure that is laid out in inches from its upper left corner, so that text keeps its size."""

    def __init__(self, width: float, height: float):
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width, height), dpi=_DPI, facecolor=DARK)

    def axes(self, left: float, top: float, width: float, height: float, **kind: Any) -> Axes:
        """Axes of a size at a place; `kind` goes to matplotlib's `add_axes`."""
        bottom = self.height - top - height
        place = left / self.width, bottom / self.height, width / self.width, height / self.height
        return self.figure.add_axes(place, facecolor=DARK, **kind)

    def panel(self, left: float, top: float, width: float, height: float) -> Axes:
        """Axes to put pictures on, measured in inches from their upper left corner."""
        axes = self.axes(left, top, width, height)
        axes.set_axis_off()
        axes.set_xlim(0, width)
        axes.set_ylim(height, 0)
        return axes

    def text(self, left: float, baseline: float, text: str, size: float, colour: str = LIGHT) -> None:
        """Writes a line."""
        self.figure.text(left / self.width, 1 - baseline / self.height, text, fontsize=size, color=colour)

    def colour_bar(self, left: float, top: float, width: float, image: AxesImage, name: str) -> None:
        """Draws the scale of an image's colours; of one that lies over others, as seen from white down to black."""
        height = 0.12 if image.get_alpha() is None else 0.2
        axes = self.axes(left, top + 0.12 - height, width, height)
        bar = self.figure.colorbar(image, cax=axes, orientation='horizontal')
        bar.set_label(name, color=LIGHT, fontsize=TEXT)
        bar.outline.set_visible(False)
        axes.tick_params(colors=LIGHT, labelsize=TEXT)
        if image.get_alpha() is not None:
            extent = *axes.get_xlim(), *axes.get_ylim()
            axes.imshow(((1,), (0,)), 'gray', aspect='auto', interpolation='bilinear', extent=extent, zorder=0)


def style(axes: Axes) -> None:
    """Makes axes of a chart as all charts are."""
    axes.tick_params(colors=LIGHT, labelsize=TEXT)
    axes.xaxis.label.set(color=LIGHT, fontsize=TEXT)
    axes.yaxis.label.set(color=LIGHT, fontsize=TEXT)
    axes.grid(color='#3a3a3a', linewidth=0.5)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:.7g}'))  # whole, none of it beside the axis
    for side, spine in axes.spines.items():
        spine.set_visible(side in ('left', 'bottom'))
        spine.set_color(FAINT)


def save_figure(figure: Figure, path: str | os.PathLike) -> None:
    """Writes a figure as PNG; the file is there as a whole or not at all. Its folder is made if need be."""
    file = io.BytesIO()
    figure.savefig(file, format='png')
    write_atomically(Path(path), file.getvalue())
