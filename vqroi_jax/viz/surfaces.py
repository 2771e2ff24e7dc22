"""The surfaces of tumours in 3D: as triangles, and as pictures of them.

The surface is where the tumour ends and the background begins, by marching cubes (Lewiner et al. 2003, scikit-image).
"""

import itertools
from collections.abc import Sequence

import numpy as np
from matplotlib.colors import LightSource
from matplotlib.figure import Figure
from mpl_toolkits.mplot3d import Axes3D
from mpl_toolkits.mplot3d.art3d import Poly3DCollection
from skimage.measure import marching_cubes

from vqroi_jax.viz.page import COLOURS, FAINT, MARGIN, SMALL, TEXT, TITLE, Page

LEVEL = -0.9  # intensity between background, -1, and the darkest tumour

_LAMP = LightSource(azdeg=225, altdeg=40)
_COLUMNS, _PANEL, _HEAD = 6, 1.7, 0.4  # panels side by side at most; inches of a panel, and of a class's name
_ZOOM = 1.6  # at which a ball that touches the six sides of the box just fits a panel
_VIEW = "all at one scale, seen from the front, a little from above and from the patient's left"


def triangulate(
    volume: np.ndarray, spacing: Sequence[float] = (1.0, 1.0, 1.0), level: float = LEVEL
) -> tuple[np.ndarray, np.ndarray]:
    """The closed surface of a tumour.

    Args:
        volume: [D,H,W] in [-1, 1], background -1.
        spacing: mm a voxel along depth, height and width.
        level: intensity at the surface, above -1.

    Returns:
        Vertices float32 [n,3], mm along depth, height and width from the middle of the first voxel, and triangles
        int32 [m,3] of their numbers, counter-clockwise from outside. Both empty if nothing is above the level.
    """
    padded = np.pad(np.asarray(volume, np.float32), 1, constant_values=-1.0)  # closes what touches the border
    if not (padded > level).any():
        return np.zeros((0, 3), np.float32), np.zeros((0, 3), np.int32)
    vertices, triangles, _, _ = marching_cubes(
        padded, level, spacing=tuple(map(float, spacing)), gradient_direction='ascent'
    )
    return (vertices - np.asarray(spacing)).astype(np.float32), triangles.astype(np.int32)


def surfaces(
    volumes: np.ndarray,
    labels: Sequence[str],
    titles: Sequence[str],
    spacing: Sequence[float] | None = None,
    level: float = LEVEL,
) -> Figure:
    """The surfaces of ROIs, class by class, each class in a colour of its own.

    Args:
        volumes: [n,D,H,W] in [-1,1], background -1.
        labels: [n] class names; classes are shown in the order of their first ROI.
        titles: [n] what to write over each.
        spacing: mm a voxel along depth, height and width; None if not known (then cubes).
        level: intensity at the surface.

    Raises:
        ValueError: labels or titles are not as many as volumes.
    """
    classes: dict[str, list[tuple[np.ndarray, np.ndarray, str]]] = {}
    for volume, label, title in zip(volumes, labels, titles, strict=True):
        vertices, triangles = triangulate(volume, spacing or (1.0, 1.0, 1.0), level)
        classes.setdefault(label, []).append((_centred(vertices), triangles, title))
    reaches = [
        np.linalg.norm(vertices, axis=1).max(initial=0) for members in classes.values() for vertices, *_ in members
    ]
    radius = float(max(reaches)) or 1.0  # of a ball that every one of them lies in, in the middle of its panel
    columns = min(_COLUMNS, max(map(len, classes.values())))
    lines = {label: -(-len(members) // columns) for label, members in classes.items()}
    height = sum(_HEAD + number * _PANEL for number in lines.values()) + 0.5
    page, top = Page(max(columns * _PANEL, 4.5) + 2 * MARGIN, height), 0.1
    for (label, members), colour in zip(classes.items(), itertools.cycle(COLOURS), strict=False):
        page.text(MARGIN, top + 0.25, label, TITLE)
        for number, (vertices, triangles, title) in enumerate(members):
            row, column = divmod(number, columns)
            left, upper = MARGIN + column * _PANEL, top + _HEAD + row * _PANEL
            page.text(left, upper + 0.16, title, TEXT, FAINT)
            axes = page.axes(left, upper + 0.2, _PANEL - 0.1, _PANEL - 0.25, projection='3d')
            assert isinstance(axes, Axes3D)
            _draw(axes, vertices, triangles, radius, colour)
        top += _HEAD + lines[label] * _PANEL
    page.text(MARGIN, top + 0.25, _VIEW, SMALL, FAINT)
    return page.figure


def _centred(vertices: np.ndarray) -> np.ndarray:
    """Moves the middle of a surface's extent to 0."""
    return vertices - (vertices.min(axis=0) + vertices.max(axis=0)) / 2 if len(vertices) else vertices


def _draw(axes: Axes3D, vertices: np.ndarray, triangles: np.ndarray, radius: float, colour: str) -> None:
    """A surface around 0, in a panel that shows a ball of this radius [mm] as a whole."""
    if len(triangles):
        corners = vertices[triangles][..., [1, 2, 0]]  # NIfTI's order: to the left, to the back, up
        surface = Poly3DCollection(
            corners,
            facecolors=colour,
            linewidths=0,
            antialiaseds=False,  # else the back is seen through the seams between triangles
            shade=True,
            lightsource=_LAMP,
        )
        axes.add_collection3d(surface)
    axes.set(xlim=(-radius, radius), ylim=(-radius, radius), zlim=(-radius, radius))
    axes.set_box_aspect((1, 1, 1), zoom=_ZOOM)
    axes.set_axis_off()
    axes.view_init(elev=20, azim=-70)
