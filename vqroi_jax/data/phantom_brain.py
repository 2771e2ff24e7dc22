"""Draws the healthy brain of a phantom patient; `phantom` puts a tumour into it.

The anatomy is a handful of distances (to the surface, the sulci, the ventricles, ...) that are computed on one
coarse grid in millimetres and evaluated between its points as cubic splines, at voxels of any size: so a seed
gives the same brain at any spacing, and a full head takes a fraction of a second.

Positions are in mm from the first voxel's centre at 1 mm spacing, along NIfTI axes 0 (towards the left), 1
(towards the back) and 2 (up), as in BraTS. Shapes are rough averages, drawn to look right in FLAIR.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
from scipy import ndimage, sparse

HEAD = (240, 240, 155)  # mm: the size of a BraTS volume
CENTRE = np.array([118.0, 131.0, 76.0], np.float32)  # mm: middle of the brain in the head
CSF, WHITE, GREY = 0.2, 1.0, 1.2  # FLAIR signal, relative to white matter

_SPLINE_SD = np.float32(0.332)  # of a cubic B-spline in 3D whose knots are white noise of sd 1
_STEP = 3.5  # mm between points of the coarse grid
_REACH = ((38, 200), (32, 234), (-6, 162))  # mm: what the coarse grid covers
_SLAB = 8  # planes that are worked on at a time, to stay in the processor's cache


@dataclasses.dataclass(frozen=True)
class SmoothField:
    """A smooth function of space: a cubic B-spline with `knots` float32 [a,b,c], `step` mm apart from `origin`."""

    knots: np.ndarray
    origin: Sequence[float] | np.ndarray
    step: float

    def at(self, axes: Sequence[np.ndarray]) -> np.ndarray:
        """Values float32 [len(x),len(y),len(z)] on the grid of positions (mm) along three axes."""
        x, y, z = (_spline((a - o) / self.step) for a, o in zip(axes, self.origin, strict=True))
        values = self.knots[x.reach, y.reach, z.reach]
        values = z.apply(values.transpose(2, 1, 0)).transpose(1, 2, 0)  # [y knots, x knots, z]
        values = y.apply(values).transpose(1, 0, 2)  # [x knots, y, z]
        return x.apply(values)


@dataclasses.dataclass(frozen=True)
class _Spline:
    """Cubic B-spline weights of some places between knots: a sparse matrix, and which knots it takes."""

    weights: sparse.csr_array
    reach: slice

    def apply(self, knots: np.ndarray) -> np.ndarray:
        """Values float32 [places,...] for knots [knots,...]."""
        flat = self.weights @ knots.reshape(len(knots), -1)
        return flat.reshape(-1, *knots.shape[1:])


def _spline(places: np.ndarray) -> _Spline:
    """Weights for increasing `places`, counted in knots; a sparse product needs no threads of BLAS."""
    first = np.floor(places).astype(int) - 1
    distance = np.abs(places[:, None] - first[:, None] - np.arange(4)).astype(np.float32)
    near, far = 2 / 3 - distance**2 * (1 - distance / 2), np.maximum(2 - distance, 0) ** 3 / 6
    knots = first[:, None] - first[0] + np.arange(4)
    shape = (len(places), int(knots[-1, -1]) + 1)
    weights = np.where(distance < 1, near, far)
    starts = np.arange(0, weights.size + 1, 4)
    return _Spline(
        sparse.csr_array((weights.ravel(), knots.ravel(), starts), shape=shape),
        slice(first[0], first[0] + shape[1]),
    )


def noise(rng: np.random.Generator, step: float) -> SmoothField:
    """A random field over the head of zero mean, unit variance and a grain of about `step` mm."""
    knots = rng.standard_normal([math.ceil(side / step) + 4 for side in HEAD], np.float32)
    return SmoothField(knots / _SPLINE_SD, [-2 * step] * 3, step)


def ramp(distance: np.ndarray, width: float) -> np.ndarray:
    """0 to 1 over `width` mm around distance 0: an edge that fills its voxels in part."""
    return np.clip(distance * (1 / width) + 0.5, 0, 1)


def _ellipsoid(p: np.ndarray, centre: Sequence[float], radii: Sequence[float]) -> np.ndarray:
    """Signed distance (mm, about; negative inside) of points `p` [3,...] to an ellipsoid."""
    offsets = [x - c for x, c in zip(p, centre, strict=True)]
    length = np.sqrt(sum((x / r) ** 2 for x, r in zip(offsets, radii, strict=True))) + 1e-3
    slope = np.sqrt(sum((x / r**2) ** 2 for x, r in zip(offsets, radii, strict=True))) + 1e-6
    return length * (length - 1) / slope


def _tube(p: np.ndarray, path: Sequence[Sequence[float]]) -> np.ndarray:
    """Signed distance (mm) of points `p` [3,...] to a chain of cones; `path` lists x, y, z and radius."""
    result = np.full(p.shape[1:], np.inf, np.float32)
    for (*start, first), (*end, last) in itertools.pairwise(path):
        line = [e - s for s, e in zip(start, end, strict=True)]
        offsets = [x - s for x, s in zip(p, start, strict=True)]
        share = sum(x * d for x, d in zip(offsets, line, strict=True)) / sum(d * d for d in line)
        share = np.clip(share, 0, 1)
        distance = np.sqrt(sum((x - share * d) ** 2 for x, d in zip(offsets, line, strict=True)))
        np.minimum(result, distance - (first + (last - first) * share), out=result)
    return result


def _union(*distances: np.ndarray, softness: float) -> np.ndarray:
    """Signed distance to shapes that melt into each other over `softness` mm."""
    lowest = np.minimum.reduce(distances)
    return lowest - softness * np.log(sum(np.exp((lowest - d) / softness) for d in distances))


def _parts(p: np.ndarray) -> dict[str, np.ndarray]:
    """Signed distances (mm, negative inside) of points `p` [3,...] around the brain's middle to its parts."""
    m = np.stack([np.abs(p[0]), p[1], p[2]])  # both halves are alike
    cerebrum = _union(
        _ellipsoid(m, (26, -2, 20), (35, 68, 41)),
        _ellipsoid(m, (25, 34, 12), (37, 45, 36)),
        _ellipsoid(m, (16, -46, 2), (23, 33, 27)),
        _ellipsoid(m, (8, 4, -8), (22, 24, 18)),
        softness=3.0,
    )
    temporal = _union(
        _ellipsoid(m, (43, -8, -23), (19, 37, 20)), _ellipsoid(m, (42, 24, -15), (20, 34, 19)), softness=3.0
    )
    cerebellum = _ellipsoid(m, (20, 40, -41), (32, 31, 24))
    stem = _tube(p, [(0, 8, -12, 14), (0, 11, -36, 14), (0, 20, -56, 11)])
    return {'cerebrum': cerebrum, 'temporal': temporal, 'cerebellum': cerebellum, 'stem': stem}


