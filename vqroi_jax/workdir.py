"""The folder of a run: who may write to it, with which config, and whether there is room.

Every command opens its workdir with `open_workdir` before it does anything else; later stages read the
config of an earlier run with `read_config`.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import shutil
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict

from vqroi_jax.compiler_memory import given_back
from vqroi_jax.errors import InputError

CONFIG_FILE = 'config.json'
LOCK_FILE = '.lock'
COMPILED_FOLDER = 'compiled'  # programs, so that a run that goes on, or the same one again, does not compile anew
COHORT_FOLDER = 'cohort'  # ROIs that a run of stage 1 prepared for itself; other settings have them prepared again
UNASKED = {'print_shardings': False}  # fields that say what to show of a run, not what it is: recorded as not asked for
SOURCES = ('data.path', 'real', 'fake')  # fields that name what a run reads, where nothing may be written
# Fields that say what a run is computed on, and in which parts: it may go on otherwise, the same to rounding.
LAYOUT = ('mesh.', 'micro_batches', 'model.remat', 'eval_batch_size')
SHOWN_DIFFERENCES = 8  # fields; more are counted


def is_primary() -> bool:
    """Whether this process is the one of the run that writes files and prints (starts no backend)."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


@contextlib.contextmanager
def open_workdir(
    workdir: str | Path, config: ConfigDict, free: Sequence[str] = (), goes_on_from: str = ''
) -> Iterator[Path]:
    """Makes the folder, locks it for this process, and records the config or compares it with the recorded.

    The lock is the operating system's, so it is gone when the process is, however it ends. Of several processes of one
    run, only the primary one locks and writes. A run that ends with an error before it has written anything but
    prepared ROIs (or anything that it could go on from), or that was only to show something, leaves no config behind.
    Compiled programs are kept in the folder, unless JAX was told where to (JAX_COMPILATION_CACHE_DIR) or an outer
    workdir is open.

    Args:
        workdir: the run's folder, on a local or mounted file system.
        config: of the run. A run goes on with exactly the config that it began with, but for `LAYOUT`.
        free: names of fields that may change as well; the new values are then the recorded ones.
        goes_on_from: subfolder without which the run begins anew, whatever else it has left; empty: all that it writes.

    Yields:
        The folder.

    Raises:
        InputError: the folder cannot be made or written, is in use by another process, is the one that the run
            reads its data from, or holds a run with another config (which is left as it is).
    """
    folder = Path(workdir)
    if '://' in str(workdir):
        raise InputError(f'--workdir={workdir}: a local or mounted folder is expected')
    settings = _flat(config.to_dict())
    for name in SOURCES:
        if settings.get(name) and Path(settings[name]).expanduser().resolve() == folder.resolve():
            raise InputError(f'--workdir={workdir} is the folder of data that config.{name} names; name another')
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not is_primary():
            with _compiled_in(folder), given_back():
                yield folder
            return
        lock = open(folder / LOCK_FILE, 'a+', encoding='utf-8')  # noqa: SIM115 (closed below)
    except OSError as error:
        raise InputError(f'--workdir={workdir}: cannot be written to ({error.strerror}); name another') from None
    with lock:
        _lock(lock, folder)
        _record_config(folder, config, free)
        try:
            with _compiled_in(folder), given_back():
                yield folder
            if any(config[name] for name in UNASKED if name in config):
                _forget_config_of_nothing(folder, goes_on_from)
        except BaseException:
            _forget_config_of_nothing(folder, goes_on_from)
            raise


def read_config(workdir: str | Path) -> ConfigDict:
    """The config that a run was started with; sequences are tuples, as in config files.

    Raises:
        InputError: there is no run in that folder, or its config.json is damaged.
    """
    path = Path(workdir).absolute() / CONFIG_FILE  # so that a message says where, also if the path is empty
    try:
        plain = json.loads(path.read_text(encoding='utf-8'))
    except (FileNotFoundError, NotADirectoryError):
        missing = f'it is a file, not a folder with a {CONFIG_FILE}' if path.parent.is_file() else f'{path} is missing'
        raise InputError(f'{path.parent} holds no run: {missing}') from None
    except ValueError as error:
        raise InputError(f'{path} is damaged ({error}); restore it, or use another workdir') from None
    return ConfigDict(_tuples(plain)).lock()


