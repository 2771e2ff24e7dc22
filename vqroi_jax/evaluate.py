"""The command `evaluate`: how one set of ROIs compares with another, whoever made them.

two folders (data.roi_sets) -> figures of merit (figures_of_merit) -> `metrics.json`, `report.html` (report)
"""

import dataclasses
import hashlib
import json
import math
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from vqroi_jax import published, report, viz
from vqroi_jax.data.roi_sets import open_sets
from vqroi_jax.errors import InputError, check_fields
from vqroi_jax.figures_of_merit import GROUPS, METRICS, SEEN_BY_VGG16, measure
from vqroi_jax.merit.evaluation import Evaluation
from vqroi_jax.models import inception, perceptual
from vqroi_jax.stopping import sigterm_interrupts
from vqroi_jax.templates import number
from vqroi_jax.viewer import Viewer
from vqroi_jax.workdir import open_workdir, write_atomically

METRICS_FILE = 'metrics.json'
REPORT_FILE = 'report.html'
FORMAT = 4  # counts up with each change of what is measured or of how it is laid out

_SHOWN = 6  # ROIs of each class in a picture
_TURNED = 4  # of each in the viewer


def run(config: ConfigDict, workdir: str | Path) -> None:
    """Runs `--config=configs/evaluate.py`."""
    with open_workdir(workdir, config) as folder:
        with sigterm_interrupts():
            evaluate(config, folder)
        print(summary(json.loads((folder / METRICS_FILE).read_text(encoding='utf-8'))))
        print(f'Open {folder / REPORT_FILE}')


def evaluate(config: ConfigDict, folder: Path) -> None:
    """Compares two sets and writes `metrics.json` and `report.html` into an opened workdir.

    Where both are there already, of this format and of the same ROIs, weights and published table, they stay.

    Raises:
        InputError: a setting or a set cannot be used.
    """
    check_settings(config)
    table = published.read(config.published, known_metrics()) if config.published else None
    with open_sets(config.real, config.fake, config, folder) as (real, fake):
        evaluation = Evaluation(real, fake, config)
        if table:
            published.check_classes(config.published, table, real.classes)
        inputs = describe_inputs(evaluation, table)
        if _identities(inputs) == _measured(folder):
            return
        if config.inception and inputs['inception']['sha256'] != inception.SHA256:
            evaluation.notes.append(
                f'{config.inception} is not the file that FID is computed with elsewhere (its sha256 is not '
                f'{inception.SHA256[:8]}…): what is called FID here compares only with figures by the same file.'
            )
        measure(evaluation)
        _draw(evaluation)
        found = inputs | describe(evaluation)
        page = report.render(found, evaluation.pictures, _viewer(evaluation))
    write_atomically(folder / REPORT_FILE, page)
    # Last, for it says that all is done.
    write_atomically(folder / METRICS_FILE, json.dumps(found, indent=2, allow_nan=False) + '\n')


def _measured(folder: Path) -> dict[str, str | None] | None:
    """The identities of what an evaluation was computed from; None where it is not done, or of another format."""
    path = folder / METRICS_FILE
    if not (path.exists() and (folder / REPORT_FILE).exists()):
        return None
    found = json.loads(path.read_text(encoding='utf-8'))
    return _identities(found) if found.get('format') == FORMAT else None


def _identities(inputs: dict) -> dict[str, str | None]:
    """By name, the sha256 of each input; None of one that is not used."""
    return {name: inputs[name] and inputs[name]['sha256'] for name in ('real', 'fake', 'inception', 'published')}


