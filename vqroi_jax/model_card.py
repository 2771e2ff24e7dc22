"""The model card of a training run: what was trained on what, how good it is, and what it must not be used for.

Written into the folders of both stages when training begins and at every checkpoint, from what lies there anyway.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax
import jax
from clu import parameter_overview
from ml_collections import ConfigDict

from vqroi_jax.code_version import code_version
from vqroi_jax.data.pipeline import PreparedCohort
from vqroi_jax.data.splits import SPLITS, count_patients
from vqroi_jax.templates import render_text
from vqroi_jax.trained import Stage1Facts
from vqroi_jax.training.checkpoints import saved_steps
from vqroi_jax.training.durations import to_steps
from vqroi_jax.training.loop import last_evaluation
from vqroi_jax.workdir import CONFIG_FILE, is_primary, write_atomically

CARD_FILE = 'MODEL_CARD.md'
TEMPLATE = 'model_card.md.jinja'

_SETTINGS = {  # those that matter most, by task; all are in config.json
    'vqgan': (
        'training.duration',
        'batch_size',
        'dtype',
        'seed',
        'model.channels',
        'model.hidden',
        'model.code_features',
        'codebook.codes',
        'perceptual',
        'losses.adversarial_start',
        'optimizer.learning_rate',
        'ema_decay',
    ),
    'transformer': (
        'training.duration',
        'batch_size',
        'dtype',
        'seed',
        'model.layers',
        'model.width',
        'model.heads',
        'model.attention',
        'masking.strategy',
        'masking.ratio',
        'masking.top_k',
        'loss_on',
        'label_dropout',
        'augment.flip',
        'optimizer.learning_rate',
        'ema_decay',
    ),
}
_MEANINGS = {  # of the validation's figures, by task
    'vqgan': {
        'l1': 'mean absolute error of reconstructions, voxels in [-1, 1]',
        'psnr': 'PSNR of reconstructions, dB, whole ROI (background included)',
        'psnr_box': "PSNR of reconstructions, dB, in the tumour's box",
        'ssim': 'SSIM of reconstructions',
        'accuracy': 'share of ROIs whose class the auxiliary classifier tells',
        'perplexity': 'codes effectively in use',
        'live_codes': 'share of the codes that occur',
    },
    'transformer': {
        'cross_entropy': 'cross-entropy of tokens, nats',
        'perplexity': 'its exponential, the perplexity',
        'top1': 'share of corrupted tokens told exactly',
    },
}


def keep(
    folder: Path,
    config: ConfigDict,
    cohort: PreparedCohort,
    steps_per_epoch: float,
    params: Any,
    facts: Stage1Facts | None = None,
) -> Callable[[int], None]:
    """Writes the card of a run as it is now; of several processes only the primary one does.

    Args:
        folder: the run's.
        config: of the run, of the task `vqgan` or `transformer`.
        cohort: that it is trained on.
        steps_per_epoch: of it.
        params: of the network.
        facts: of stage 1, in a run of stage 2.

    Returns:
        What writes it again, from a step that has a checkpoint.
    """
    parameters = parameter_overview.count_parameters(params)
    steps = to_steps(config.training.duration, steps_per_epoch, 'training.duration')

    def write(step: int) -> None:
        if is_primary():
            text = render(config, cohort.report, last_evaluation(folder), parameters, steps, step, facts)
            write_atomically(folder / CARD_FILE, text)

    write(max(saved_steps(folder), default=0))
    return write


def render(
    config: ConfigDict,
    report: Mapping[str, Any],
    evaluation: Mapping[str, float | None],
    parameters: int,
    steps: int,
    step: int,
    facts: Stage1Facts | None,
) -> str:
    """The card as Markdown.

    Args:
        config: of the run.
        report: of the cohort, the content of its `cohort.json`.
        evaluation: the last validation's figures, as `metrics.jsonl` has them; none if there was none.
        parameters: of the network.
        steps: of the whole run.
        step: that it is at.
        facts: of stage 1, in a run of stage 2.
    """
    task, scans, classes = config.task, report['scans'], report['classes']
    patients = {label: count_patients([scan for scan in scans if scan['label'] == label]) for label in classes}
    figures: dict[str, dict[str, float | None]] = {}
    for name, value in evaluation.items():
        figure, _, label = name.removeprefix('val/').partition('/')
        figures.setdefault(figure, {})[label] = value
    flat = config.to_dict()
    return render_text(
        TEMPLATE,
        stage=1 if task == 'vqgan' else 2,
        synthetic=report['synthetic'],
        report=report,
        modality=report['settings']['modality'],
        spacings=sorted({tuple(scan['spacing']) for scan in scans}),
        splits=SPLITS,
        patients=patients,
        total=count_patients(scans),
        scans=len(scans),
        classes=classes,
        figures=figures,
        meanings=_MEANINGS[task],
        settings={name: _look_up(flat, name) for name in _SETTINGS[task]},
        config_file=CONFIG_FILE,
        parameters=parameters,
        steps=steps,
        step=step,
        facts=facts,
        code=code_version(),
        jax=jax.__version__,
        flax=flax.__version__,
    )


def _look_up(nested: Mapping[str, Any], name: str) -> Any:
    """The field of a dotted name."""
    for part in name.split('.'):
        nested = nested[part]
    return nested
