"""Which of several processes this is: what the command line and the environment say, and runs of several."""

import copy
import http.server
import pathlib
import runpy
import shutil
import socket
import sys
import threading

import jax
import numpy as np
import pytest

from vqroi_jax import hosts, main, train_transformer, train_vqgan
from vqroi_jax.errors import InputError
from vqroi_jax.prepare import prepare
from vqroi_jax.training.checkpoints import read_checkpoint, saved_steps
from vqroi_jax.training.metric_writers import read_metrics

CONFIGS = pathlib.Path(__file__).parents[1] / 'configs'
SEVERAL = {
    'srun': {'SLURM_STEP_NUM_TASKS': '4'},
    'mpirun': {'OMPI_COMM_WORLD_SIZE': '2'},
    'TPU pod': {'TPU_WORKER_HOSTNAMES': 'a,b'},
    'TPU slices': {'MEGASCALE_COORDINATOR_ADDRESS': 'a:80'},
    'asked of JAX': {'JAX_COORDINATOR_ADDRESS': 'a:80'},
}


ENCODING = """
import sys
from vqroi_jax import hosts
hosts.join(sys.argv[-1].removeprefix('--hosts='), 'transformer')
import jax
import numpy as np
from vqroi_jax.data import pipeline
from vqroi_jax.tokens import encode_cohort, find_cohort
from vqroi_jax.trained import load_vqgan
from vqroi_jax.training import partitioning
volume, read = pipeline.RoiSource.volume, []
pipeline.RoiSource.volume = lambda source, index: read.append(index) or volume(source, index)
vqgan = load_vqgan(f'{sys.argv[1]}/{jax.process_index()}')
mesh = partitioning.make_mesh({'data': -1})
rows = np.arange(40).reshape(8, 5)
split = partitioning.put_rows(lambda row: rows[row], rows.shape, mesh)
for partitioning.GATHERED in (2**28, 3 * rows[0].nbytes, 1):  # at once, by three rows and by one
    np.testing.assert_array_equal(partitioning.gather(split), rows)
sources = encode_cohort(vqgan, find_cohort(vqgan, ''), mesh)
print(len(read), sources['train'].tokens.sum())
"""


@pytest.fixture
def joined(monkeypatch):
    """What JAX was asked to join, with nothing in the environment."""
    for names in SEVERAL.values():
        for name in names:
            monkeypatch.delenv(name, raising=False)
    calls = []
    monkeypatch.setattr(jax.distributed, 'initialize', lambda **settings: calls.append(settings))
    return calls


def test_a_process_is_alone_by_default_and_one_of_those_that_the_command_line_names(joined):
    hosts.join('', 'vqgan')
    hosts.join('none', 'vqgan')
    assert joined == []
    hosts.join('10.0.0.1:1234,4,3', 'vqgan')
    assert joined.pop() == {
        'coordinator_address': '10.0.0.1:1234',
        'num_processes': 4,
        'process_id': 3,
        'cluster_detection_method': 'deactivate',
        'heartbeat_timeout_seconds': hosts.HEARTBEAT,
    }
    hosts.join('auto', 'transformer')
    assert joined == [{'heartbeat_timeout_seconds': hosts.HEARTBEAT}]


