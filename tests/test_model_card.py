"""The model card: that it says what the run's other files say, and is honest about what is not known."""

import json
import re
import runpy
import subprocess
from pathlib import Path

import pytest

from vqroi_jax import model_card, train_transformer
from vqroi_jax.code_version import code_version
from vqroi_jax.trained import Stage1Facts
from vqroi_jax.training.loop import last_evaluation

CONFIGS = Path(__file__).parents[1] / 'configs'
FACTS = Stage1Facts('/x', 800, 'ab' * 8, 1024, (8, 8, 8), (128, 128, 128), ('LGG', 'HGG'), (1.0, 1.0, 1.0), False)


def table(text, heading):
    """Cells of the rows of the first table below a heading."""
    rows = re.findall(r'^\|(.*)\|$', text.split(f'## {heading}')[1].split('\n## ')[0], re.MULTILINE)
    return [[cell.strip() for cell in row.split('|')] for row in rows if not set(row) <= set('-:| ')]


def scan(patient, label, split, spacing=(1.0, 1.0, 1.0)):
    return {'patient': patient, 'label': label, 'split': split, 'spacing': list(spacing)}


@pytest.fixture
def report():
    """Of four patients, one of them scanned twice."""
    scans = [
        scan('a', 'LGG', 'train'),
        scan('b', 'LGG', 'val'),
        scan('c', 'HGG', 'train'),
        scan('c', 'HGG', 'train'),
        scan('d', 'HGG', 'test'),
    ]
    return {
        'synthetic': False,
        'layout': 'brats2019',
        'classes': ['LGG', 'HGG'],
        'roi_size': [128, 96, 64],
        'settings': {'modality': 'flair'},
        'problems': [],
        'scans': scans,
    }


def render(report, evaluation=(), task='transformer', step=10):
    config = runpy.run_path(str(CONFIGS / f'{task}.py'))['get_config']()
    facts = FACTS if task == 'transformer' else None
    return model_card.render(config, report, dict(evaluation), 1234567, 10, step, facts)


def test_counts_patients_once_by_class_and_split(report):
    rows = table(render(report), 'Data')
    assert rows == [
        ['patients', 'train', 'val', 'test', 'all'],
        ['LGG', '1', '1', '0', '2'],
        ['HGG', '1', '0', '1', '2'],
        ['all', '2', '1', '1', '4'],
    ]
    assert '5 scan(s), split by patient. ROIs of 128 x 96 x 64 voxels of\n1 x 1 x 1 mm' in render(report)


def test_patients_and_phantoms_are_not_taken_for_one_another(report):
    of_patients, of_phantoms = render(report), render({**report, 'synthetic': True})
    assert 'memorise patients' in of_patients
    assert 'phantom' not in of_patients.lower()
    assert 'SYNTHETIC phantoms, not patients' in of_phantoms
    assert 'memorise' not in of_phantoms
    for text in (of_patients, of_phantoms):
        assert 'Not for clinical use' in text
        assert '**Not known**: age, sex' in text


def test_figures_are_by_class_and_say_what_was_not_finite(report):
    evaluation = {'val/top1': None, 'val/top1/HGG': 0.123456, 'val/cross_entropy': 3.21}
    assert table(render(report, evaluation), 'Figures of the last validation') == [
        ['', 'all', 'LGG', 'HGG'],
        ['share of corrupted tokens told exactly', '–', '', '0.123'],
        ['cross-entropy of tokens, nats', '3.21', '', ''],
    ]


def test_what_was_not_validated_or_finished_says_so(report):
    assert 'Not validated yet' in render(report)
    alone = {**report, 'scans': [scan('a', 'LGG', 'train')]}
    assert '**Not validated**: no patients were held out' in render(alone)
    assert '**Unfinished**: step 4 of 10' in render(report, step=4)
    assert 'Trained to the end, 10 steps' in render(report)


def test_odd_cohorts(report):
    report['scans'][0]['spacing'] = [2.0, 1.0, 1.0]
    report['classes'] = ['LGG', 'HGG', 'a|b']
    report |= {'layout': 'manifest', 'problems': [{}]}
    text = render(report, {'val/l1': 0.5}, task='vqgan')
    assert '2 different sizes' in text
    assert '1 faulty scan(s)' in text
    assert 'modality' not in text.split('## Figures')[0]
    assert '| a\\|b | 0 | 0 | 0 | 0 |' in text


@pytest.mark.parametrize('stage', [1, 2])
def test_a_run_has_one_that_agrees_with_its_files(stage, tiny_vqgan, tiny_transformer):
    folder = tiny_vqgan if stage == 1 else tiny_transformer
    text = (folder / model_card.CARD_FILE).read_text(encoding='utf-8')
    report = json.loads((tiny_vqgan / 'cohort' / 'cohort.json').read_text())
    assert f'{len(report["scans"])} scan(s)' in text
    assert 'SYNTHETIC phantoms' in text
    assert f'Trained to the end, {4 if stage == 1 else 8} steps' in text
    number = re.search(r'Total: ([\d,]+)', (folder / 'parameters.txt').read_text())[1]
    assert f'{number} parameters' in text
    figures = table(text, 'Figures of the last validation')
    found = last_evaluation(folder)
    assert len(figures) - 1 == len({name.split('/')[1] for name in found})
    name, begins = ('val/l1', 'mean absolute error') if stage == 1 else ('val/cross_entropy', 'cross-entropy')
    (value,) = (row[1] for row in figures if row[0].startswith(begins))
    assert float(value) == pytest.approx(found[name], rel=5e-3)
    settings = dict(table(text, 'Settings that matter'))
    assert settings['`batch_size`'] == str(json.loads((folder / 'config.json').read_text())['batch_size'])
    if stage == 2:
        assert json.loads((folder / 'stage1.json').read_text())['identity'] in settings['stage 1']


def test_is_written_anew_at_every_checkpoint(tiny_transformer_config, tmp_path, monkeypatch):
    steps = []

    def write(path, text):
        if path.name == model_card.CARD_FILE:
            steps.append(re.search(r'step (\d+) of|to the end', text)[1])
        path.write_text(text)

    monkeypatch.setattr(model_card, 'write_atomically', write)
    train_transformer.run(tiny_transformer_config(), tmp_path)
    assert steps == ['0', '4', None]


@pytest.mark.parametrize('template', ['vqgan', 'transformer'])
def test_every_setting_named_exists(template, report):
    text = render(report, task=template)
    assert len(table(text, 'Settings that matter')) > 10


def git(folder, *arguments):
    identity = ('-c', 'user.name=x', '-c', 'user.email=x@example.org')
    done = subprocess.run(['git', '-C', folder, *identity, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_code_is_named_by_its_commit_where_it_is_a_checkout(tmp_path):
    package = tmp_path / 'package'
    package.mkdir()
    assert code_version(package).commit is None
    assert 'not from a git checkout' in str(code_version(package))
    (package / 'a.py').write_text('')
    git(tmp_path, 'init')
    git(tmp_path, 'add', '.')
    git(tmp_path, 'commit', '-m', 'x')
    found = code_version(package)
    assert found.commit == git(tmp_path, 'rev-parse', 'HEAD')
    assert not found.changed
    (package / 'b.py').write_text('')
    assert str(code_version(package)).endswith('with uncommitted changes')
    installed = package / 'venv' / 'package'  # in somebody's checkout, but not of this package
    installed.mkdir(parents=True)
    assert code_version(installed).commit is None
