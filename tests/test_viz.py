"""Figures: orientation, contents, layout that keeps text apart, and atomic writing."""

from pathlib import Path

import matplotlib.image
import nibabel
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from vqroi_jax import viz
from vqroi_jax.masking import Role
from vqroi_jax.viz.charts import _contrast
from vqroi_jax.viz.rois import _to_voxels

REAL = Path(__file__).parents[2] / 'shared/real_cohort/LGG/TCGA-DU-7294/TCGA-DU-7294_flair.nii.gz'


def rois(n, shape=(8, 10, 12), seed=0):
    """Random tumours of bright voxels off the middle of the box."""
    volumes = np.full((n, *shape), -1.0, np.float32)
    volumes[:, 1:5, 2:7, 3:10] = np.random.default_rng(seed).uniform(-0.5, 1, (n, 4, 5, 7))
    return volumes


def images(figure):
    return [image for axes in figure.axes for image in axes.get_images()]


def overlapping_texts(figure):
    """Pairs of texts whose boxes overlap, and texts that leave the figure."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    texts = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
    boxes = [(text.get_text(), text.get_window_extent(canvas.get_renderer())) for text in texts]
    page = figure.bbox
    bad = [name for name, box in boxes if box.x0 < page.x0 or box.x1 > page.x1 or box.y0 < page.y0 or box.y1 > page.y1]
    pairs = [(a, b) for i, (a, one) in enumerate(boxes) for b, two in boxes[:i] if one.overlaps(two)]
    return bad + pairs


# --------------------------------------------------------------------------------------------- orientation


def test_slices_show_the_front_and_the_top_up():
    volume = np.zeros((6, 7, 8))  # depth: up, height: to the left, width: to the back
    volume[5, 0, 0] = 1  # top, patient's right, front
    axial, coronal, sagittal = viz.slices(volume, (5, 0, 0))
    for part, shape in zip((axial, coronal, sagittal), ((8, 7), (6, 7), (6, 8)), strict=True):
        assert part.shape == shape
        assert part[0, 0] == 1  # first row and column: upper left of a picture


def test_real_brain_is_upright():
    """In a real head the brain reaches lower at the back (cerebellum), and is widest behind the middle."""
    if not REAL.exists():
        pytest.skip(f'{REAL} is not there')
    brain = (np.asarray(nibabel.load(REAL).dataobj) > 20).transpose(2, 0, 1)
    _, height, width = np.nonzero(brain)
    axial, coronal, sagittal = viz.slices(brain, (75, int(np.median(height)) + 10, int(np.median(width))))
    rows = np.flatnonzero(sagittal.any(1))
    front, back = np.array_split(np.flatnonzero(sagittal.any(0)), 2)
    lowest = [np.flatnonzero(sagittal[:, side].any(1)).max() for side in (front, back)]
    assert lowest[1] > lowest[0] + 10  # rows count downwards: the cerebellum is on the right, below
    assert np.ptp(rows) > 100
    spans = [np.ptp(np.flatnonzero(row)) if row.any() else 0 for row in axial]
    inside = np.flatnonzero(spans)
    assert np.argmax(spans) > inside.mean()  # widest below the picture's middle, so the front is up
    middle = np.flatnonzero(coronal.any(0)).mean()
    top, bottom = np.flatnonzero(coronal[:, round(middle) - 12 : round(middle) + 12].any(1))[[0, -1]]
    whole = np.flatnonzero(coronal.any(1))
    assert top - whole[0] < 15  # the vertex is at the top ...
    assert whole[-1] - bottom < 60


def test_middle_is_the_centre_of_mass_of_the_tumour():
    assert viz.middle(rois(1)[0]) == (2, 4, 6)
    volume = np.full((5, 6, 7), -1.0)
    assert viz.middle(volume) in ((2, 2, 3), (2, 3, 3))
    volume[4, 5, 0] = 0.3
    assert viz.middle(volume) == (4, 5, 0)


# ------------------------------------------------------------------------------------------------ contents


def test_contact_sheet_shows_every_roi_under_its_class():
    volumes = rois(5)
    figure = viz.contact_sheet(volumes, ['HGG', 'LGG', 'HGG', 'HGG', 'LGG'], [f'id{i}' for i in range(5)])
    titles = [text.get_text() for text in figure.texts]
    assert [t for t in titles if t in ('HGG', 'LGG') or t.startswith('id')] == [
        'HGG',
        'id0',
        'id2',
        'id3',
        'LGG',
        'id1',
        'id4',
    ]
    shown = images(figure)
    assert len(shown) == 15
    for order, index in enumerate((0, 2, 3, 1, 4)):
        expected = viz.slices(volumes[index], (2, 4, 6))
        for image, part in zip(shown[3 * order : 3 * order + 3], expected, strict=True):
            np.testing.assert_array_equal(image.get_array(), part)
            assert image.get_clim() == (-1, 1)
            assert image.get_cmap().name == 'gray'


def test_pictures_have_the_proportions_of_the_voxels():
    figure = viz.contact_sheet(rois(1), ['a'], ['b'], spacing=(5.0, 1.0, 2.0))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    sizes = [image.get_window_extent().bounds[2:] for image in images(figure)]
    for (width, height), (across, down) in zip(sizes, ((10, 24), (10, 40), (24, 40)), strict=True):  # mm
        assert width / height == pytest.approx(across / down, rel=0.02)


def test_scale_bar_has_its_length():
    figure = viz.contact_sheet(rois(1, (20, 20, 20)), ['a'], ['b'], spacing=(4.0, 4.0, 4.0))
    (axes,) = figure.axes
    (bar,) = axes.get_lines()
    (label,) = (text.get_text() for text in axes.texts)
    image = axes.get_images()[0]
    mm_per_inch = 80 / (image.get_extent()[1] - image.get_extent()[0])
    assert np.ptp(bar.get_xdata()) * mm_per_inch == pytest.approx(float(label.split()[0]))
    assert not viz.contact_sheet(rois(1), ['a'], ['b']).axes[0].get_lines()  # not without known voxels


def test_reconstructions_show_original_reconstruction_difference_and_importance():
    originals, recons = rois(2), rois(2, seed=1)
    scores = np.random.default_rng(2).uniform(0.2, 0.8, (2, 4, 5, 6)).astype(np.float32)
    figure = viz.reconstructions(originals, recons, scores, ['LGG', 'HGG'], ['a', 'b'])
    shown = images(figure)
    assert len(shown) == 2 * (4 * 3 + 3) + 1  # what the scale of the overlay's colours lies over
    for row in range(2):
        first, *others = np.array_split(np.arange(15 * row, 15 * row + 15), 5)
        for number, expected in zip((first, *others[:2]), (originals, recons, recons - originals), strict=True):
            for index, part in zip(number, viz.slices(expected[row], (2, 4, 6)), strict=True):
                np.testing.assert_allclose(shown[index].get_array(), part)
        limit = np.abs(recons - originals).max()
        assert shown[others[1][0]].get_clim() == (-limit, limit)
        overlay = shown[others[3][0]]
        assert overlay.get_alpha() < 1
        assert overlay.get_clim() == (scores.min(), scores.max())
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    glow = next(axes for axes in figure.axes if 'importance score' in axes.get_xlabel())
    x, y = (int(side) for side in glow.transAxes.transform((0.9, 0.98)))
    plasma = np.array(matplotlib.colormaps['plasma'](0.9)[:3])
    over_white = np.asarray(canvas.buffer_rgba())[::-1][y, x, :3] / 255
    np.testing.assert_allclose(over_white, 0.45 * plasma + 0.55, atol=0.04)
    texts = ' '.join(text.get_text() for text in figure.findobj(Text))
    assert all(
        word in texts for word in ('original', 'reconstruction', 'difference', 'importance score', 'LGG  a', 'HGG  b')
    )
    psnr = 10 * np.log10(4 / np.mean((recons[1] - originals[1]) ** 2))
    assert f'{psnr:.1f} dB' in texts


def test_importance_is_interpolated_to_the_voxels():
    """A score is exact at the middle of its region, and linear between: here 4 voxels a region along depth."""
    scores = np.array([0.1, 0.5, 0.7], np.float32).reshape(3, 1, 1)
    voxels = _to_voxels(scores, (12, 4, 4))
    assert voxels.shape == (12, 4, 4)
    expected = np.interp(np.arange(12), [1.5, 5.5, 9.5], [0.1, 0.5, 0.7])
    np.testing.assert_allclose(voxels, np.broadcast_to(expected[:, None, None], (12, 4, 4)), atol=1e-6)


def test_flat_inputs_are_drawn():
    flat = np.full((1, 8, 8, 8), -1, np.float32)
    figure = viz.reconstructions(flat, flat, np.full((1, 2, 2, 2), 0.5), ['LGG'], ['a'])
    FigureCanvasAgg(figure).draw()


def latent(n, shape, seed=0):
    """Scores and roles of a grid of tokens; every role occurs."""
    rng = np.random.default_rng(seed)
    roles = rng.integers(0, len(Role), (n, *shape))
    roles.reshape(-1)[: len(Role)] = list(Role)
    return rng.uniform(0.2, 0.9, (n, *shape)).astype(np.float32), roles


def test_masking_shows_importance_and_roles_slice_by_slice():
    scores, roles = latent(2, (3, 4, 5))
    figure = viz.masking(scores, roles, ['LGG', 'HGG'], ['a', 'b'])
    shown = images(figure)[:12]  # the colour bar's comes last
    for row in range(2):
        heat, parts = shown[6 * row : 6 * row + 3], shown[6 * row + 3 : 6 * row + 6]
        for place in range(3):
            np.testing.assert_array_equal(heat[place].get_array(), scores[row, place].T)
            np.testing.assert_array_equal(parts[place].get_array(), roles[row, place].T)
            assert heat[place].get_clim() == pytest.approx((scores.min(), scores.max()))
    colours = {role: tuple(parts[0].to_rgba(np.array([role]))[0]) for role in Role}
    assert len(set(colours.values())) == len(Role)
    legend = next(axes.get_legend() for axes in figure.axes if axes.get_legend())
    meanings = [text.get_text() for text in legend.get_texts()]
    order = (Role.START, Role.NEIGHBOUR, Role.FILL, Role.RANDOM, Role.KEPT)
    for role, meaning, patch in zip(order, meanings, legend.get_patches(), strict=True):
        assert meaning.startswith(role.name.lower())
        assert patch.get_facecolor() == colours[role]
        assert ('[MASK]' in meaning) == (role in (Role.START, Role.NEIGHBOUR, Role.FILL))
    texts = [text.get_text() for text in figure.texts]
    assert 'HGG  b' in texts
    counts = ', '.join(f'{role.name.lower()} {np.sum(roles[1] == role)}' for role in order)
    assert f'of 60 tokens: {counts}' in texts


def test_masking_of_one_kind_explains_no_other():
    roles = np.array([[[[0, 1, 1, 0]], [[0, 0, 0, 1]]]])
    figure = viz.masking(np.full(roles.shape, 0.5), roles, ['LGG'], ['a'])
    legend = next(axes.get_legend() for axes in figure.axes if axes.get_legend())
    assert [text.get_text().split(':')[0] for text in legend.get_texts()] == ['start', 'kept']
    assert 'of 8 tokens: start 3, kept 5' in [text.get_text() for text in figure.texts]


def test_masking_shows_eight_slices_of_a_deep_grid_and_says_which():
    scores, roles = latent(1, (20, 2, 2))
    figure = viz.masking(scores, roles, ['LGG'], ['a'])
    expected = [0, 3, 5, 8, 11, 14, 16, 19]
    for image, place in zip(images(figure)[:8], expected, strict=True):
        np.testing.assert_array_equal(image.get_array(), scores[0, place].T)
    texts = [text.get_text() for text in figure.texts]
    assert [int(text) for text in texts if text.isdigit()] == expected
    assert any('8 of 20' in text for text in texts)


def test_cohort_counts_every_scan():
    volumes = {'LGG': [3.0, 5.0, 80.0], 'HGG': list(np.linspace(10, 200, 40)), 'none': []}
    figure = viz.cohort(rois(2), ['LGG', 'HGG'], ['a', 'b'], volumes)
    histogram = next(axes for axes in figure.axes if axes.get_xlabel() == 'tumour volume [mL]')
    labels = [text.get_text() for text in histogram.get_legend().get_texts()]
    assert labels == ['LGG: 3, median 5 mL', 'HGG: 40, median 105 mL', 'none: 0']
    assert histogram.get_ylabel() == 'scans'


def test_distributions_compare_real_with_synthetic_class_by_class():
    rng = np.random.default_rng(0)
    real = {'LGG': rng.gamma(4, 10, 40), 'HGG': rng.gamma(9, 10, 30), 'third': [1.0, 2.0]}
    made = {'LGG': rng.gamma(4, 12, 25), 'HGG': real['HGG'], 'third': [3.0, 4.0]}
    figure = viz.distributions(real, made, {'LGG': 0.125, 'HGG': 0.0, 'third': 1.0}, 'tumour volume [mL]')
    assert not overlapping_texts(figure)
    assert {axes.get_xlabel() for axes in figure.axes} == {'tumour volume [mL]'}
    assert [axes.get_title(loc='left') for axes in figure.axes] == list(real)
    edges = np.linspace(0, max(map(max, (*real.values(), *made.values()))), 25)
    for axes, label in zip(figure.axes, real, strict=True):
        texts = [text.get_text() for text in axes.get_legend().get_texts()]
        for text, name, part in zip(texts, ('real ROIs', 'synthetic'), (real[label], made[label]), strict=True):
            assert text == f'{name}: {len(part)}, median {np.median(part):.3g}'
        bars = np.array([bar.get_height() for bar in axes.patches if isinstance(bar, Rectangle)])
        expected = [np.histogram(part, edges)[0] * 100 / len(part) for part in (real[label], made[label])]
        np.testing.assert_allclose(bars, np.concatenate(expected))
    distances = [axes.get_legend().get_title().get_text() for axes in figure.axes]
    assert distances == [f'KS distance of all these {distance}' for distance in ('0.12', '0.00', '1.00')]


def test_shares_end_at_100_and_large_medians_are_plain():
    figure = viz.distributions({'a': [2143.0] * 3}, {'a': [1.0, 0.5, 999.9]}, {'a': 1.0}, 'tumour volume [mm³]')
    (axes,) = figure.axes
    assert axes.get_ylim()[1] > 100  # the legend's room
    assert axes.get_yticks().max() == 100
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert texts == ['real ROIs: 3, median 2140', 'synthetic: 3, median 1']


def test_intensities_are_steps_in_per_cent():
    shares = {'LGG': np.array([0.1, 0.2, 0.3, 0.4]), 'HGG': np.array([0, 0, 0.5, 0.5])}
    figure = viz.intensities(shares, {'LGG': shares['HGG'], 'HGG': shares['LGG']})
    assert [axes.get_title(loc='left') for axes in figure.axes] == ['LGG', 'HGG']
    for axes, label, other in zip(figure.axes, ('LGG', 'HGG'), ('HGG', 'LGG'), strict=True):
        drawn = [patch.get_data() for patch in axes.patches]
        for data, part in zip(drawn[1::2], (shares[label], shares[other]), strict=True):
            np.testing.assert_allclose(data.values, 100 * part)
            np.testing.assert_allclose(data.edges, [-1, -0.5, 0, 0.5, 1])
    assert not overlapping_texts(figure)


def test_neighbours_show_a_sample_its_nearest_and_their_difference():
    samples, nearest = rois(2), rois(2, seed=1)
    figure = viz.neighbours(samples, nearest, ['one', 'two'], ['P1', 'P2'], ['near', 'far'])
    pictures = [image.get_array() for image in images(figure)]
    for row, (sample, real) in enumerate(zip(samples, nearest, strict=True)):
        centre = viz.middle(sample)
        for column, volume in enumerate((sample, real, sample.astype(np.float32) - real)):
            for plane, part in enumerate(viz.slices(volume, centre)):
                np.testing.assert_allclose(pictures[9 * row + 3 * column + plane], part, atol=1e-6)
    texts = {text.get_text() for text in figure.texts}
    assert {'one', 'two', 'P1', 'P2', 'near', 'far', 'synthetic', 'nearest real ROI'} <= texts
    with pytest.raises(ValueError, match='zip'):
        viz.neighbours(samples, nearest, ['one'], ['P1', 'P2'], ['near', 'far'])


def test_curves_pair_training_with_validation():
    rows = [
        {'step': 1, 'l1': 0.5, 'loss': 2.0, 'perf/a': 1.0, 'perf/b': 2.0},
        {'step': 2, 'l1': 0.4, 'loss': None, 'val/l1': 0.6, 'val/l1/HGG': 0.7},
    ]
    figure = viz.curves(rows)
    l1, loss, *others = figure.axes
    titles = [axes.get_title(loc='left') for axes in (l1, loss, *others)]
    assert titles == ['l1', 'loss', 'perf/a', 'perf/b']  # different units are not mixed
    lines = {line.get_label(): line.get_xydata().tolist() for line in l1.get_lines()}
    assert lines == {'train': [[1, 0.5], [2, 0.4]], 'val': [[2, 0.6]], 'val HGG': [[2, 0.7]]}
    assert loss.get_lines()[0].get_xydata().tolist() == [[1, 2.0]]
    assert len(viz.curves(rows, ['l1']).axes) == 1
    for axes in figure.axes:
        assert all(tick == int(tick) for tick in axes.get_xticks())
    large = viz.curves([{'step': step, 'l1': 2.34 + step * 1e-9} for step in range(0, 1500001, 250000)])
    FigureCanvasAgg(large).draw()
    assert not any(axis.get_offset_text().get_text() for axis in (large.axes[0].xaxis, large.axes[0].yaxis))
    assert {'500000', '2.3405'} <= {text.get_text() for text in large.findobj(Text)}
    assert not viz.curves([]).axes


def test_a_series_has_one_colour_in_all_panels():
    rows = [{'step': 1, 'l1': 0.5, 'val/l1': 0.6, 'val/l1/HGG': 0.7, 'val/psnr/HGG': 20.0, 'val/psnr': 21.0}]
    first, second = (
        {line.get_label(): line.get_color() for line in axes.get_lines()} for axes in viz.curves(rows).axes
    )
    assert len(set(first.values())) == 3
    assert second == {name: first[name] for name in ('val', 'val HGG')}


def test_inputs_of_unequal_number_are_refused():
    with pytest.raises(ValueError, match='zip'):
        viz.contact_sheet(rois(2), ['a'], ['b', 'c'])
    with pytest.raises(ValueError, match='zip'):
        viz.reconstructions(rois(2), rois(2), np.ones((2, 2, 2, 2)), ['a'], ['b', 'c'])
    with pytest.raises(ValueError, match='zip'):
        viz.masking(*latent(2, (2, 2, 2)), ['a'], ['b', 'c'])


# -------------------------------------------------------------------------------------------------- layout


@pytest.mark.parametrize('n', [2, 20])
def test_texts_do_not_overlap(n):
    volumes, labels = rois(n, (16, 16, 16)), ['LGG', 'HGG'] * (n // 2)
    names = [f'phantom_HGG_{i:04d}' for i in range(n)]
    scores = np.random.default_rng(0).uniform(size=(n, 4, 4, 4))
    assert not overlapping_texts(viz.cohort(volumes, labels, names, {'LGG': [3.0], 'HGG': [20.0]}, (4.0, 4.0, 4.0)))
    assert not overlapping_texts(viz.reconstructions(volumes, -volumes, scores, labels, names, (4.0, 4.0, 4.0)))


@pytest.mark.parametrize('shape', [(8, 8, 8), (20, 2, 9), (20, 9, 2), (1, 2, 2)])
def test_texts_of_masking_do_not_overlap(shape):
    scores, roles = latent(4, shape)
    names = [f'phantom_HGG_{i:04d}' for i in range(4)]
    figure = viz.masking(scores, roles, ['LGG', 'HGG', 'LGG', 'HGG'], names)
    assert not overlapping_texts(figure)


def test_saving_is_whole_or_not_at_all(tmp_path):
    figure = viz.contact_sheet(rois(1), ['a'], ['b'])
    viz.save_figure(figure, tmp_path / 'new' / 'a.png')
    written = matplotlib.image.imread(tmp_path / 'new' / 'a.png')
    assert written.shape[:2] == tuple(int(side) for side in figure.bbox.bounds[:1:-1])
    assert written[0, 0, :3].max() < 0.2  # dark, as the figure

    class Broken(Figure):
        def savefig(self, file, **unused):
            file.write(b'half')
            raise OSError('disk full')

    before = (tmp_path / 'new' / 'a.png').read_bytes()
    with pytest.raises(OSError, match='disk full'):
        viz.save_figure(Broken(), tmp_path / 'new' / 'a.png')
    assert (tmp_path / 'new' / 'a.png').read_bytes() == before
    assert [path.name for path in (tmp_path / 'new').iterdir()] == ['a.png']


def test_roc_names_each_curve_with_its_area():
    figure = viz.roc({'good': [[0, 0, 1], [0, 1, 1]], 'chance': [[0, 0.5, 1], [0, 0.5, 1]]})
    texts = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert texts == ['good: area 1.000', 'chance: area 0.500']
    np.testing.assert_allclose(figure.axes[0].lines[1].get_xydata(), [[0, 0], [0, 1], [1, 1]])
    assert not overlapping_texts(figure)


def test_confusion_writes_every_count_where_it_belongs():
    counts = {'one arm': np.array([[20, 5], [1, 24]]), 'a second arm': np.array([[10, 15], [0, 25]])}
    figure = viz.confusion(counts, ('LGG', 'HGG'))
    assert not overlapping_texts(figure)
    for axes, (name, matrix) in zip(figure.axes, counts.items(), strict=True):
        assert axes.get_title(loc='left') == name
        found = {tuple(map(int, text.get_position()[::-1])): int(text.get_text()) for text in axes.texts}
        assert found == {place: matrix[place] for place in np.ndindex(2, 2)}
        np.testing.assert_allclose(axes.images[0].get_array(), matrix / matrix.sum(axis=1, keepdims=True))


def test_figures_of_a_confusion_matrix_can_be_read_on_any_ground():
    assert _contrast((0, 0, 0), (1, 1, 1)) == pytest.approx(21)
    assert _contrast(to_rgb('#777777'), (1, 1, 1)) == pytest.approx(4.48, abs=0.01)  # known of WCAG
    matrices = {str(n): np.array([[n, 20 - n], [0, 20]]) for n in range(21)}
    for axes in viz.confusion(matrices, ('LGG', 'HGG')).axes:
        (image,) = axes.images
        for text in axes.texts:
            column, row = text.get_position()
            ground = image.to_rgba(image.get_array())[row, column, :3]
            assert _contrast(to_rgb(text.get_color()), ground) >= 4.5


def ball(radius, side=24):
    """A ball of tumour, soft at its border, in a box of background."""
    places = np.stack(np.meshgrid(*[np.arange(side) - (side - 1) / 2] * 3, indexing='ij'))
    return np.clip(0.1 + radius - np.linalg.norm(places, axis=0), -1, 1).astype(np.float32)


def test_a_surface_is_closed_and_encloses_its_tumour():
    spacing, radius = (2.0, 1.0, 1.5), 8.0
    vertices, triangles = viz.triangulate(ball(radius), spacing, level=0.1)
    edges = np.sort(np.concatenate([triangles[:, [0, 1]], triangles[:, [1, 2]], triangles[:, [2, 0]]]), axis=1)
    assert (np.unique(edges, axis=0, return_counts=True)[1] == 2).all()
    a, b, c = vertices[triangles].transpose(1, 0, 2)
    # Positive if triangles turn counter-clockwise as seen from outside, (depth, height, width) being right-handed.
    enclosed = np.einsum('ni,ni->', a, np.cross(b, c)) / 6
    assert enclosed == pytest.approx(4 / 3 * np.pi * radius**3 * np.prod(spacing), rel=0.02)
    np.testing.assert_allclose(vertices.mean(axis=0), 11.5 * np.asarray(spacing), atol=0.1)


def test_a_surface_is_closed_at_the_border_and_empty_without_a_tumour():
    vertices, triangles = viz.triangulate(np.ones((3, 4, 5), np.float32))
    edges = np.sort(np.concatenate([triangles[:, [0, 1]], triangles[:, [1, 2]], triangles[:, [2, 0]]]), axis=1)
    assert (np.unique(edges, axis=0, return_counts=True)[1] == 2).all()
    assert vertices.min(axis=0) == pytest.approx([-0.95] * 3)
    nothing = np.full((3, 4, 5), -1, np.float32)
    for part in viz.triangulate(nothing):
        assert part.shape == (0, 3)
    assert len(viz.surfaces(nothing[None], ['LGG'], ['empty']).axes) == 1


def test_surfaces_are_drawn_class_by_class():
    volumes = np.stack([ball(radius, 12) for radius in (2, 3, 4)])
    figure = viz.surfaces(volumes, ['LGG', 'HGG', 'HGG'], ['a', 'b', 'c'], (1.0, 1.0, 2.0))
    assert len(figure.axes) == 3
    texts = [text.get_text() for text in figure.texts]
    assert [text for text in texts if text in ('LGG', 'HGG', 'a', 'b', 'c')] == ['LGG', 'a', 'HGG', 'b', 'c']
    FigureCanvasAgg(figure).draw()
    colours = {tuple(axes.collections[0].get_facecolor()[0].round(3)) for axes in figure.axes}
    assert len(colours) > 1
    with pytest.raises(ValueError, match='zip'):
        viz.surfaces(volumes, ['LGG'], ['a', 'b', 'c'])


def test_surfaces_are_whole_and_at_one_scale():
    """Tumours that fill their box, small ones in a corner, long ones along each axis and diagonal: none is cut off."""
    volumes = np.full((7, 16, 16, 16), -1.0, np.float32)
    volumes[0] = 1
    volumes[1, :3, :2, :2] = 1
    volumes[2, :, 7:9, 7:9] = volumes[3, 7:9, :, 7:9] = volumes[4, 7:9, 7:9, :] = 1
    steps = np.arange(16)
    volumes[5, steps, steps, steps] = volumes[6, steps, steps, 15 - steps] = 1
    names = [str(number) for number in range(len(volumes))]
    figure = viz.surfaces(volumes, ['a'] * 3 + ['b'] * 4, names, (2.0, 1.0, 1.0))
    FigureCanvasAgg(figure).draw()
    spans = []
    for axes in figure.axes:
        drawn = np.concatenate([path.vertices for path in axes.collections[0].get_paths()])  # as projected
        on_panel = axes.transAxes.inverted().transform(axes.transData.transform(drawn))
        assert (on_panel > 0).all()
        assert (on_panel < 1).all()
        spans.append(np.ptp([axes.get_xlim(), axes.get_ylim(), axes.get_zlim()], axis=1))
    assert np.ptp(on_panel, axis=0).max() > 0.3
    np.testing.assert_allclose(spans, spans[0][0])
