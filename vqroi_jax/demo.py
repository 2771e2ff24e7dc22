"""The command `demo`: the whole pipeline, small, on the phantom cohort.

Each stage is a run of its own in a subfolder, by the same code and with the same files as its own command would leave.
What the samples are worth is then measured beside held-out phantoms and their reconstructions, and kept in
`results.json`.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from scipy import stats

from vqroi_jax import class_agreement, generate, prepare, train_transformer, train_vqgan, viz
from vqroi_jax.data import pipeline, samples
from vqroi_jax.data.roi import scale, to_volume
from vqroi_jax.metrics import mmd
from vqroi_jax.tokens import encode_cohort
from vqroi_jax.trained import load_transformer
from vqroi_jax.training import loop, partitioning
from vqroi_jax.workdir import open_workdir, write_atomically

RESULTS_FILE = 'results.json'
VOLUMES_FIGURE = Path('figures') / 'tumour_volumes.png'


def run(config: ConfigDict, workdir: str | Path) -> None:
    """Runs `--config=configs/demo.py`."""
    with open_workdir(workdir, config) as folder:
        prepare.run(config.prepare, folder / 'cohort')
        train_vqgan.run(_with(config.vqgan, 'data.path', folder / 'cohort'), folder / 'vqgan')
        train_transformer.run(_with(config.transformer, 'vqgan_workdir', folder / 'vqgan'), folder / 'transformer')
        generate.run(_with(config.generate, 'transformer_workdir', folder / 'transformer'), folder / 'generated')
        results = measure(folder, config)
        print(reconstruction_table(loop.last_evaluation(folder / 'vqgan')))
        print(sample_tables(results))
        print('Look at')
        for figure in (
            'cohort/figures/cohort.png',
            'vqgan/figures/reconstructions.png',
            'transformer/figures/masking.png',
            'transformer/figures/completions.png',
            'generated/figures/samples.png',
            VOLUMES_FIGURE,
        ):
            print(f'  {folder / figure}')


def _with(config: ConfigDict, field: str, path: Path) -> ConfigDict:
    """A copy of a stage's config that reads from another stage's folder."""
    changed = config.copy_and_resolve_references()
    changed.update_from_flattened_dict({field: str(path)})
    return changed


@dataclasses.dataclass(frozen=True)
class _Rois:
    """Some ROIs in the networks' range."""

    volumes: np.ndarray  # float32 [n, D, H, W] in [-1, 1]
    labels: np.ndarray  # int [n]
    tumour_ml: np.ndarray  # float [n]

    def of(self, label: int) -> np.ndarray:
        """Tumour volumes of a class."""
        return self.tumour_ml[self.labels == label]


def measure(folder: Path, config: ConfigDict) -> dict:
    """How good the samples are, and draws their volumes; from `results.json` if that is there already.

    Args:
        folder: of the demo, all stages done.
        config: of the demo.

    Returns:
        `agreement`: by 'held-out phantoms', 'their reconstructions' and 'samples', the share told rightly by a
        classifier that was trained on real training phantoms: in all ('') and by class. `volumes`: by class,
        Kolmogorov-Smirnov distances of tumour volumes. `mmd`: by class, squared MMD on voxels. And the settings that
        the table names.
    """
    path = folder / RESULTS_FILE
    if path.exists():
        return json.loads(path.read_text(encoding='utf-8'))
    cohort = pipeline.open_cohort(folder / 'cohort')
    classes, number = cohort.classes, len(cohort.classes)
    training, held_out = _real(cohort, ('train',)), _real(cohort, ('val', 'test'))
    made = _made(folder / 'generated', classes, config.generate.intensity.maximum)
    again = _reconstructions(folder, cohort)

    params = class_agreement.train(training.volumes, training.labels, number)
    agreement = {
        name: class_agreement.accuracy(class_agreement.class_logits(params, volumes, number), labels, classes)
        for name, volumes, labels in (
            ('held-out phantoms', held_out.volumes, held_out.labels),
            ('their reconstructions', again, held_out.labels),
            ('samples', made.volumes, made.labels),
        )
    }
    real_ml = {name: np.concatenate([training.of(c), held_out.of(c)]) for c, name in enumerate(classes)}
    made_ml = {name: made.of(c) for c, name in enumerate(classes)}
    figure = viz.tumour_volumes(real_ml, made_ml)
    viz.save_figure(figure, folder / VOLUMES_FIGURE)
    volumes = {
        name: {
            'samples': stats.ks_2samp(made_ml[name], real_ml[name]).statistic,
            'held-out phantoms': stats.ks_2samp(held_out.of(c), training.of(c)).statistic,
        }
        for c, name in enumerate(classes)
    }
    results = {
        'agreement': agreement,
        'volumes': volumes,
        'mmd': {name: _mmd(training, held_out, made, c) for c, name in enumerate(classes)},
        'held_out': len(held_out.labels),
        'samples': len(made.labels),
        'corruption': config.transformer.masking.ratio,
        'attention': config.transformer.model.attention,
        'sampling': config.generate.sampling.to_dict(),
    }
    write_atomically(path, json.dumps(results, indent=2) + '\n')
    return results


