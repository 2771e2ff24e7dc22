"""Every layout in which patients are found, and every fault that shows without opening a volume.

Files are empty here: finding a cohort looks at names alone.
"""

import os
import random
from pathlib import Path

import pytest

from vqroi_jax.data.cohort import Problem, Scan, find_cohort
from vqroi_jax.errors import InputError

OLD, NEW = ('_flair', '_t1', '_t1ce', '_t2', '_seg'), ('-t2f', '-t1n', '-t1c', '-t2w', '-seg')


def add_patient(folder: Path, names=OLD, ending='.nii.gz') -> Path:
    folder.mkdir(parents=True)
    for name in names:
        (folder / f'{folder.name}{name}{ending}').touch()
    return folder


def add_csv(path: Path, *lines: str) -> str:
    path.write_text('\n'.join(lines) + '\n', encoding='utf-8')
    return str(path)


def ids_and_labels(cohort) -> dict[str, str]:
    return {scan.id: scan.label for scan in cohort.scans}


@pytest.fixture
def data(data, tmp_path):
    data.path = str(tmp_path / 'cohort')
    (tmp_path / 'cohort').mkdir()
    return data


@pytest.fixture
def root(data) -> Path:
    return Path(data.path)


# Layouts


@pytest.mark.parametrize('ending', ['.nii.gz', '.nii'])
@pytest.mark.parametrize('top', ['.', 'MICCAI_BraTS_2018_Data_Training', 'Data/Data'])
def test_brats_2018_and_2019(top, ending, data, root):
    add_patient(root / top / 'HGG' / 'Brats18_A_1', ending=ending)
    add_patient(root / top / 'LGG' / 'Brats18_B_1', ending=ending)
    cohort = find_cohort(data)
    assert (cohort.layout, cohort.classes, cohort.problems) == ('brats2019', ('LGG', 'HGG'), ())
    folder = root / top / 'HGG' / 'Brats18_A_1'
    image, mask = (folder / f'Brats18_A_1_{name}{ending}' for name in ('flair', 'seg'))
    assert cohort.scans[0] == Scan('Brats18_A_1', 'Brats18_A_1', 'HGG', image, mask)
    assert ids_and_labels(cohort) == {'Brats18_A_1': 'HGG', 'Brats18_B_1': 'LGG'}
    data.layout = 'brats2019'
    assert find_cohort(data) == cohort


def test_brats_2020_with_the_odd_name_of_patient_355(data, root):
    training = root / 'MICCAI_BraTS2020_TrainingData'
    add_patient(training / 'BraTS20_Training_001', ending='.nii')
    odd = add_patient(training / 'BraTS20_Training_355', OLD[:-1], ending='.nii') / 'W39_1998.09.19_Segm.nii'
    odd.touch()
    add_csv(
        training / 'name_mapping.csv',
        'Grade,BraTS_2017_subject_ID,BraTS_2018_subject_ID,TCGA_TCIA_subject_ID,BraTS_2019_subject_ID,BraTS_2020_subject_ID',
        'HGG,Brats17_A_1,Brats18_A_1,NA,BraTS19_A_1,BraTS20_Training_001',
        'LGG,NA,NA,NA,BraTS19_B_1,BraTS20_Training_355',
        'LGG,NA,NA,NA,NA,BraTS20_Training_002',
    )
    cohort = find_cohort(data)
    assert (cohort.layout, cohort.classes, cohort.problems) == ('brats2020', ('LGG', 'HGG'), ())
    assert ids_and_labels(cohort) == {'BraTS20_Training_001': 'HGG', 'BraTS20_Training_355': 'LGG'}
    assert cohort.scans[1].mask == odd
    data.layout = 'brats2020'
    assert find_cohort(data) == cohort


def test_brats_2021(data, root, tmp_path):
    add_patient(root / 'BraTS2021_00000')
    add_patient(root / 'BraTS2021_00002')
    data.grades_csv = add_csv(tmp_path / 'g.csv', '\ufeffID , Label', 'BraTS2021_00000,HGG', 'BraTS2021_00002, AST', '')
    cohort = find_cohort(data)
    assert (cohort.layout, cohort.classes, cohort.problems) == ('brats2021', ('HGG', 'AST'), ())
    assert ids_and_labels(cohort) == {'BraTS2021_00000': 'HGG', 'BraTS2021_00002': 'AST'}


