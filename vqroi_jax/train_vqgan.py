"""The command `vqgan`: trains stage 1 on a cohort's ROIs and shows what it reconstructs of held-out patients.

cohort -> prepared ROIs -> batches -> [the loop: step, validation, figures, checkpoints] -> a run's folder
"""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from clu import parameter_overview
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from vqroi_jax import viz
from vqroi_jax.data import pipeline
from vqroi_jax.metrics import reconstruction
from vqroi_jax.metrics.ssim import ssim
from vqroi_jax.models import quantizer
from vqroi_jax.prepare import prepare
from vqroi_jax.training import loop, partitioning, vqgan
from vqroi_jax.training.metric_writers import METRICS_FILE, read_metrics
from vqroi_jax.workdir import is_primary, open_workdir

COLLAPSED = 0.02  # share of the codes: a perplexity below it is a codebook that has collapsed


def run(config: ConfigDict, workdir: str | Path) -> None:
    """Runs `--config=configs/vqgan.py`."""
    with open_workdir(workdir, config) as folder:
        train(config, folder)


def train(config: ConfigDict, folder: Path) -> None:
    """Trains, or goes on training, in an opened workdir.

    Args:
        config: as `configs/vqgan.py` has it.
        folder: the run's; the prepared cohort goes to its subfolder `cohort`, unless `data.path` is one.

    Raises:
        InputError: a setting or the cohort cannot be used; before anything is compiled.
    """
    vqgan.check_sizes(config)
    mesh = partitioning.make_mesh(config.mesh.data)
    partitioning.check_batch('batch_size', config.batch_size, config.micro_batches, mesh)
    partitioning.check_batch('eval_batch_size', config.eval_batch_size, 1, mesh)
    cohort = open_cohort(config, folder / 'cohort')
    here = {'process_index': jax.process_index(), 'process_count': jax.process_count()}
    batches = pipeline.Batches(cohort.split('train'), config.batch_size, config.seed, **here)
    recipe = vqgan.make_recipe(config, len(cohort.classes), batches.steps_per_epoch)
    state = vqgan.create_state(recipe, mesh)
    if is_primary():
        overview = parameter_overview.get_parameter_overview(state.params, include_stats=False)
        (folder / 'parameters.txt').write_text(f'{overview}\n', encoding='utf-8')
        print(
            f'Stage 1: {parameter_overview.count_parameters(state.params):,} parameters and '
            f'{parameter_overview.count_parameters(state.discriminator):,} of the discriminator on '
            f'{mesh.devices.size} {mesh.devices.flat[0].platform} device(s); '
            f'{batches.steps_per_epoch:g} steps an epoch.'
        )

    held_out = cohort.split('val')
    if not len(held_out):
        print('warning: no held-out patients, so no validation and no best checkpoint; figures show training ROIs')

    def put_batch(batch):
        return partitioning.put_batch(batch, mesh)

    def before_step(step: int, state: vqgan.VQGANState) -> vqgan.VQGANState:
        if step != recipe.warmup_steps:
            return state
        first = [put_batch(batches.batch_at(step + n)) for n in range(config.codebook.init_batches)]
        return vqgan.initialise_codebook(recipe, state, first, mesh)

    task = loop.TrainingTask(
        state=state,
        train_step=vqgan.make_train_step(recipe, mesh),
        batches=batches,
        put_batch=put_batch,
        evaluate=make_evaluation(recipe, cohort, mesh) if len(held_out) else None,
        figures=make_figures(recipe, cohort, 'val' if len(held_out) else 'train', mesh),
        before_step=before_step,
        warn=lambda metrics: _codebook_warnings(metrics, config.codebook.codes),
        headline=('loss', 'l1', 'perplexity'),
    )
    loop.train(task, config.training, folder)
    if is_primary():
        viz.save_figure(viz.curves(read_metrics(folder / METRICS_FILE)), folder / 'figures' / 'curves.png')


def open_cohort(config: ConfigDict, folder: Path) -> pipeline.PreparedCohort:
    """The prepared cohort of a training config; of several hosts, the primary prepares it and the others wait."""
    if is_primary():
        cohort = prepare(config.data, folder)
        folder = cohort.folder
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices('cohort prepared')
        prepared = Path(config.data.path).expanduser() if config.data.path else folder
        cohort = pipeline.open_cohort(prepared if pipeline.is_prepared(prepared) else folder)
    return cohort


