"""The command line: reads the config and the flags and starts the task that the config names.

    python -m vqroi_jax.main --config=configs/NAME.py[:VARIANT] --workdir=DIR [--config.FIELD=VALUE ...]

    --config         a Python file with get_config(variant); its `task` says what runs
    --config.FIELD   sets one field, for instance --config.training.duration='500 steps'
    --workdir        the folder that everything is written to; the same command again resumes the run
    --hosts          for a run in several processes, on several hosts or on one; the same command in each, but for
                     ADDRESS:PORT,NUMBER,INDEX: where the first is, how many there are, and which this is (from 0);
                     'auto': found out by JAX (Cloud TPU pods, SLURM, Open MPI), which is the default where the
                     environment names several; 'none': this process alone
    --help           this text, and the fields of --config if one is given

Exit status: 0 done, or stopped by SIGTERM or Ctrl-C with everything saved; 2 something that you can mend,
told in one line; 130 interrupted where there was nothing to save; of several processes, 1 or the signal of an abort
where another was lost.
"""

import difflib
import errno
import importlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from vqroi_jax import hosts, large_pages
from vqroi_jax.errors import InputError, Stopped

# Imported when they are started: jax and its kin take seconds, and --help should not.
TASKS = {
    'prepare': 'vqroi_jax.prepare',
    'vqgan': 'vqroi_jax.train_vqgan',
    'transformer': 'vqroi_jax.train_transformer',
    'demo': 'vqroi_jax.demo',
    'generate': 'vqroi_jax.generate',
    'export': 'vqroi_jax.export',
    'evaluate': 'vqroi_jax.evaluate',
    'classifier': 'vqroi_jax.train_classifier',
    'convert': 'vqroi_jax.convert',
    'plan': 'vqroi_jax.plan',
}
# Last parts of the names of fields on which a program's memory depends, and what takes less.
FRUGAL = {
    'dtype': 'bfloat16',
    'batch_size': 'a smaller one',
    'eval_batch_size': 'a smaller one',
    'sub_batch': 'a smaller one',
    'micro_batches': 'more',
    'remat': 'blocks',
}


def main(argv: list[str]) -> int:
    """Runs one command.

    Args:
        argv: the program's name and the arguments, as in `sys.argv`.

    Returns:
        The exit status.
    """
    logging.use_absl_handler()
    logging.set_verbosity(logging.WARNING)
    flags.FLAGS.mark_as_parsed()  # libraries read their own absl flags, which keep their defaults
    config = ConfigDict()
    try:
        arguments = parse_arguments(argv)
        if arguments is None:
            return 0
        config, workdir, where = arguments
        hosts.join(where, config.task)
        importlib.import_module(TASKS[config.task]).run(config, workdir)
    except Stopped as stopped:
        print(f'vqroi_jax: {stopped}')
    except KeyboardInterrupt:
        print('vqroi_jax: interrupted', file=sys.stderr)
        return hosts.leave(130)
    except Exception as error:
        lost = hosts.loss_of_a_process(error)
        message = lost or _mendable(error, config)
        if message is None and not hosts.joined():
            raise
        if message is None:
            traceback.print_exc()
        else:
            _fail(message)
        return hosts.leave(1 if lost or message is None else 2)
    return 0


def parse_arguments(argv: list[str]) -> tuple[ConfigDict, str, str] | None:
    """Reads the command line.

    Args:
        argv: the program's name and the arguments.

    Returns:
        The locked config with its overrides, the workdir and what `--hosts` says; None if help was wanted, and printed.

    Raises:
        InputError: an unknown flag, field, task or variant, a value of the wrong type, something missing.
    """
    values = flags.FlagValues()
    values.set_gnu_getopt(True)
    flags.DEFINE_string('config', None, 'config file', flag_values=values)
    flags.DEFINE_string('workdir', None, 'where everything is written to', flag_values=values)
    flags.DEFINE_string('hosts', '', 'which of several processes this is', flag_values=values)
    flags.DEFINE_bool('help', False, 'what the arguments are', flag_values=values, short_name='h')
    try:
        rest = values(argv, known_only=True)
    except flags.Error as error:
        raise InputError(str(error)) from None
    for argument in rest[1:]:
        flag = re.match(r'--?([a-z][^=]*)', argument, re.IGNORECASE)
        if flag and not re.match(r'(no)?config\.', flag[1]):
            raise InputError(f'there is no flag --{flag[1]}{_nearest(flag[1], ["config", "workdir", "hosts", "help"])}')
    if values.help:
        print(__doc__)
    if values.config is None:
        if values.help:
            return None
        raise InputError('no --config given; give a config file, for instance --config=configs/demo.py')
    config = load_config(values.config)
    override(config, rest)
    if values.help:
        print(config)
        return None
    if config.get('task') not in TASKS:
        raise InputError(f'{values.config}: task {config.get("task")!r} is none of {", ".join(TASKS)}')
    if not values.workdir:
        raise InputError('no --workdir given; name the folder to write to, for instance --workdir=runs/first')
    return config, str(Path(values.workdir).expanduser()), values.hosts