def test_brats_2023_counts_time_points_as_one_patient(data, root, tmp_path):
    for name in ('BraTS-GLI-00000-000', 'BraTS-GLI-00000-001', 'BraTS-GLI-00003-000'):
        add_patient(root / name, NEW)
    grades = add_csv(tmp_path / 'g.csv', 'id,label', 'BraTS-GLI-00000,LGG', 'BraTS-GLI-00003-000,HGG')
    data.grades_csv = grades
    cohort = find_cohort(data)
    assert (cohort.layout, cohort.problems) == ('brats2023', ())
    assert [(scan.patient, scan.label) for scan in cohort.scans] == [
        ('BraTS-GLI-00000', 'LGG'),
        ('BraTS-GLI-00000', 'LGG'),
        ('BraTS-GLI-00003', 'HGG'),
    ]
    assert cohort.scans[0].image.name == 'BraTS-GLI-00000-000-t2f.nii.gz'
    assert cohort.scans[0].mask.name == 'BraTS-GLI-00000-000-seg.nii.gz'


def test_brats_2023_in_class_folders_and_without_time_points(data, root):
    add_patient(root / 'HGG' / 'BraTS-GLI-00000', NEW)
    add_patient(root / 'LGG' / 'BraTS-GLI-00001', NEW)
    cohort = find_cohort(data)
    assert ids_and_labels(cohort) == {'BraTS-GLI-00000': 'HGG', 'BraTS-GLI-00001': 'LGG'}
    assert [scan.patient for scan in cohort.scans] == ['BraTS-GLI-00000', 'BraTS-GLI-00001']


def test_manifest_with_three_classes_and_relative_paths(data, root, tmp_path):
    for name in ('a', 'b', 'c', 'd'):
        (root / f'{name}.nii').touch()
        (root / f'{name}_m.nii').touch()
    data.path = add_csv(
        root / 'list.csv',
        'id,image,mask,label,patient,age',
        'A,a.nii,a_m.nii,oligo,,40',
        'B,../cohort/b.nii,b_m.nii,astro,twice,50',
        f'C,{root}/c.nii,{root}/c_m.nii,HGG,,60',
        '"D",d.nii,"d_m.nii",astro,twice,51',
    )
    for data.layout in ('auto', 'manifest'):
        cohort = find_cohort(data)
        assert (cohort.layout, cohort.classes, cohort.problems) == ('manifest', ('HGG', 'astro', 'oligo'), ())
        assert ids_and_labels(cohort) == {'A': 'oligo', 'B': 'astro', 'C': 'HGG', 'D': 'astro'}
        assert [scan.patient for scan in cohort.scans] == ['A', 'twice', 'C', 'twice']
        assert all(scan.image.is_file() and scan.mask.is_file() for scan in cohort.scans)


def test_two_tumours_of_one_patient_may_share_their_image(data, root):
    for name in ('a', 'm1', 'm2'):
        (root / f'{name}.nii').touch()
    lines = 'id,image,mask,label,patient', 'A1,a.nii,m1.nii,LGG,A', 'A2,a.nii,m2.nii,LGG,A'
    data.path = add_csv(root / 'list.csv', *lines)
    assert len(find_cohort(data).scans) == 2


def test_one_patient_alone_and_a_path_to_its_class_or_to_itself(data, root):
    folder = add_patient(root / 'LGG' / 'TCGA-DU-7294', ('_flair', '_seg'))
    for path in (root, root / 'LGG', folder):
        data.path = str(path)
        cohort = find_cohort(data)
        assert (cohort.layout, ids_and_labels(cohort)) == ('brats2019', {'TCGA-DU-7294': 'LGG'})


def test_real_and_phantom_patients_in_one_folder_also_by_links(data, root, tmp_path):
    add_patient(root / 'HGG' / 'PHANTOM_HGG_000', ('_flair', '_seg'))
    real = add_patient(tmp_path / 'elsewhere' / 'TCGA-DU-7294', ('_flair', '_seg'), '.nii')
    (root / 'LGG').mkdir()
    (root / 'LGG' / 'TCGA-DU-7294').symlink_to(real, target_is_directory=True)
    add_csv(root / 'name_mapping.csv', 'Grade,BraTS_2019_subject_ID', 'HGG,PHANTOM_HGG_000')
    cohort = find_cohort(data)
    assert (cohort.layout, cohort.problems) == ('brats2019', ())
    assert ids_and_labels(cohort) == {'PHANTOM_HGG_000': 'HGG', 'TCGA-DU-7294': 'LGG'}