def _ventricles(p: np.ndarray, wide: float) -> np.ndarray:
    """Signed distance (mm) to the ventricles, `wide` times as wide as average."""
    m = np.stack([np.abs(p[0]), p[1], p[2]])
    body = [(7, -30, 7, 3.0), (8, -16, 15, 4.0), (11, 10, 19, 3.5), (20, 30, 10, 5.5), (25, 46, 4, 2.0)]
    horn = [(20, 30, 10, 4.0), (31, 16, -12, 2.0), (33, 0, -20, 2.0)]
    return np.minimum.reduce(
        [
            _tube(m, [(*point, radius * wide) for *point, radius in body]),
            _tube(m, [(*point, radius * wide) for *point, radius in horn]),
            np.maximum(m[0] - 1.7 * wide, _ellipsoid(m, (0, 2, -2), (20, 15, 11))),
            _ellipsoid(m, (0, 31, -38), (7, 4, 8)),
        ]
    )


def _sulci(p: np.ndarray, rng: np.random.Generator, grain: float) -> np.ndarray:
    """Distance (mm, about, signed) to the nearest sulcus: zeros of noise that is drawn out along the radius."""
    offset = np.stack([np.abs(p[0]) - 20, p[1], p[2]])
    shell = offset * (0.25 + 0.75 * 50 / (np.sqrt((offset**2).sum(0)) + 1))
    knots = rng.standard_normal((40, 40, 40), np.float32)
    places = shell / grain + 20 + 4.4 * np.sign(p[0])  # the two halves differ
    waves = ndimage.map_coordinates(knots, places, order=2, prefilter=False)
    slope = np.sqrt(sum(g**2 for g in np.gradient(waves, _STEP)))
    return waves / np.maximum(slope, 0.3 * slope.mean())


