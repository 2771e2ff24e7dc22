"""One run on several hosts, or in several processes of one: the same command in each, joined before JAX finds devices.

Which process of how many this is comes from the command line or from what started them (`--hosts`, see
`vqroi_jax.main`), never from the config: that is of the run, whichever hosts it is computed on. What follows is
`jax.distributed`'s: every process sees all devices, and when one is lost, the others end.
"""

import glob
import http.client
import importlib.util
import os
import re
import sys
import time

from vqroi_jax.errors import InputError

ONE_PROCESS = ('prepare', 'demo', 'export', 'evaluate', 'convert', 'plan')  # what several processes would do twice
HEARTBEAT = 60  # seconds of silence after which a process counts as lost, and the others end
PATIENCE = 3  # seconds in which the other processes of a run that fails find that themselves, and say why

_TPU_CHIPS = ('/dev/accel[0-9]*', '/dev/vfio/[0-9]*')  # devices of a machine that has some, older and newer
# What a Google Cloud machine is told about itself; of a TPU slice, all its hosts.
_METADATA = 'metadata.google.internal'
_SLICE_HOSTS = '/computeMetadata/v1/instance/attributes/worker-network-endpoints'
_METADATA_PATIENCE = 5  # seconds

_EXPLICIT = re.compile(r'(?P<address>[^,\s]+:\d+),(?P<number>\d+),(?P<index>\d+)')
# What errors of collectives say when another process is gone: XLA's on CPUs (Gloo) and GPUs, and the coordinator's.
_LOST = re.compile(
    r'gloo|nccl|connection (closed|reset|refused)|socket closed|heartbeat|coordination|unavailable', re.I
)

# What they say where the others are there, but too late for the first thing that is computed together.
_NEVER_MET = re.compile(r'initialization failed.*GetKeyValue', re.I | re.S)


def join(hosts: str, task: str) -> None:
    """Joins the other processes of a run, if there are any; must come before anything touches devices.

    Args:
        hosts: 'ADDRESS:PORT,NUMBER,INDEX': where the first process is, how many there are, and which this is; each
            uses all devices that it sees, so there is one a host, or `CUDA_VISIBLE_DEVICES` shares a host's GPUs out;
            'auto': JAX finds out (Cloud TPU pods, SLURM, Open MPI, Kubernetes); 'none': there are no others; empty:
            'auto' where the environment or a TPU machine's metadata name several processes, else 'none'.
        task: of the config.

    Raises:
        InputError: `hosts` is none of these, the others cannot be found or reached, or the task is for one process.
    """
    if hosts == 'none' or (not hosts and not _several(os.environ) and len(_tpu_hosts()) < 2):
        return
    if task in ONE_PROCESS:
        raise InputError(f'the task {task!r} runs in one process: start a single one, with --hosts=none')
    explicit = None
    if hosts not in ('', 'auto'):
        explicit = _EXPLICIT.fullmatch(hosts)
        if not explicit or not int(explicit['index']) < int(explicit['number']):
            raise InputError(
                f"--hosts={hosts}: expected 'auto', 'none' or ADDRESS:PORT,NUMBER,INDEX with the indices 0 to NUMBER - "
                '1, such as 10.0.0.1:1234,4,0 for the first of four'
            )
    import jax  # here, for main must not load it to print its help

    try:
        if explicit:
            jax.distributed.initialize(
                coordinator_address=explicit['address'],
                num_processes=int(explicit['number']),
                process_id=int(explicit['index']),
                cluster_detection_method='deactivate',
                heartbeat_timeout_seconds=HEARTBEAT,
            )
        else:
            jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT)
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().partition('\n')[0]
        raise InputError(
            f'the processes of this run did not find each other ({reason}); start the same command on every host, each '
            'with its own --hosts=ADDRESS:PORT,NUMBER,INDEX, or a single one with --hosts=none'
        ) from error


def joined() -> bool:
    """Whether this process is one of several (loads nothing)."""
    return 'jax' in sys.modules and sys.modules['jax'].distributed.is_initialized()


def loss_of_a_process(error: Exception) -> str | None:
    """What to say of an error that another process's end has caused; None for all other errors."""
    if not joined():
        return None
    kind = sys.modules['jax'].errors.JaxRuntimeError
    if not isinstance(error, kind) or not _LOST.search(str(error)) or _NEVER_MET.search(str(error)):
        return None
    reason = str(error).strip().partition('\n')[0][:200]
    return (
        f'another process of this run has ended or cannot be reached ({reason}); its own output says why. The same '
        'command on all hosts goes on from the last checkpoint'
    )


def leave(status: int) -> int:
    """The end of a process that has failed and has said why.

    Of several, none waits for the others, which may hang in what they wanted to compute together: when this one is
    gone, JAX ends them. All that failed alike have the time to say so.

    Returns:
        The status, if this process is the only one; else it does not return.
    """
    if joined():
        sys.stdout.flush()
        sys.stderr.flush()
        time.sleep(PATIENCE)
        os._exit(status)
    return status


def _several(environment: os._Environ | dict[str, str]) -> bool:
    """Whether the environment, as SLURM, Open MPI and Cloud TPU make it, is of one of several processes."""
    for count in ('SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE'):
        if environment.get(count, '1') not in ('', '1'):
            return True
    hosts = ('TPU_WORKER_HOSTNAMES', 'TPU_PROCESS_ADDRESSES')
    named = ('JAX_COORDINATOR_ADDRESS', 'MEGASCALE_COORDINATOR_ADDRESS')
    return any(',' in environment.get(name, '') for name in hosts) or any(environment.get(name) for name in named)


def _has_tpu() -> bool:
    """Whether JAX would look for TPUs here, and there may be some (starts no backend)."""
    return importlib.util.find_spec('libtpu') is not None and any(glob.glob(chips) for chips in _TPU_CHIPS)


def _tpu_hosts() -> list[str]:
    """The hosts of the Cloud TPU slice that this machine belongs to; none where there is no such slice.

    A virtual machine with TPUs has nothing of it in its environment, but where JAX is started by Kubernetes.
    """
    if not _has_tpu():
        return []
    server = http.client.HTTPConnection(os.environ.get('GCE_METADATA_IP', _METADATA), timeout=_METADATA_PATIENCE)
    try:
        server.request('GET', _SLICE_HOSTS, headers={'Metadata-Flavor': 'Google'})
        answer = server.getresponse()
        return answer.read().decode().split(',') if answer.status == http.HTTPStatus.OK else []
    except OSError:  # no machine of Google's
        return []
    finally:
        server.close()