def test_what_is_no_patient_is_no_matter(data, root):
    patient = add_patient(root / 'HGG' / 'A')
    (patient / '._A_flair.nii.gz').touch()  # as macOS leaves them
    add_patient(root / '__MACOSX' / 'HGG' / 'A')
    add_patient(root / '.hidden' / 'HGG' / 'A')
    (root / 'README.md').touch()
    (root / 'empty').mkdir()
    (root / 'HGG' / 'figures').mkdir()
    (root / 'HGG' / 'figures' / 'a.png').touch()
    cohort = find_cohort(data)
    assert (ids_and_labels(cohort), cohort.problems) == ({'A': 'HGG'}, ())


@pytest.mark.parametrize(
    ('modality', 'old', 'new'), [('t1', '_t1', '-t1n'), ('t1ce', '_t1ce', '-t1c'), ('t2', '_t2', '-t2w')]
)
def test_other_modalities(modality, old, new, data, root):
    data.modality = modality
    old_patient = add_patient(root / 'old' / 'HGG' / 'A')
    new_patient = add_patient(root / 'new' / 'HGG' / 'B-00001-000', NEW)
    data.path = str(root / 'old')
    assert find_cohort(data).scans[0].image == old_patient / f'A{old}.nii.gz'
    data.path = str(root / 'new')
    assert find_cohort(data).scans[0].image == new_patient / f'B-00001-000{new}.nii.gz'


def test_classes_are_ordered_lgg_hgg_then_by_name_or_as_asked(data, root):
    for label in ('HGG', 'oligo', 'LGG', 'astro'):
        add_patient(root / label / f'P_{label}')
    data.layout = 'brats2019'  # any folder around patients is a class
    assert find_cohort(data).classes == ('LGG', 'HGG', 'astro', 'oligo')
    data.layout, data.classes = 'auto', ('oligo', 'HGG', 'astro', 'LGG')
    cohort = find_cohort(data)
    assert cohort.classes == data.classes
    assert ids_and_labels(cohort) == {f'P_{label}': label for label in data.classes}


def test_the_order_of_files_on_the_disk_is_no_matter(data, root, monkeypatch):
    for number in range(6):
        add_patient(root / ('HGG', 'LGG')[number % 2] / f'P{number}')
    expected = find_cohort(data)
    assert [scan.id for scan in expected.scans] == [f'P{number}' for number in range(6)]
    scandir = os.scandir

    class Shuffled:
        def __init__(self, path):
            with scandir(path) as entries:
                self.entries = list(entries)
            random.Random(1).shuffle(self.entries)

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *_):
            return None

        def __iter__(self):
            return iter(self.entries)

        def __next__(self):
            if not self.entries:
                raise StopIteration
            return self.entries.pop()

        def close(self):
            pass

    monkeypatch.setattr(os, 'scandir', Shuffled)
    assert find_cohort(data) == expected


# Faults of one patient: a Problem, and the others go on


@pytest.fixture
def good(root) -> Path:
    """A cohort of one good patient, so that something is left."""
    return add_patient(root / 'LGG' / 'good')


def only_problem(data) -> Problem:
    cohort = find_cohort(data)
    assert [scan.id for scan in cohort.scans] == ['good']
    (problem,) = cohort.problems
    assert str(problem) == f'patient {problem.id}, {problem.file}: {problem.message}'
    return problem


@pytest.mark.parametrize('name', ['_flair', '_seg'])
def test_missing_file(name, data, root, good):
    folder = add_patient(root / 'HGG' / 'A')
    (folder / f'A{name}.nii.gz').unlink()
    problem = only_problem(data)
    assert (problem.id, problem.file) == ('A', str(folder / f'A{name}.nii.gz'))
    assert 'missing file' in problem.message


def test_link_to_nowhere(data, root, good):
    file = add_patient(root / 'HGG' / 'A') / 'A_flair.nii.gz'
    file.unlink()
    file.symlink_to(root / 'gone')
    assert 'missing file' in only_problem(data).message