def _real(cohort: pipeline.PreparedCohort, splits: Sequence[str]) -> _Rois:
    sources = [cohort.split(name) for name in splits]
    return _Rois(
        np.stack([source.volume(i)[..., 0] for source in sources for i in range(len(source))]),
        np.concatenate([source.labels for source in sources]),
        np.array([cohort.scans[scan]['tumour_ml'] for source in sources for scan in source.ids]),
    )


def _made(folder: Path, classes: Sequence[str], maximum: float) -> _Rois:
    """The samples, from their files."""
    volumes, labels, millilitres = [], [], []
    for row in samples.read_manifest(folder / samples.MANIFEST_FILE):
        path = folder / row[samples.KEY]
        image = samples.load_nifti(path, str(path))
        voxels = to_volume(samples.read_voxels(image, str(path)))
        volumes.append(scale(voxels, (0, maximum)))
        labels.append(classes.index(row['class']))
        millilitres.append(np.count_nonzero(voxels) * abs(np.linalg.det(image.affine[:3, :3])) / 1000)
    return _Rois(np.stack(volumes), np.array(labels), np.array(millilitres))


def _reconstructions(folder: Path, cohort: pipeline.PreparedCohort) -> np.ndarray:
    """What stage 1 makes of the tokens of the held-out phantoms, `[n, D, H, W]`."""
    trained, mesh = load_transformer(folder / 'transformer'), partitioning.make_mesh(1)
    sources = encode_cohort(trained.vqgan, cohort, mesh)
    sampler = trained.sampler(trained.config.sampling, 0, mesh)
    return np.stack(list(sampler.decode(np.concatenate([sources['val'].tokens, sources['test'].tokens]))))


def _mmd(training: _Rois, held_out: _Rois, made: _Rois, label: int) -> dict[str, float]:
    """Squared MMD of a class from its training phantoms, with one kernel for samples and held-out phantoms."""
    of_class = (rois.volumes[rois.labels == label] for rois in (training, held_out, made))
    flat = [jnp.asarray(volumes.reshape(len(volumes), -1)) for volumes in of_class]
    bandwidth = mmd.median_bandwidth(flat[0], flat[1])
    return {
        'samples': float(mmd.rbf(flat[2], flat[0], bandwidth)),
        'held-out phantoms': float(mmd.rbf(flat[1], flat[0], bandwidth)),
    }


def reconstruction_table(figures: Mapping[str, float]) -> str:
    """The validation's figures as lines of text: all held-out patients, then class by class."""
    columns = (
        ('psnr', 'PSNR, dB'),
        ('psnr_box', 'in the box'),
        ('ssim', 'SSIM'),
        ('l1', 'L1'),
        ('accuracy', 'class right'),
    )
    labels = sorted(name.split('/')[2] for name in figures if name.startswith('val/psnr/'))
    lines = ['', 'Reconstructions of held-out phantoms', f'{"":8}' + ''.join(f'{title:>13}' for _, title in columns)]
    for label in ('', *labels):
        values = (figures[f'val/{name}' + (f'/{label}' if label else '')] for name, _ in columns)
        lines.append(f'{label or "all":8}' + ''.join(f'{value:13.3f}' for value in values))
    lines.append(f'codes in use: {figures["val/live_codes"]:.0%}, perplexity {figures["val/perplexity"]:.0f}\n')
    return '\n'.join(lines)


def sample_tables(results: Mapping) -> str:
    """What `measure` found, as lines of text."""
    agreement, sampling = results['agreement'], results['sampling']
    labels = list(results['volumes'])
    lines = [
        f'{results["samples"]} samples beside {results["held_out"]} held-out phantoms '
        f'(corruption {results["corruption"]:g}, guidance {sampling["guidance"]:g}, '
        f'temperature {sampling["temperature"]:g}, {results["attention"]})',
        f'{"told as their class":32}' + ''.join(f'{label or "all":>10}' for label in ('', *labels)),
    ]
    for name, shares in agreement.items():
        lines.append(f'{name:32}' + ''.join(f'{shares[label]:10.3f}' for label in ('', *labels)))
    for title, block in (('tumour volume, KS distance', 'volumes'), ('voxels, squared MMD', 'mmd')):
        lines.append(f'{title:42}' + ''.join(f'{label:>10}' for label in labels))
        names = (('samples', 'samples from real'), ('held-out phantoms', 'held-out from training phantoms'))
        lines += [
            f'{text:42}' + ''.join(f'{results[block][label][name]:10.4f}' for label in labels) for name, text in names
        ]
    return '\n'.join([*lines, ''])
