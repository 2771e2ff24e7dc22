"""The page that an evaluation leaves: one HTML file with everything in it, for somebody who does not read JSON."""

import base64
import io
import math
from collections.abc import Mapping

import jinja2
from matplotlib.figure import Figure

_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader('vqroi_jax', '.'), autoescape=True, undefined=jinja2.StrictUndefined
)
TEMPLATE = 'report.html.jinja'

_BETTER = {'floor': 'as near the floor as can be', 'lower': 'lower is better', 'higher': 'higher is better'}
_MEANINGS = {  # by the beginning of a metric's name: what it says, for a reader who is new to it
    'MS-SSIM': (
        'Diversity: how alike the ROIs of one set are. Far above the floor, the model repeats itself; far below, its '
        'ROIs are noisy.'
    ),
    'MMD': 'How far the distributions of voxels are apart.',
    'FD-VGG': (
        'Fréchet distance between slices, as a network trained on natural photographs sees them, plane by plane. It is '
        'not FID, which is defined for another network.'
    ),
    'KID-VGG': 'Kernel distance between the same slices; unlike the Fréchet distance it is not biased in small sets.',
    'FD-3D': 'Fréchet distance between volumes, as a classifier of these tumours sees them.',
    'precision': 'Share of synthetic ROIs that lie among real ones.',
    'recall': 'Share of real ROIs that lie among synthetic ones.',
    'density': 'How densely real ROIs lie around synthetic ones; around 1 for equal sets.',
    'coverage': 'Share of real ROIs that have a synthetic one near them.',
    'class agreement': (
        'How often a classifier trained on real ROIs tells a synthetic one as the class it was made for. The floor is '
        'how often it is right on real ROIs that it has not seen.'
    ),
    'tumour volume': 'Kolmogorov-Smirnov distance between the distributions (0: the same, 1: apart).',
    'surface': 'The same of surface to volume: high for ragged or small tumours.',
    'mean intensity': "The same of the tumours' mean intensity.",
    'nearest': (
        'Privacy: how near the most similar ROI is that a model may have learnt from. Samples nearer than held-out '
        'patients ever are may be copies.'
    ),
}


def number(value: float | None) -> str:
    """A figure with three digits that matter; None, which JSON has for what is not finite, as a dash."""
    if value is None:
        return '–'
    if not 1e-4 <= abs(value) < 1e6:
        return f'{value:.2e}' if value else '0'
    return f'{value:.{max(2 - math.floor(math.log10(abs(value))), 0)}f}'


def render(found: Mapping, pictures: Mapping[str, Figure]) -> str:
    """The page.

    Args:
        found: as `vqroi_jax.evaluate.describe` gives it.
        pictures: by name; those whose name is a section of the page are in it.

    Returns:
        HTML that needs no other file.
    """
    labels = list(dict.fromkeys(figure['label'] for figure in found['figures']))
    rows: dict[str, dict] = {}
    for figure in found['figures']:
        row = rows.setdefault(
            figure['metric'],
            {
                'metric': figure['metric'],
                'better': _BETTER[figure['better']],
                'meaning': next(text for start, text in _MEANINGS.items() if figure['metric'].startswith(start)),
                'cells': {},
            },
        )
        row['cells'][figure['label']] = figure
    return _ENVIRONMENT.get_template(TEMPLATE).render(
        found=found,
        labels=labels,
        rows=list(rows.values()),
        number=number,
        settings=_flat(found['config']),
        pictures={name: _inline(picture) for name, picture in pictures.items()},
    )


def _inline(picture: Figure) -> str:
    """A figure as the address of an image that holds it."""
    file = io.BytesIO()
    picture.savefig(file, format='png')
    return f'data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}'


def _flat(settings: Mapping, prefix: str = '') -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in settings.items():
        flat |= _flat(value, f'{prefix}{name}.') if isinstance(value, Mapping) else {prefix + name: value}
    return flat