def test_two_candidates_for_one_file(data, root, good):
    (add_patient(root / 'HGG' / 'A') / 'A_seg.nii').touch()
    assert 'A_seg.nii, A_seg.nii.gz; keep one' in only_problem(data).message


@pytest.mark.parametrize('content', [(), ('brain.nii.gz',)])
def test_a_folder_beside_patients_with_nothing_of_theirs(content, data, root, good):
    (root / 'LGG' / 'A').mkdir()
    for name in content:
        (root / 'LGG' / 'A' / name).touch()
    problem = only_problem(data)
    assert (problem.id, problem.file) == ('A', str(root / 'LGG' / 'A'))
    assert 'no image or mask' in problem.message


def test_no_class_known_for_one(data, root, good):
    add_patient(root / 'unsure' / 'A')
    data.layout = 'auto'
    with pytest.raises(InputError, match=r'mixes layouts: brats2019 \(1, e.g. good\), brats2021 \(1, e.g. A\)'):
        find_cohort(data)
    data.grades_csv = add_csv(root / 'grades.csv', 'id,label', 'good,LGG', 'A,')
    data.layout = 'brats2021'
    problem = only_problem(data)
    assert problem.id == 'A'
    assert 'no class' in problem.message


def test_unknown_class(data, root, good):
    folder = add_patient(root / 'HGG' / 'A')
    data.classes = ('LGG', 'AST')
    problem = only_problem(data)
    assert (problem.id, problem.file) == ('A', str(folder / 'A_flair.nii.gz'))
    assert problem.message == "unknown class 'HGG'; data.classes has LGG, AST"


def test_the_same_patient_twice(data, root, good):
    for label in ('LGG', 'HGG'):
        add_patient(root / label / 'A')
    cohort = find_cohort(data)
    assert ids_and_labels(cohort) == {'good': 'LGG'}
    files = [str(root / label / 'A' / 'A_flair.nii.gz') for label in ('HGG', 'LGG')]
    assert [problem.file for problem in cohort.problems] == files
    for problem, other in zip(cohort.problems, files[::-1], strict=True):
        assert problem.id == 'A'
        assert problem.message == f'the same patient twice: also {other}'


def test_the_same_patient_under_the_names_of_two_years(data, root, good):
    add_patient(root / 'HGG' / 'Brats18_A_1')
    add_patient(root / 'HGG' / 'BraTS19_A_1')
    lines = 'Grade,BraTS_2018_subject_ID,BraTS_2019_subject_ID', 'HGG,Brats18_A_1,BraTS19_A_1', 'LGG,NA,good'
    add_csv(root / 'name_mapping.csv', *lines)
    cohort = find_cohort(data)
    assert ids_and_labels(cohort) == {'good': 'LGG'}
    assert [problem.id for problem in cohort.problems] == ['BraTS19_A_1', 'Brats18_A_1']
    assert all('the same patient twice' in problem.message for problem in cohort.problems)


@pytest.mark.parametrize(
    ('lines', 'ids', 'message'),
    [
        (['A,a.nii,gone.nii,LGG'], ['A'], 'missing file, named in'),
        (['A,,a_m.nii,LGG'], ['A'], 'nothing under image'),
        ([',a.nii,a_m.nii'], ['(scan 2)'], 'nothing under id, label'),
        (['A,a.nii,a_m.nii,LGG', 'A,b.nii,b_m.nii,LGG'], ['A', 'A'], 'the same patient twice'),
        (['A,a.nii,a_m.nii,LGG', 'B,./a.nii,b_m.nii,HGG'], ['A', 'B'], 'the same patient twice'),
    ],
)
def test_faults_of_a_manifest(lines, ids, message, data, root):
    for name in ('good', 'a', 'a_m', 'b', 'b_m'):
        (root / f'{name}.nii').touch()
    data.path = add_csv(root / 'list.csv', 'id,image,mask,label', 'good,good.nii,good.nii,LGG', *lines)
    cohort = find_cohort(data)
    assert ids_and_labels(cohort) == {'good': 'LGG'}
    assert [problem.id for problem in cohort.problems] == ids
    assert all(message in problem.message for problem in cohort.problems)


# What nothing can be done with: an InputError