def require_space(folder: Path, size: int, what: str) -> None:
    """Refuses to begin what the disk has no room for.

    Args:
        folder: an existing folder on that disk.
        size: bytes needed.
        what: for the message, e.g. 'the checkpoint of step 500'.

    Raises:
        InputError: fewer bytes are free.
    """
    free = shutil.disk_usage(folder).free
    if free < size:
        raise InputError(
            f'no disk space: {what} needs {size / 2**30:.2f} GiB and {folder} has {free / 2**30:.2f} GiB left; '
            'free some, or name another --workdir'
        )


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file so that, whenever the process dies, it is there as a whole or as it was; makes its folder.

    Raises:
        OSError: it cannot be written, for instance because the disk is full; nothing is left of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'{path.name}.tmp')
    try:
        with open(temporary, 'wb') as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _lock(lock: Any, folder: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip() or 'another process'
        raise InputError(f'{folder} is in use by {holder}; wait for it to end, or name another --workdir') from None
    except OSError as error:
        raise InputError(
            f'--workdir={folder}: its file system locks no files ({error.strerror}), so that two runs could write to '
            'it at once; name another'
        ) from None
    lock.truncate(0)
    lock.write(f'process {os.getpid()} on {socket.gethostname()}\n')
    lock.flush()


@contextlib.contextmanager
def _compiled_in(folder: Path) -> Iterator[None]:
    if jax.config.jax_compilation_cache_dir is not None:  # type: ignore[attr-defined]
        yield
        return
    jax.config.update('jax_compilation_cache_dir', str(folder.absolute() / COMPILED_FOLDER / _processor()))
    compilation_cache.reset_cache()  # it opens what the setting names when it is first used
    try:
        yield
    finally:
        jax.config.update('jax_compilation_cache_dir', None)
        compilation_cache.reset_cache()


def _processor() -> str:
    """A name for what this machine's processor can do: a program for a CPU may crash on another, and JAX mixes them."""
    table = Path('/proc/cpuinfo')
    lines = table.read_text(encoding='utf-8').splitlines() if table.exists() else [platform.processor()]
    features = sorted({line for line in lines if line.lower().startswith(('model name', 'flags', 'features'))})
    return f'{platform.machine()}-{hashlib.sha256("".join(features).encode()).hexdigest()[:8]}'


def _record_config(folder: Path, config: ConfigDict, free: Sequence[str]) -> None:
    path = folder / CONFIG_FILE
    plain = config.to_dict()
    plain |= {name: value for name, value in UNASKED.items() if name in plain}
    text = json.dumps(plain, indent=2, sort_keys=True) + '\n'
    if not path.exists():
        write_atomically(path, text)
        return
    there, now = _flat(read_config(folder).to_dict()), _flat(_tuples(json.loads(text)))
    changed = [
        name
        for name in sorted(there.keys() | now.keys(), key=lambda name: (name != 'task', name))
        if not name.startswith(LAYOUT) and (name not in there or name not in now or there[name] != now[name])
    ]
    differences = [
        f'{name} {_shown(there, name)} there, {_shown(now, name)} now' for name in changed if name not in free
    ]
    if differences:
        more = len(differences) - SHOWN_DIFFERENCES
        shown = '; '.join(differences[:SHOWN_DIFFERENCES]) + (f'; and {more} more' if more > 0 else '')
        raise InputError(
            f'{folder} holds a run with another config: {shown}. Give that config to resume it, '
            'or name another --workdir'
        )
    if changed:
        write_atomically(path, text)


def _shown(flat: dict[str, Any], name: str) -> str:
    return repr(flat[name]) if name in flat else 'absent'


def _forget_config_of_nothing(folder: Path, goes_on_from: str) -> None:
    """Removes the config of a run that ended before it left anything, so that a mended one may begin in its place."""
    own = {CONFIG_FILE, LOCK_FILE, COMPILED_FOLDER, COHORT_FOLDER}
    left = {path.relative_to(folder).parts[0] for path in folder.rglob('*') if path.is_file()}
    if (goes_on_from not in left) if goes_on_from else own.issuperset(left):
        (folder / CONFIG_FILE).unlink(missing_ok=True)


def _flat(plain: dict[str, Any], prefix: str = '') -> dict[str, Any]:
    """Nested dicts as one, with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in plain.items():
        if isinstance(value, dict):
            flat |= _flat(value, f'{prefix}{name}.')
        else:
            flat[prefix + name] = value
    return flat


def _tuples(value: Any) -> Any:
    """JSON's lists as tuples, at any depth."""
    if isinstance(value, dict):
        return {name: _tuples(member) for name, member in value.items()}
    return tuple(_tuples(member) for member in value) if isinstance(value, list) else value