def make_evaluation(
    recipe: vqgan.Recipe, cohort: pipeline.PreparedCohort, mesh: Mesh, split: str = 'val'
) -> Callable[[vqgan.VQGANState], dict[str, float]]:
    """A function that measures reconstructions of a whole split.

    The figures are means over patients, in all and by class (`val/psnr/HGG`): `l1`, `psnr` over the whole ROI (peak 2),
    `psnr_box` over the tumour's box, `ssim`, and the auxiliary classifier's `accuracy`; and over all tokens
    `perplexity` and `live_codes` (share of the codes that occur).
    """
    source, classes = cohort.split(split), len(cohort.classes)

    def sums(variables, batch):
        volume, weight = batch['volume'], batch['weight']
        trunk = recipe.model.apply(variables, volume, jnp.asarray(True), method='trunk')
        fake = recipe.model.apply(variables, trunk.features, method='head')
        of_sample = {
            'l1': reconstruction.l1(fake, volume),
            'psnr': reconstruction.psnr(fake, volume, jnp.ones_like(volume, bool)),
            'psnr_box': reconstruction.psnr(fake, volume, reconstruction.tumour_box(volume)),
            'ssim': ssim(fake, volume),
            'accuracy': (jnp.argmax(trunk.logits, -1) == batch['label']).astype(jnp.float32),
        }
        member = jax.nn.one_hot(batch['label'], classes) * weight[:, None]  # [B, classes]
        tokens = jax.nn.one_hot(trunk.tokens, recipe.model.codes) * weight[:, None, None, None, None]
        by_class = {name: jnp.einsum('b,bc->c', values, member) for name, values in of_sample.items()}
        return by_class, member.sum(axis=0), tokens.sum(axis=(0, 1, 2, 3))

    sums = jax.jit(sums, out_shardings=partitioning.replicated(mesh))

    def evaluate(state: vqgan.VQGANState) -> dict[str, float]:
        variables, total = vqgan.evaluation_variables(state), None
        for batch in pipeline.eval_batches(
            source,
            recipe.settings.eval_batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        ):
            part = jax.device_get(sums(variables, partitioning.put_batch(batch, mesh)))
            total = part if total is None else jax.tree.map(np.add, total, part)
        by_class, patients, tokens = total
        figures = {f'{split}/{name}': float(values.sum() / patients.sum()) for name, values in by_class.items()}
        for number, label in enumerate(cohort.classes):
            if patients[number]:
                figures |= {
                    f'{split}/{name}/{label}': float(values[number] / patients[number])
                    for name, values in by_class.items()
                }
        figures[f'{split}/perplexity'] = float(quantizer.perplexity(tokens))
        figures[f'{split}/live_codes'] = float(np.mean(tokens > 0))
        return figures

    return evaluate


def make_figures(
    recipe: vqgan.Recipe, cohort: pipeline.PreparedCohort, split: str, mesh: Mesh
) -> Callable[[vqgan.VQGANState], dict[str, Figure]]:
    """A function that draws the reconstructions of the first few ROIs of a split, evenly from its classes."""
    source = cohort.split(split)
    order = np.argsort([np.sum(source.labels[:i] == label) for i, label in enumerate(source.labels)], kind='stable')
    shown = np.sort(order[: recipe.settings.figure_rois])
    volumes = np.stack([source.volume(i) for i in shown])
    labels = [cohort.classes[source.labels[i]] for i in shown]
    ids = [source.ids[i] for i in shown]

    def look(variables, volume):
        trunk = recipe.model.apply(variables, volume, jnp.asarray(True), method='trunk')
        return recipe.model.apply(variables, trunk.features, method='head'), trunk.scores

    look = jax.jit(look, out_shardings=partitioning.replicated(mesh))

    def figures(state: vqgan.VQGANState) -> dict[str, Figure]:
        # One ROI at a time: as many as are shown need not divide by the devices.
        pairs = [jax.device_get(look(vqgan.evaluation_variables(state), volume[None])) for volume in volumes]
        fakes, scores = (np.concatenate(part) for part in zip(*pairs, strict=True))
        return {'reconstructions': viz.reconstructions(volumes[..., 0], fakes[..., 0], scores, labels, ids)}

    return figures


def _codebook_warnings(metrics: dict[str, float], codes: int) -> list[str]:
    """What the run's owner should know of the codebook."""
    if metrics['perplexity'] >= max(2.0, COLLAPSED * codes):
        return []
    return [
        f'the codebook has collapsed: {metrics["perplexity"]:.1f} of {codes} codes are effectively in use and '
        f'{metrics["dead_codes"]:.0%} are dead; try codebook.warmup, codebook.init_batches and codebook.restart_every'
    ]