def fails(data, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        find_cohort(data)
    assert '\n' not in str(caught.value)


def test_no_path_or_one_to_nowhere(data, root):
    fails(data, 'no patients found; looked 5 folders deep for CLASS/ID/ID_flair.nii.gz and ID_seg.nii.gz')
    data.path = ''
    fails(data, 'data.path is empty')
    data.path = str(root / 'gone')
    fails(data, 'gone: no such folder or file')
    data.path = str(root / 'notes.txt')
    (root / 'notes.txt').touch()
    fails(data, 'neither a folder nor a .csv manifest')


def test_a_folder_that_cannot_be_read(data, root, monkeypatch):
    def refuse(path):
        raise PermissionError(13, 'Permission denied', str(path))

    monkeypatch.setattr(os, 'scandir', refuse)
    fails(data, r'cohort: cannot be read \(Permission denied\)')


def test_settings_that_are_not_known(data, root):
    add_patient(root / 'HGG' / 'A')
    data.modality = 'pet'
    fails(data, "data.modality='pet' is not known; choose one of flair, t1, t1ce, t2")
    data.layout = 'brats2017'
    fails(data, "data.layout='brats2017' is not known; choose one of auto, brats2019")
    data.layout, data.classes = 'auto', ('HGG', 'HGG')
    fails(data, 'names a class twice')


@pytest.mark.parametrize(
    ('there', 'asked', 'message'),
    [
        ('brats2019', 'brats2020', 'none of a known class: it must be named in name_mapping.csv'),
        ('brats2019', 'brats2021', r'none of a known class: give a CSV \(id,label\) as data.grades_csv'),
        ('brats2019', 'brats2023', r'no patient like that.*-seg.nii.gz.*found brats2019 \(2'),
        ('brats2021', 'brats2019', 'none of a known class: its folder must lie in a class folder'),
        ('brats2021', 'auto', r'none of a known class: give a CSV \(id,label\) as data.grades_csv'),
        ('brats2023', 'brats2019', r'no patient like that.*found brats2023 \(2'),
        ('brats2023', 'auto', 'none of a known class'),
        ('brats2019', 'manifest', 'needs a CSV file, but .* is a folder'),
        ('manifest', 'brats2019', 'needs a folder, but .* is a file'),
    ],
)
def test_a_wrong_layout(there, asked, message, data, root):
    for number in range(2):
        name = f'P-0000{number}-000'
        if there == 'brats2019':
            add_patient(root / ('LGG', 'HGG')[number] / name)
        else:
            add_patient(root / name, NEW if there == 'brats2023' else OLD)
    if there == 'manifest':
        data.path = add_csv(root / 'list.csv', 'id,image,mask,label')
    data.layout = asked
    fails(data, message)


@pytest.mark.parametrize(
    ('lines', 'message'),
    [
        ([], 'must name the columns id, image, mask, label, separated by commas; it has: nothing'),
        (['id,image,mask,label, Label', 'a,i,m,LGG,HGG'], 'the first line names the column label twice'),
        (['id,image,mask,label', '', 'a,i,m,LGG,', 'b,i,m,grade 2, IDH-mutant'], 'line 4 has 5 values.* 4 columns'),
        (['id;image;mask;label'], r'it has: id;image;mask;label'),
        (['id,image,mask,label'], 'no scans: expected lines of id,image,mask,label'),
    ],
)
def test_a_broken_manifest(lines, message, data, root):
    data.path = add_csv(root / 'list.csv', *lines)
    fails(data, message)


def test_a_broken_grades_csv(data, root):
    add_patient(root / 'A')
    data.grades_csv = str(root / 'gone.csv')
    fails(data, 'gone.csv: not readable as a CSV file')
    data.grades_csv = add_csv(root / 'grades.csv', 'id,grade', 'A,HGG')
    fails(data, 'grades.csv: the first line must name the column label')
    add_csv(root / 'grades.csv', 'id,label', 'A,HGG', 'A,LGG')
    fails(data, 'grades.csv: A is HGG on one line and LGG on another')
    (root / 'grades.csv').write_bytes(b'id,label\n\xff\xfe,HGG\n')
    fails(data, 'grades.csv: not readable as a CSV file in UTF-8')
    add_csv(root / 'grades.csv', 'id,label', 'B,HGG')
    fails(data, 'neither it nor its patient is named in data.grades_csv')