def check_settings(config: ConfigDict) -> None:
    """Refuses settings that cannot be used, before anything is read.

    Raises:
        InputError: naming the field and what it may be.
    """
    if not config.metrics:
        raise InputError(f'config.metrics is empty: name some of {", ".join(GROUPS)}')
    if twice := [name for place, name in enumerate(config.metrics) if name in config.metrics[:place]]:
        raise InputError(f'config.metrics: {twice[0]!r} is named twice')
    if unknown := [name for name in config.metrics if name not in GROUPS]:
        raise InputError(f'config.metrics: {unknown[0]!r} is none of {", ".join(GROUPS)}')
    fields = (
        ('seed', config.seed >= 0, 'at least 0'),
        ('pairs', config.pairs >= 1, 'at least 1'),
        ('bootstrap', config.bootstrap >= 2, 'at least 2'),
        ('frechet_bootstrap', config.frechet_bootstrap >= 2, 'at least 2'),
        ('neighbours', config.neighbours >= 1, 'at least 1'),
        ('slices.number', config.slices.number >= 1, 'at least 1'),
        ('mmd.batch', config.mmd.batch >= 1, 'at least 1'),
        ('mmd.repeats', config.mmd.repeats >= 1, 'at least 1'),
        ('privacy.candidates', config.privacy.candidates >= 1, 'at least 1'),
        ('classifier.epochs', config.classifier.epochs >= 1, 'at least 1'),
    )
    check_fields('config', config, fields)
    if config.slices.empty not in ('drop', 'keep'):
        raise InputError(f'config.slices.empty={config.slices.empty!r} is none of drop, keep')
    # Are they there?
    if {*SEEN_BY_VGG16} & {*config.metrics}:
        perceptual.load_weights()
    if config.inception:
        if 'frechet' not in config.metrics:
            raise InputError(f"config.inception={config.inception}: it is for 'frechet', which config.metrics has not")
        inception.load_weights(config.inception)


def _draw(evaluation: Evaluation) -> None:
    """The contact sheets of both sets: the first ROIs of each class."""
    for name, heading, part in (
        ('real', f'{evaluation.reference}s', evaluation.real),
        ('synthetic', 'synthetic', evaluation.fake),
    ):
        rows = np.concatenate([part.of(number)[:_SHOWN] for number in range(len(part.classes))])
        headings = [f'{part.classes[part.labels[row]]}, {heading}' for row in rows]
        titles = [part.names[row] for row in rows]
        evaluation.pictures[name] = viz.contact_sheet(part.volumes[rows], headings, titles, part.spacing)


def _viewer(evaluation: Evaluation) -> Viewer:
    """Of the first ROIs of each class of both sets, synthetic ones first."""
    volumes = {
        f'{name} {part.classes[number]}, {part.names[row]}': part.volumes[row]
        for name, part in (('synthetic', evaluation.fake), (evaluation.reference, evaluation.real))
        for number in range(len(part.classes))
        for row in part.of(number)[:_TURNED]
    }
    return Viewer(volumes, evaluation.real.spacing)


def known_metrics() -> list[str]:
    """What the figures of all groups are called."""
    return [name for names in METRICS.values() for name in names]


def describe_inputs(evaluation: Evaluation, table: dict | None) -> dict:
    """What an evaluation is computed from, as JSON has it.

    Args:
        evaluation: nothing of which needs to be measured yet.
        table: of published figures, see `published.read`; None: none.
    """
    weights, path = evaluation.config.inception, evaluation.config.published
    return {
        'format': FORMAT,
        'config': evaluation.config.to_dict(),
        'real': evaluation.real.describe(),
        'fake': evaluation.fake.describe(),
        'inception': {'path': weights, 'sha256': _sha256(weights)} if weights else None,
        'published': {'path': path, 'sha256': _sha256(path), **table} if table else None,
    }


def _sha256(path: str) -> str:
    with open(Path(path).expanduser(), 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def describe(evaluation: Evaluation) -> dict:
    """Everything that was found, as JSON has it: what is not finite is None."""

    def finite(value):
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {
        'figures': [
            {name: finite(value) for name, value in dataclasses.asdict(figure).items()} for figure in evaluation.figures
        ],
        'neighbours': evaluation.neighbours,
        'notes': evaluation.notes,
    }


def summary(found: dict) -> str:
    """The figures as lines of text, a metric a line, with a column for each class."""
    labels = list(dict.fromkeys(figure['label'] for figure in found['figures']))
    width = 26
    kind = 'phantoms' if found['real']['phantoms'] else 'real'
    lines = ['', f'{f"synthetic / {kind} to {kind}":36}' + ''.join(f'{label or "all":>{width}}' for label in labels)]
    by_metric: dict[str, dict[str, str]] = {}
    for figure in found['figures']:
        value, floor = (number(figure[name]) for name in ('value', 'floor'))
        by_metric.setdefault(figure['metric'], {})[figure['label']] = f'{value} / {floor}'
    for metric, cells in by_metric.items():
        lines.append(f'{metric:36}' + ''.join(f'{cells.get(label, ""):>{width}}' for label in labels))
    return '\n'.join([*lines, '', *found['notes'], ''])
