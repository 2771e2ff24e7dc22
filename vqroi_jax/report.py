"""The pages that commands leave: each an HTML file with everything in it, for somebody who does not read JSON.

`render` makes that of an evaluation, `render_experiment` that of a classifier experiment.
"""

import base64
import io
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from vqroi_jax.templates import render_page
from vqroi_jax.viewer import Viewer

TEMPLATE = 'report.html.jinja'
EXPERIMENT_TEMPLATE = 'experiment.html.jinja'
FIGURES = {'auc': 'AUC', 'f1': 'F1', 'accuracy': 'accuracy', 'precision': 'precision', 'recall': 'recall'}

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
    'FID': (
        'Fréchet Inception distance, by the network and weights that define it, between slices: axial (A), coronal (C) '
        'or sagittal (S). It falls with the number of slices, so only figures of as many compare.'
    ),
    'KID-Inception': 'Kernel Inception distance between the same slices; it is not biased in small sets.',
    'FD-3D': 'Fréchet distance between volumes, as a classifier of these tumours sees them.',
    'precision': 'Share of synthetic ROIs that lie among real ones.',
    'recall': 'Share of real ROIs that lie among synthetic ones.',
    'density': 'How densely real ROIs lie around synthetic ones; around 1 for equal sets.',
    'coverage': 'Share of real ROIs that have a synthetic one near them.',
    'class agreement': (
        'How often a classifier trained on real ROIs tells a synthetic one as the class it was made for. The floor is '
        'how often it is right on real ROIs that it has not seen.'
    ),
    'tumour volume': (
        'Kolmogorov-Smirnov distance between the distributions of n ROIs each (0: the same, 1: apart); the histograms '
        'below and the distances on them are of all.'
    ),
    'surface': 'The same of surface to volume: high for ragged or small tumours.',
    'mean intensity': "The same of the tumours' mean intensity.",
    'reconstruction': (
        'How near reconstructions are to the ROIs that they were made from. Here the floor is no aim: it is what '
        'another real ROI of the class would get in their place.'
    ),
    'nearest': (
        'Privacy: how near the most similar ROI is that a model may have learnt from, as it is or mirrored along any '
        'axes. Samples nearer than other patients ever are may be copies.'
    ),
}


def render(found: Mapping, pictures: Mapping[str, Figure], viewer: Viewer) -> str:
    """The page.

    Args:
        found: what `vqroi_jax.evaluate` writes into `metrics.json`.
        pictures: by name; those whose name is a section of the page are in it.
        viewer: of ROIs of both sets.

    Returns:
        HTML that needs no other file.
    """
    labels = list(dict.fromkeys(figure['label'] for figure in found['figures']))
    rows: dict[str, dict] = {}

    def row_of(metric: str) -> dict:
        meaning = next(text for start, text in _MEANINGS.items() if metric.startswith(start))
        return rows.setdefault(
            metric, {'metric': metric, 'better': '', 'meaning': meaning, 'cells': {}, 'published': []}
        )

    for figure in found['figures']:
        row = row_of(figure['metric'])
        row['better'] = _BETTER[figure['better']]
        row['cells'][figure['label']] = figure
    for figure in found['published']['figures'] if found['published'] else ():
        row_of(figure['metric'])['published'].append(figure)
    return render_page(
        TEMPLATE,
        found=found,
        labels=labels,
        rows=list(rows.values()),
        settings=_flat(found['config']),
        pictures={name: _inline(picture) for name, picture in pictures.items()},
        viewer=viewer.fragment(),
    )


def render_experiment(found: Mapping, roc: Figure, confusions: Mapping[str, Figure]) -> str:
    """The page of an experiment.

    Args:
        found: what `vqroi_jax.train_classifier` leaves as `metrics.json`.
        roc: curves of all arms.
        confusions: the confusion matrix of each arm.

    Returns:
        HTML that needs no other file.
    """
    arms = {
        name: arm
        | {
            'rois': {
                stage: {side: sizes([run[side] for run in runs]) for side in ('train', 'validation')}
                for stage, runs in arm['rois'].items()
            }
        }
        for name, arm in found['arms'].items()
    }
    sets = [('Phantoms' if found['real']['phantoms'] else 'Real', found['real'])]
    return render_page(
        EXPERIMENT_TEMPLATE,
        found={**found, 'arms': arms},
        sets=[*sets, ('Synthetic', found['fake'])] if found['fake'] else sets,
        figures=FIGURES,
        stages={'pretrain': 'pre-training', 'finetune': 'training'},
        test=sizes([found['test']]),
        roc=_inline(roc),
        confusions={name: _inline(picture) for name, picture in confusions.items()},
        settings=_flat(found['config']),
    )


def sizes(runs: Sequence[Mapping[str, Mapping[str, int]]]) -> str:
    """Numbers of ROIs by class and origin as text: of one run, or the least to the most of several.

    Args:
        runs: for each, as `vqroi_jax.experiment.counted` gives them; the same kinds in all.
    """
    texts = []
    for label, by_origin in runs[0].items():
        for origin in by_origin:
            numbers = [run[label][origin] for run in runs]
            span = f'{min(numbers)}' + (f' to {max(numbers)}' if max(numbers) > min(numbers) else '')
            texts.append(f'{span} {origin} {label}')
    return ', '.join(texts)


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