@pytest.mark.parametrize('environment', SEVERAL.values(), ids=SEVERAL)
def test_several_processes_are_known_by_their_environment(environment, joined, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    hosts.join('none', 'vqgan')
    assert joined == []
    hosts.join('', 'vqgan')
    assert joined == [{'heartbeat_timeout_seconds': hosts.HEARTBEAT}]


@pytest.mark.parametrize('environment', [{'SLURM_STEP_NUM_TASKS': '1'}, {'TPU_WORKER_HOSTNAMES': 'localhost'}], ids=str)
def test_one_process_of_a_cluster_is_alone(environment, joined, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    hosts.join('', 'vqgan')
    assert joined == []


class _Metadata(http.server.BaseHTTPRequestHandler):
    """What Google's metadata server says on a machine of a slice of so many hosts; None: of none."""

    hosts: int | None = None

    def do_GET(self):
        known = self.hosts and self.path == '/computeMetadata/v1/instance/attributes/worker-network-endpoints'
        self.send_response(200 if known and self.headers['Metadata-Flavor'] == 'Google' else 404)
        self.end_headers()
        self.wfile.write(','.join(f'unknown:unknown:10.0.0.{host}' for host in range(self.hosts or 1)).encode())

    def log_message(self, *unused):
        pass


@pytest.mark.parametrize(('number', 'together'), [(None, False), (1, False), (4, True)])
def test_hosts_of_a_tpu_slice_are_known_by_the_metadata(number, together, joined, monkeypatch):
    monkeypatch.setattr(_Metadata, 'hosts', number)
    with http.server.HTTPServer(('127.0.0.1', 0), _Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv('GCE_METADATA_IP', f'127.0.0.1:{server.server_port}')
        hosts.join('', 'vqgan')  # a machine without TPUs does not even ask
        assert joined == []
        monkeypatch.setattr(hosts, '_has_tpu', lambda: True)
        hosts.join('none', 'vqgan')
        assert joined == []
        hosts.join('', 'vqgan')
        server.shutdown()
    assert joined == [{'heartbeat_timeout_seconds': hosts.HEARTBEAT}] * together


def test_a_tpu_without_googles_metadata_is_alone(joined, monkeypatch):
    with socket.socket() as closed:
        closed.bind(('127.0.0.1', 0))
        monkeypatch.setenv('GCE_METADATA_IP', f'127.0.0.1:{closed.getsockname()[1]}')
    monkeypatch.setattr(hosts, '_has_tpu', lambda: True)
    hosts.join('', 'vqgan')
    assert joined == []


@pytest.mark.parametrize('text', ['10.0.0.1', '10.0.0.1:1,4', '10.0.0.1:1,4,4', '10.0.0.1:1,4,-1', ':1,2,0', 'all'])
def test_what_names_no_process_is_refused(text, joined):
    with pytest.raises(InputError, match=f'--hosts={text}: expected .* ADDRESS:PORT,NUMBER,INDEX'):
        hosts.join(text, 'vqgan')
    assert joined == []


@pytest.mark.parametrize('task', ['prepare', 'demo', 'export', 'evaluate', 'convert', 'plan'])
def test_tasks_of_one_process_are_refused_to_several(task, joined):
    assert task in main.TASKS
    hosts.join('', task)
    with pytest.raises(InputError, match=f"the task '{task}' runs in one process"):
        hosts.join('10.0.0.1:1,2,0', task)
    assert joined == []


def test_processes_that_do_not_find_each_other_are_told(joined, monkeypatch):
    def fail(**settings):
        raise ValueError('coordinator_address should be defined.\nMore.')

    monkeypatch.setattr(jax.distributed, 'initialize', fail)
    with pytest.raises(InputError, match=r'did not find each other \(coordinator_address should be defined\.\)'):
        hosts.join('auto', 'vqgan')


def test_only_errors_of_a_lost_process_are_told_as_such(monkeypatch):
    lost = jax.errors.JaxRuntimeError('UNKNOWN: Gloo all-reduce failed: Connection reset by peer\nmore')
    assert hosts.loss_of_a_process(lost) is None  # there are no others
    monkeypatch.setattr(hosts, 'joined', lambda: True)
    assert 'another process of this run has ended' in hosts.loss_of_a_process(lost)
    assert 'more' not in hosts.loss_of_a_process(lost)
    assert hosts.loss_of_a_process(jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory')) is None
    assert hosts.loss_of_a_process(ValueError('connection closed')) is None
    late = 'Gloo context initialization failed: DEADLINE_EXCEEDED: GetKeyValue() timed out with key: cpu'
    assert hosts.loss_of_a_process(jax.errors.JaxRuntimeError(late)) is None


def command_of(config, folder, workdir):
    """The command line of a config, through a config file of its own."""
    path = folder / f'{workdir.name}.py'
    path.write_text(
        f'import ml_collections\n\ndef get_config():\n    return ml_collections.ConfigDict({config.to_dict()})\n'
    )
    return [sys.executable, '-m', 'vqroi_jax.main', f'--config={path}', f'--workdir={workdir}']


def run_together(processes):
    """What the first process prints."""
    outputs = [process.communicate(timeout=900)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    return outputs[0]


def assert_same_losses(folder, other, relative):
    together, alone = (read_metrics(path / 'metrics.jsonl') for path in (folder, other))
    assert [row['step'] for row in together] == [row['step'] for row in alone]
    names = [name for name in set().union(*alone) if name.endswith(('/loss', '/l1', '/cross_entropy'))]
    assert len(names) > 1
    for name in names:
        values = [[row[name] for row in rows if name in row] for rows in (together, alone)]
        assert values[0] == pytest.approx(values[1], rel=relative), name


def parameters(folder):
    return jax.tree.leaves(read_checkpoint(folder, ['params'])[1])


def forget_the_end(folder):
    """Makes a finished run of 8 steps one that was lost after its checkpoint of step 4."""
    assert saved_steps(folder) == [4, 8]
    shutil.rmtree(folder / 'checkpoints' / '8')


@pytest.fixture(scope='module')
def stage1(tmp_path_factory):
    """A config of stage 1, and the folder of its run in this process, on one device."""
    folder = tmp_path_factory.mktemp('stage1')
    config = runpy.run_path(str(CONFIGS / 'vqgan.py'))['get_config']('smoke')
    config.data.phantom.update(patients=5, spacing=8.0)
    config.data.roi_size = (16, 16, 16)
    config.data.split.val = config.data.split.test = 1.0
    prepare(config.data, folder / 'cohort')
    config.data.path = str(folder / 'cohort')
    config.model.channels = config.discriminator.channels = (8,)
    config.model.encoder_res_blocks = config.model.decoder_res_blocks = (0,)
    config.mesh.data = 1
    config.batch_size = config.eval_batch_size = 4
    config.ema_decay = 0.9
    config.optimizer.learning_rate = 1e-4
    config.losses.adversarial_start = '6 steps'
    config.training.duration = config.training.figures_every = '8 steps'
    config.training.eval_every = config.training.checkpoint_every = '4 steps'
    train_vqgan.run(config, folder / 'alone')
    return config, folder / 'alone'


@pytest.mark.long
@pytest.mark.parametrize(
    ('number', 'devices', 'mesh'),
    [
        (2, 1, {'data': 2}),
        (4, 1, {'data': 2, 'fsdp': 2}),
        (4, 2, {'data': 2, 'spatial': 4}),  # each volume reaches over two processes
    ],
)
def test_stage_1_in_several_processes_is_the_run_of_one(number, devices, mesh, stage1, several_processes, tmp_path):
    config, alone = copy.deepcopy(stage1[0]), stage1[1]
    config.mesh.update(mesh)
    together = tmp_path / 'together'
    command = command_of(config, tmp_path, together)
    output = run_together(several_processes(command, number, devices))
    assert f'on {number * devices} cpu device(s)' in output
    assert_same_losses(together, alone, 1e-3)
    assert (together / 'figures').is_dir()
    if number > 2:
        return

    # Gone on with from its middle on the same layout, it ends in the same bits; on another one, near.
    before = parameters(together)
    forget_the_end(together)
    run_together(several_processes(command, number, devices))
    jax.tree.map(np.testing.assert_array_equal, parameters(together), before)
    forget_the_end(together)
    train_vqgan.run(stage1[0], together)
    assert_same_losses(together, alone, 1e-3)


@pytest.mark.long
def test_stage_2_in_several_processes_is_the_run_of_one(tiny_transformer_config, several_processes, tmp_path):
    changes = {'optimizer.learning_rate': 1e-4, 'sampling.sub_batch': 1}
    train_transformer.run(tiny_transformer_config(**{'mesh.data': 1}, **changes), tmp_path / 'alone')
    config = tiny_transformer_config(**{'mesh.data': 1, 'mesh.fsdp': 2, 'mesh.model': 2}, **changes)
    output = run_together(several_processes(command_of(config, tmp_path, tmp_path / 'together'), 2, 2))
    assert 'on 4 cpu device(s)' in output
    assert_same_losses(tmp_path / 'together', tmp_path / 'alone', 1e-3)
    assert (tmp_path / 'together' / 'figures' / 'masking.png').is_file()


@pytest.mark.long
def test_tokens_that_not_all_processes_see_are_made_by_all_each_from_its_own_rois(
    tiny_vqgan, several_processes, tmp_path
):
    for index in range(2):
        shutil.copytree(tiny_vqgan, tmp_path / str(index), ignore=shutil.ignore_patterns('tokens'))
    command = [sys.executable, '-c', ENCODING, tmp_path]
    first = [process.communicate(timeout=900)[0] for process in several_processes(command, 2, 1)]
    assert [output.splitlines()[-1].split()[0] for output in first] == ['5', '5'], first  # of 6, 2 and 2
    assert len(list((tmp_path / '0' / 'tokens').iterdir())) == 1  # the primary process has them; the other does not
    again = [process.communicate(timeout=900)[0] for process in several_processes(command, 2, 1)]
    assert {output.splitlines()[-1] for output in again} == {first[0].splitlines()[-1]}, again
    shutil.copytree(tmp_path / '0' / 'tokens', tmp_path / '1' / 'tokens')
    third = [process.communicate(timeout=900)[0] for process in several_processes(command, 2, 1)]
    assert [output.splitlines()[-1].split()[0] for output in third] == ['0', '0'], third
