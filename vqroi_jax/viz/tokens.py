"""Pictures of grids of tokens: what the masking of stage 2 does to them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Patch

from vqroi_jax.masking import Role
from vqroi_jax.viz.page import CAPTION, COLOURS, FAINT, GAP, LIGHT, MARGIN, SMALL, TEXT, Page

_SLICES = 8  # of a grid of tokens, at most
_SLICE, _NAME = 0.85, 0.95  # inches: the longer side of a slice of tokens; what a strip is called
_ROLES = {  # of a token: colour and meaning
    Role.START: (COLOURS[0], 'start: drawn to become [MASK]'),
    Role.NEIGHBOUR: (COLOURS[4], 'neighbour: beside a start, becomes [MASK]'),
    Role.FILL: (COLOURS[3], 'fill: next in importance, becomes [MASK]'),
    Role.RANDOM: (COLOURS[1], 'random: becomes a random code'),
    Role.KEPT: ('#3a3a3a', 'kept: stays as it is'),
}


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
    strips.page.colour_bar(MARGIN, strips.bottom + 0.1, 1.9, glow, 'importance score')
    strips.legend([meaning for role, meaning in _ROLES.items() if role in roles])
    return strips.page.figure


@dataclasses.dataclass(frozen=True)
class _Strips:
    """A page with, for each ROI, strips of axial slices of its latent grid."""

    page: Page
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
        page = Page(max(MARGIN + _NAME + len(shown) * (width + 0.04) + MARGIN, 8.0), bottom + 1.45)
        strips = cls(page, tuple(shown.tolist()), depth, width, height, bottom)
        page.text(MARGIN, 0.3, 'slice', TEXT, FAINT)
        for column, place in enumerate(strips.shown):
            page.text(strips._left(column), 0.3, str(place), TEXT, FAINT)
        return strips

    @staticmethod
    def _top(row: int, height: float) -> float:
        return 0.4 + row * (2 * height + 2 * CAPTION + GAP)

    def _left(self, column: int) -> float:
        return MARGIN + _NAME + column * (self.width + 0.04)

    def caption(self, row: int, title: str, text: str) -> float:
        """Writes over a row; returns where it begins, in inches."""
        top = self._top(row, self.height)
        self.page.text(MARGIN, top + 0.14, title, TEXT)
        self.page.text(MARGIN + _NAME, top + 0.32, text, SMALL, FAINT)
        return top + 0.4

    def draw(self, top: float, name: str, grid: np.ndarray, style: Mapping[str, Any]) -> AxesImage:
        """Draws the slices of one grid [d,h,w]."""
        self.page.text(MARGIN, top + self.height / 2 + 0.05, name, TEXT)
        for column, place in enumerate(self.shown):
            axes = self.page.axes(self._left(column), top, self.width, self.height)
            axes.set_axis_off()
            image = axes.imshow(grid[place].T, aspect='auto', interpolation='nearest', **style)
        return image

    def legend(self, entries: Sequence[tuple[str, str]]) -> None:
        """What the colours mean, and which slices there are."""
        handles = [Patch(facecolor=colour, label=meaning) for colour, meaning in entries]
        axes = self.page.axes(MARGIN + 2.3, self.bottom, self.page.width - 2 * MARGIN - 2.3, 1.2)
        axes.set_axis_off()
        axes.legend(handles=handles, loc='upper left', frameon=False, fontsize=TEXT, labelcolor=LIGHT, borderpad=0)
        view = "the patient's right is on the left, rows of tokens run from top (front) to bottom (back)"
        note = f'axial slices of the tokens, {len(self.shown)} of {self.depth}; {view}'
        self.page.text(MARGIN, self.page.height - 0.15, note, SMALL, FAINT)
