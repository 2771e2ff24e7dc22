"""The smallest task that the loop can train: linear regression on eight voxels, sharded over all devices.

Tests import it; run as a program it is `python -m vqroi_jax.main` that knows one task more:

    python tests/training/toy_task.py --config=CONFIG --workdir=DIR
"""

import os
import signal
import sys
import time

import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from matplotlib.figure import Figure

from vqroi_jax import main
from vqroi_jax.data.pipeline import Batches
from vqroi_jax.training import loop, partitioning
from vqroi_jax.workdir import open_workdir

PATIENTS = 20
BATCH = 8
RATE = 0.02


@flax.struct.dataclass
class ToyState:
    step: jax.Array  # int32 []
    params: dict[str, jax.Array]  # weights float32 [8], bias float32 []
    momentum: dict[str, jax.Array]  # as params


class Source:
    """Volumes of 2³ voxels; class 1 is brighter. What `vqroi_jax.data.pipeline.RoiSource` is to `Batches`."""

    name = 'train'

    def __init__(self, poisoned=()):
        rng = np.random.default_rng(0)
        self.labels = np.arange(PATIENTS, dtype=np.int32) % 2
        self.volumes = rng.normal(self.labels[:, None], 1, (PATIENTS, 8)).astype(np.float32).reshape(-1, 2, 2, 2, 1)
        self.volumes[list(poisoned)] = np.nan
        self.ids = tuple(f'patient_{number:02d}' for number in range(PATIENTS))

    def __len__(self):
        return PATIENTS

    def load(self, index):
        return {'volume': self.volumes[index], 'label': self.labels[index], 'index': index.astype(np.int32)}


def training_config(**changes):
    """The loop's block of a config."""
    return ml_collections.ConfigDict(
        {
            'duration': '50 steps',
            'log_every': '10 steps',
            'eval_every': '20 steps',
            'figures_every': '25 steps',
            'checkpoint_every': '20 steps',
            'keep_last': 2,
            'keep_best': 1,
            'best_metric': 'val/loss',
            'best_mode': 'min',
            'on_nonfinite': 'stop',
            **changes,
        }
    )


def get_config():
    """A whole config, for the command line."""
    return ml_collections.ConfigDict({'task': 'toy', 'terminate_at': -1, 'delay': 0.0, 'training': training_config()})


def loss_of(params, batch):
    prediction = batch['volume'].reshape(-1, 8) @ params['weights'] + params['bias']
    return jnp.mean((prediction - batch['label']) ** 2)


evaluate = jax.jit(loss_of)


def step(state, batch):
    """Gradient descent with momentum; nothing but the step moves where the loss is not finite."""
    loss, gradient = jax.value_and_grad(loss_of)(state.params, batch)
    momentum = jax.tree.map(lambda m, g: 0.9 * m + g, state.momentum, gradient)
    params = jax.tree.map(lambda p, m: p - RATE * m, state.params, momentum)
    finite = jnp.isfinite(loss)
    params, momentum = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old), (params, momentum), (state.params, state.momentum)
    )
    metrics = {'loss': loss, 'bias': state.params['bias'], 'finite': finite}
    return ToyState(state.step + 1, params, momentum), metrics


halve = jax.jit(lambda params: jax.tree.map(lambda p: p / 2, params))


def before_step(done, state):
    """Something that happens once, outside of the step."""
    return state.replace(params=halve(state.params)) if done == 12 else state


def make_task(source=None, **changes):
    """A fresh task over all devices."""
    source = source or Source()
    mesh = jax.make_mesh((jax.device_count(),), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
    whole, rows = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec('data'))
    params = {'weights': jnp.zeros(8), 'bias': jnp.zeros(())}
    state = jax.device_put(ToyState(jnp.int32(0), params, jax.tree.map(jnp.zeros_like, params)), whole)
    all_patients = {'volume': source.volumes, 'label': source.labels}
    processes = {'process_index': jax.process_index(), 'process_count': jax.process_count()}

    def put_batch(batch):
        return {key: jax.make_array_from_process_local_data(rows, batch[key]) for key in ('volume', 'label')}

    def figures(state):
        drawing = Figure(figsize=(1, 1))
        drawing.subplots().bar(np.arange(8), np.asarray(state.params['weights']))
        return {'weights': drawing}

    defaults = {
        'shapes': partitioning.placed_shapes(state, whole),
        'create': lambda: state,
        'train_step': jax.jit(step, donate_argnums=0),
        'batches': Batches(source, BATCH, seed=0, prefetch=1, **processes),
        'put_batch': put_batch,
        'evaluate': lambda state: {'val/loss': float(evaluate(state.params, all_patients))},
        'figures': figures,
        'before_step': before_step,
        'headline': ('loss',),
        'evaluated': ('val/loss',),
    }
    return loop.TrainingTask(**{**defaults, **changes})


def run(config, workdir):
    """Trains, each step after `delay` seconds; in step `terminate_at` the process sends itself SIGTERM, once."""
    task = make_task()
    put, calls = task.put_batch, []

    def put_batch(batch):
        calls.append(batch)
        time.sleep(config.delay)
        if len(calls) == config.terminate_at and not (folder / 'terminated').exists():
            (folder / 'terminated').touch()
            os.kill(os.getpid(), signal.SIGTERM)
        return put(batch)

    task.put_batch = put_batch
    with open_workdir(workdir, config) as folder:
        loop.train(task, config.training, folder)


if __name__ == '__main__':
    main.TASKS['toy'] = 'toy_task'
    sys.exit(main.main(sys.argv))
