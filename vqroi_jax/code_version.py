"""Which code this is: the package's version, and the commit where it runs from a checkout."""

import subprocess
from pathlib import Path
from typing import NamedTuple

import vqroi_jax


class CodeVersion(NamedTuple):
    """What a run's files say of the code that wrote them."""

    version: str  # of the package
    commit: str | None  # 40 hexadecimal digits; None where there is no checkout, or no git to ask
    changed: bool  # the package differs from that commit

    def __str__(self) -> str:
        if self.commit is None:
            return f'vqroi_jax {self.version}, not from a git checkout'
        return f'vqroi_jax {self.version}, commit {self.commit}{" with uncommitted changes" if self.changed else ""}'


def code_version(package: Path = Path(__file__).parent) -> CodeVersion:
    """Asks git.

    Args:
        package: the folder of the package's modules. Only a checkout whose top is the folder above counts: an
            installed package may lie somewhere in another project's.
    """
    top = _git(package, 'rev-parse', '--show-toplevel')
    if not top or Path(top).resolve() != package.parent.resolve():
        return CodeVersion(vqroi_jax.__version__, None, False)
    changes = _git(package, 'status', '--porcelain', '--', '.')
    return CodeVersion(vqroi_jax.__version__, _git(package, 'rev-parse', 'HEAD'), bool(changes))


def _git(folder: Path, *arguments: str) -> str | None:
    """What git answers; None if it does not."""
    try:
        done = subprocess.run(['git', '-C', folder, *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