def _interior(moved: np.ndarray, wide: float, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Distances (mm) that make the anatomy under the brain's surface.

    Args:
        moved: points [3,a,b,c] around the brain's middle, before the tumour pushed them to where they are.
        wide: how wide the ventricles are, 1 for average.
        rng: draws what differs between brains.

    Returns:
        Arrays [a,b,c]. `bridge` (no sulci there), `ventricles` and `nuclei` are negative inside; `midline`,
        `sylvian`, `tentorium` (negative in the cerebellum), `sulcus` and `dimple` (a shallow sulcus) are zero on
        a sheet of CSF; `texture` is noise and `folia` the phase (mm) of the cerebellum's leaves.
    """
    inner = _parts(moved)
    m = np.stack([np.abs(moved[0]), moved[1], moved[2]])
    sway = 1.5 * rng.standard_normal()
    nuclei = [((11, 10, 1), (8, 14, 8)), ((26, -6, -1), (6, 18, 11)), ((13, -20, 8), (5, 10, 9))]
    bridge = [((0, -2, 8), (30, 42, 15)), ((0, 8, -16), (30, 26, 24))]
    return {
        'midline': moved[0] + sway * np.sin(moved[1] / 30),
        'bridge': np.minimum.reduce([inner['stem'], *[_ellipsoid(m, *shape) for shape in bridge]]),
        'sylvian': inner['temporal'] - inner['cerebrum'],
        'tentorium': inner['cerebellum'] - np.minimum(inner['cerebrum'], inner['temporal']),
        'sulcus': _sulci(moved, rng, 8.0),
        'dimple': _sulci(moved, rng, 6.0),
        'texture': rng.standard_normal(moved.shape[1:], np.float32) / _SPLINE_SD,
        'ventricles': _ventricles(moved, wide),
        'nuclei': np.minimum.reduce([_ellipsoid(m, *shape) for shape in nuclei]),
        'folia': np.sqrt((moved[1] - 26) ** 2 + 2.2 * (moved[2] + 34) ** 2),
    }


@dataclasses.dataclass(frozen=True)
class Brain:
    """One brain, drawn but not yet sampled at voxels."""

    fields: dict[str, SmoothField]  # `surface` (mm, negative inside) and those of `_interior`
    centre: np.ndarray  # [3] mm: where its tumour sits
    open_sulci: float  # mm, half the width of a sulcus at the surface
    bias: SmoothField
    low: np.ndarray  # [3] mm: corners of a box around the brain
    high: np.ndarray

    def sample(self, axes: Sequence[np.ndarray], *names: str) -> dict[str, np.ndarray]:
        """The named fields (default: all) on the grid of positions (mm) along three axes."""
        return {name: self.fields[name].at(axes) for name in names or self.fields}


def draw_brain(rng: np.random.Generator, radius: float, push: float) -> Brain:
    """Draws a brain with room for a tumour of `radius` mm that pushes the tissue around it aside by `push` mm."""
    knots = [np.arange(low, high, _STEP, dtype=np.float32) for low, high in _REACH]
    origin = np.array([k[0] for k in knots])
    scale = np.clip(rng.normal(1.0, 0.03, 3), 0.92, 1.08).astype(np.float32)
    centred = [(k - c) / s for k, c, s in zip(knots, CENTRE, scale, strict=True)]
    p = np.stack(np.meshgrid(*centred, indexing='ij'))

    parts, wide = _parts(p), rng.uniform(0.8, 1.5)
    room = np.minimum(-np.minimum(parts['cerebrum'], parts['temporal']), np.abs(p[0]))
    np.minimum(room, _ventricles(p, wide) + 0.4 * radius, out=room)
    room[(parts['cerebellum'] < 8) | (parts['stem'] < 8)] = 0
    fitting = np.argwhere(room > min(0.75 * radius, 0.9 * room.max()))
    centre = p[:, *fitting[rng.integers(len(fitting))]]

    offset = p - centre.reshape(3, 1, 1, 1)
    length = np.sqrt((offset**2).sum(0)) + 1e-3
    pushed = push / length * np.exp(-((length / (2.2 * radius)) ** 2))
    moved = p - offset * np.minimum(pushed, 0.95)  # 0.95: all of the middle was next to the centre before
    surface = _union(*parts.values(), softness=1.5) + noise(rng, 9.0).at(knots)
    fields = {'surface': surface, **_interior(moved, wide, rng)}
    held = np.argwhere(surface < 2)
    return Brain(
        fields={name: SmoothField(d.astype(np.float32), origin, _STEP) for name, d in fields.items()},
        centre=centre * scale + CENTRE,
        open_sulci=rng.uniform(0.9, 1.6),
        bias=noise(rng, 70.0),
        low=origin + _STEP * held.min(0),
        high=origin + _STEP * held.max(0),
    )


def _tissue(brain: Brain, axes: Sequence[np.ndarray], spacing: float) -> tuple[np.ndarray, ...]:
    """Signal, distance to CSF (mm) and brain mask at one slab of voxels; see `healthy`."""
    at = brain.sample(axes)
    depth, soft = -at['surface'], edge_width(spacing)
    below = at['tentorium'] < 0
    gap = np.minimum(np.abs(at['sulcus']) + np.maximum(depth - 17, 0), np.abs(at['dimple']) + np.maximum(depth - 8, 0))
    np.minimum(gap, 0.7 * np.abs(at['sylvian']) + np.maximum(depth - 25, 0), out=gap)
    gap[below] = 9
    np.minimum(gap, 0.7 * np.abs(at['tentorium']), out=gap)
    np.minimum(gap, np.abs(at['midline']), out=gap)
    np.maximum(gap, 2 - at['bridge'], out=gap)
    gap -= brain.open_sulci * (1 - 0.045 * np.clip(depth, 0, 16))

    grey = ramp(3.0 - np.minimum(gap, depth + 0.5), soft + 0.5)
    np.maximum(grey, 0.8 * ramp(-at['nuclei'], soft + 2), out=grey)
    leaves = 0.4 + 0.3 * max(0, 1 - spacing / 3) * np.cos(at['folia'] * (2 * np.pi / 4.4) + at['texture'])
    grey[below] = leaves[below]
    signal = WHITE + (GREY - WHITE) * grey
    signal *= 1 + 0.02 * at['texture']
    signal += 0.15 * np.exp(-np.maximum(at['ventricles'], 0) / 2)  # bright caps around the ventricles
    csf = np.maximum(ramp(-gap, soft), ramp(-at['ventricles'], soft))
    signal += (CSF - signal) * csf
    inside = (depth > 0) & ((csf < 0.5) | (depth > 2.5))  # stripping the skull takes the outer CSF with it
    return signal, np.minimum(np.minimum(gap, depth), at['ventricles']), inside


def edge_width(spacing: float) -> float:
    """Width (mm) over which the edge between two tissues is smeared by voxels of `spacing` mm."""
    return max(1.5, 0.8 * spacing)


def slabs(length: int) -> Iterator[slice]:
    """Slices that cut `length` planes into slabs small enough for the processor's cache."""
    return (slice(start, start + _SLAB) for start in range(0, length, _SLAB))


def healthy(brain: Brain, axes: Sequence[np.ndarray], spacing: float) -> tuple[np.ndarray, ...]:
    """FLAIR signal of the brain without its tumour, at voxels of `spacing` mm.

    Args:
        brain: what `draw_brain` drew.
        axes: positions (mm) of the voxels along three axes.
        spacing: mm a voxel.

    Returns:
        Three arrays [i,j,k]: signal relative to white matter (float32), distance to the nearest CSF (float32,
        mm, negative in CSF) and what is left by skull stripping (bool).
    """
    shape = [len(positions) for positions in axes]
    signal, clear, inside = np.empty(shape, np.float32), np.empty(shape, np.float32), np.empty(shape, bool)
    for slab in slabs(shape[0]):
        signal[slab], clear[slab], inside[slab] = _tissue(brain, [axes[0][slab], *axes[1:]], spacing)
    return signal, clear, inside