def load_config(path: str) -> ConfigDict:
    """Calls `get_config` of a config file.

    Args:
        path: PATH or PATH:VARIANT.

    Returns:
        The config, locked: fields can be set, but not added.

    Raises:
        InputError: no such file, not a config file, or a variant that it does not have.
    """
    name, *variant = path.split(':', 1)
    if not Path(name).is_file():
        raise InputError(f'--config={path}: there is no file {name}')
    spec = importlib.util.spec_from_file_location('config', name)
    if spec is None or spec.loader is None:
        raise InputError(f'--config={path}: {name} is not a Python file')
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, 'get_config'):
            raise InputError(f'--config={path}: {name} has no function get_config')
        config = module.get_config(*variant)
    except (ValueError, SyntaxError) as error:
        raise InputError(f'--config={path}: {error}') from error
    return config.lock()


def override(config: ConfigDict, argv: list[str]) -> None:
    """Sets the fields of `config` that the command line names.

    Args:
        config: changed in place.
        argv: the program's name, then only --config.FIELD=VALUE, --config.FIELD VALUE or --[no]config.FIELD.

    Raises:
        InputError: an unknown field, a value of another type than the field has, or a tuple that is set twice.
    """
    before = dict(_fields(config))
    tuples = set()
    for argument in argv[1:]:
        flag = re.match(r'--?(?:no)?config\.([^=]*)', argument)
        if flag and flag[1] not in before:
            raise InputError(f'the config has no field {flag[1]!r}{_nearest(flag[1], before)}')
        if flag and isinstance(before[flag[1]], ConfigDict):
            raise InputError(f'{flag[1]!r} is a block of fields; set them one by one')
        if flag and flag[1] in tuples:  # which would be put together, where the last of other values counts
            raise InputError(f'--config.{flag[1]} is given twice; write all its members in one, such as A,B')
        if flag and isinstance(before[flag[1]], tuple):
            tuples.add(flag[1])
    values = flags.FlagValues()
    values.set_gnu_getopt(True)
    try:
        config_flags.DEFINE_config_dict('config', config, flag_values=values, sys_argv=argv)
        unknown = values(argv)[1:]
    except flags.IllegalFlagValueError as error:
        name = str(error).removeprefix('flag --config.').partition('=')[0]
        kind = type(before[name]).__name__
        raise InputError(f'{error}; a value of type {kind} is expected, such as {before[name]!r}') from None
    except flags.Error as error:
        raise InputError(str(error)) from None
    if unknown:
        raise InputError(f'{unknown[0]!r} is not an argument; set a field with --config.FIELD=VALUE')
    for name, value in config_flags.get_override_values(values['config']).items():
        _check_tuple(name, value, before[name])


def _fields(config: ConfigDict, prefix: str = '') -> Iterable[tuple[str, Any]]:
    """All fields and blocks by their dotted names."""
    for name, value in config.items():
        yield prefix + name, value
        if isinstance(value, ConfigDict):
            yield from _fields(value, f'{prefix}{name}.')


def _check_tuple(name: str, value: Any, before: Any) -> None:
    """Refuses a tuple whose members are of another type than those that the config file has."""
    if not isinstance(before, tuple) or not before:
        return
    kinds = (int, float) if isinstance(before[0], float) else (type(before[0]),)
    if any(type(member) not in kinds for member in value):
        kind = type(before[0]).__name__
        raise InputError(f'--config.{name}={value}: members of type {kind} are expected, such as {before}')


def _nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message: the known name that is most like `name`, as a whole or in its last part."""

    def likeness(candidate: str) -> float:
        pairs = ((candidate, name), (candidate.split('.')[-1], name.split('.')[-1]))
        return sum(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)

    best = max(known, key=likeness, default=None)
    return f'; did you mean {best!r}?' if best and likeness(best) > 1 else ''


def _mendable(error: Exception, config: ConfigDict) -> str | None:
    """What to say of an error that the user can mend; None for all other errors."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f'{error}: free some space, then run the same command again to resume'
    if 'jax' in sys.modules and isinstance(error, sys.modules['jax'].errors.JaxRuntimeError):
        return _want_of_memory(str(error), config)
    return None


def _want_of_memory(error: str, config: ConfigDict) -> str | None:
    """What to say if a device's memory was too small for what was to be computed; None for other errors of JAX."""
    if not re.search('RESOURCE_EXHAUSTED|out of memory', error, re.IGNORECASE):
        return None
    now = {name: (value, FRUGAL.get(name.rpartition('.')[2])) for name, value in _fields(config)}
    less = [f'config.{name}={value} ({other})' for name, (value, other) in now.items() if other and value != other]
    advice = f'other values need less: {", ".join(less)}' if less else 'no field of this task changes that'
    return f"a device's memory is too small ({error.partition(chr(10))[0][:200]}); {advice}"


def _fail(message: str) -> None:
    print(f'vqroi_jax: error: {" ".join(message.split())}', file=sys.stderr)


if __name__ == '__main__':
    large_pages.ask()
    sys.exit(main(sys.argv))
