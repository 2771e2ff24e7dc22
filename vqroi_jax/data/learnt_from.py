"""Which patients a model has learnt from: kept in the runs' folders and beside samples.

splits of a cohort -> `learnt_from.json` of each stage's run -> both together beside the samples -> data.roi_sets
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vqroi_jax.errors import InputError
from vqroi_jax.workdir import write_atomically

LEARNT_FROM_FILE = 'learnt_from.json'


@dataclasses.dataclass(frozen=True)
class LearntFrom:
    """Patients by what they were to a model.

    Their cohort's names are all that tells them apart: cohorts that give one name to two patients have one in common.

    Attributes:
        train: it was trained on.
        val: it was not, but its checkpoints and settings were chosen by them.
    """

    train: frozenset[str]
    val: frozenset[str]

    @classmethod
    def of_scans(cls, scans: Iterable[Mapping[str, Any]]) -> 'LearntFrom':
        """Of a model that learns from a cohort's training split.

        Args:
            scans: as `cohort.json` has them, with `patient` and `split`.
        """
        patients: dict[str, set[str]] = {'train': set(), 'val': set()}
        for scan in scans:
            if scan['split'] in patients:
                patients[scan['split']].add(scan['patient'])
        return cls(frozenset(patients['train']), frozenset(patients['val']))

    def __or__(self, other: 'LearntFrom') -> 'LearntFrom':
        """Of a model that both have gone into."""
        train = self.train | other.train
        return LearntFrom(train, (self.val | other.val) - train)

    def record(self, run: Path, begun: bool) -> None:
        """Writes the file of a training run, or compares it with the one there: a run goes on with its patients.

        Args:
            run: its folder.
            begun: whether it has checkpoints. One that has, but no file, keeps none: what it began with is not known.

        Raises:
            InputError: the run was begun with other patients, or its file is damaged.
        """
        if not begun:
            write_learnt_from(run, self)
            return
        there = read_learnt_from(run)
        if there is not None and there != self:
            other = min((there.train ^ self.train) | (there.val ^ self.val))
            raise InputError(
                f'{run} was started with other splits of the cohort (patient {other} is not where it was, see '
                f'{LEARNT_FROM_FILE}); name another --workdir'
            )


def write_learnt_from(folder: Path, learnt: LearntFrom | None) -> None:
    """Writes the file of a folder; None: it is not known."""
    plain = {
        'train': None if learnt is None else sorted(learnt.train),
        'val': None if learnt is None else sorted(learnt.val),
    }
    write_atomically(folder / LEARNT_FROM_FILE, json.dumps(plain, indent=1) + '\n')


def read_learnt_from(folder: Path) -> LearntFrom | None:
    """Reads the file of a folder; None if there is none, or it says that it is not known.

    Raises:
        InputError: it is damaged.
    """
    path = folder / LEARNT_FROM_FILE
    try:
        plain = json.loads(path.read_text(encoding='utf-8'))
        train, val = plain['train'], plain['val']
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        train = val = ()  # neither null nor a list
    if train is None and val is None:
        return None
    if not all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in (train, val)):
        raise InputError(
            f'{path} is damaged: expected a JSON object with the lists train and val of patients, or null for both '
            'where they are not known'
        )
    return LearntFrom(frozenset(train), frozenset(val))
