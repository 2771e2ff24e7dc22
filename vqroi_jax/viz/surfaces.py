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
_AXES = [1, 2, 0]  # of (depth, height, width), in NIfTI's order: to the left, to the back, up
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
    classes: dict[str, list[tuple[np.ndarray, str]]] = {}
    for volume, label, title in zip(volumes, labels, titles, strict=True):
        classes.setdefault(label, []).append((volume, title))
    steps = tuple(spacing or (1.0, 1.0, 1.0))
    drawn = {
        label: [(triangulate(volume, steps, level), title) for volume, title in members]
        for label, members in classes.items()
    }
    balls = {label: [_ball(vertices) for (vertices, _), _ in members] for label, members in drawn.items()}
    radius = max(radius for members in balls.values() for _, radius in members) or 1.0
    columns = min(_COLUMNS, max(map(len, classes.values())))
    lines = {label: -(-len(members) // columns) for label, members in classes.items()}
    height = sum(_HEAD + number * _PANEL for number in lines.values()) + 0.5
    page, top = Page(max(columns * _PANEL, 4.5) + 2 * MARGIN, height), 0.1
    for (label, members), colour in zip(drawn.items(), itertools.cycle(COLOURS), strict=False):
        page.text(MARGIN, top + 0.25, label, TITLE)
        for number, (((vertices, triangles), title), (centre, _)) in enumerate(zip(members, balls[label], strict=True)):
            row, column = divmod(number, columns)
            left, upper = MARGIN + column * _PANEL, top + _HEAD + row * _PANEL
            page.text(left, upper + 0.16, title, TEXT, FAINT)
            axes = page.axes(left, upper + 0.2, _PANEL - 0.1, _PANEL - 0.25, projection='3d')
            assert isinstance(axes, Axes3D)
            _draw(axes, vertices, triangles, centre, radius, colour)
        top += _HEAD + lines[label] * _PANEL
    page.text(MARGIN, top + 0.25, _VIEW, SMALL, FAINT)
    return page.figure


def _ball(vertices: np.ndarray) -> tuple[np.ndarray, float]:
    """A ball [mm] around a surface: the middle of its extent, float [3], and how far its vertices are from there."""
    if not len(vertices):
        return np.zeros(3), 0.0
    centre = (vertices.min(axis=0) + vertices.max(axis=0)) / 2
    return centre, float(np.linalg.norm(vertices - centre, axis=1).max())


def _draw(
    axes: Axes3D, vertices: np.ndarray, triangles: np.ndarray, centre: np.ndarray, radius: float, colour: str
) -> None:
    """A surface in the middle of a panel that shows a ball of this radius [mm] as a whole."""
    if len(triangles):
        corners = vertices[triangles][..., _AXES]
        surface = Poly3DCollection(corners, facecolors=colour, linewidths=0, shade=True, lightsource=_LAMP)
        axes.add_collection3d(surface)
    for limit, middle in zip((axes.set_xlim, axes.set_ylim, axes.set_zlim), centre[_AXES], strict=True):
        limit(middle - radius, middle + radius)
    axes.set_box_aspect((1, 1, 1), zoom=_ZOOM)
    axes.set_axis_off()
    axes.view_init(elev=20, azim=-70)
