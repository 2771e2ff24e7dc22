"""The command `vqgan`: trains stage 1 on a cohort's ROIs and shows what it reconstructs of held-out patients.

cohort -> prepared ROIs -> batches -> [the loop: step, validation, figures, checkpoints] -> a run's folder
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from clu import parameter_overview
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from vqroi_jax import model_card, viz
from vqroi_jax.data import pipeline
from vqroi_jax.data.learnt_from import LearntFrom
from vqroi_jax.metrics import reconstruction as metrics
from vqroi_jax.metrics.ssim import scales, ssim
from vqroi_jax.models import quantizer
from vqroi_jax.prepare import prepare
from vqroi_jax.trained import TrainingRois, check_trainable
from vqroi_jax.training import loop, partitioning, vqgan
from vqroi_jax.training.checkpoints import CHECKPOINTS_FOLDER, saved_steps
from vqroi_jax.workdir import COHORT_FOLDER, is_primary, open_workdir

MEASURED = ('l1', 'psnr', 'psnr_box', 'ssim', 'accuracy')  # of each held-out ROI
COLLAPSED = 0.02  # share of the codes: a perplexity below it is a codebook that has collapsed


def run(config: ConfigDict, workdir: str | Path) -> None:
    """Runs `--config=configs/vqgan.py`."""
    check_trainable(workdir, 'discriminator')
    with open_workdir(workdir, config, goes_on_from=CHECKPOINTS_FOLDER) as folder:
        train(config, folder)


def train(config: ConfigDict, folder: Path) -> None:
    """Trains, or goes on training, in an opened workdir.

    Args:
        config: as `configs/vqgan.py` has it.
        folder: the run's; the prepared cohort goes to its subfolder `cohort`, unless `data.path` is one.

    Raises:
        InputError: a setting or the cohort cannot be used; before anything is compiled.
    """
    vqgan.check_settings(config)
    mesh = partitioning.make_mesh(config.mesh)
    vqgan.check_mesh(config, mesh)
    partitioning.check_batch('batch_size', config.batch_size, config.micro_batches, mesh)
    cohort = open_cohort(config, folder / COHORT_FOLDER)
    batches = pipeline.Batches(cohort.split('train'), config.batch_size, config.seed, **partitioning.this_process(mesh))
    pipeline.check_classes(cohort.split('train'), cohort.classes)
    evaluated = evaluated_names(cohort)
    loop.Schedule.read(config.training, batches.steps_per_epoch, evaluated)
    recipe = vqgan.make_recipe(config, len(cohort.classes), batches.steps_per_epoch)
    if config.print_shardings:
        if is_primary():
            print(partitioning.shardings_table(vqgan.state_shapes(recipe), mesh))
        return
    if is_primary():
        scans, begun = cohort.report['scans'], bool(saved_steps(folder))
        LearntFrom.of_scans(scans).record(folder, begun)
        TrainingRois.of_scans(scans).record(folder, begun)
    shapes = partitioning.placed_state(vqgan.state_shapes(recipe), mesh)
    if is_primary():
        loop.write_parameters(folder, shapes.params)
        print(
            f'Stage 1: {parameter_overview.count_parameters(shapes.params):,} parameters and '
            f'{parameter_overview.count_parameters(shapes.discriminator):,} of the discriminator on '
            f'{mesh.devices.size} {mesh.devices.flat[0].platform} device(s); '
            f'{batches.steps_per_epoch:g} steps an epoch.'
        )

    describe = model_card.keep(folder, config, cohort, batches.steps_per_epoch, shapes.params)
    held_out = cohort.split('val')
    if not len(held_out) and is_primary():
        print('warning: no held-out patients, so no validation and no best checkpoint; figures show training ROIs')

    def put_batch(batch):
        return partitioning.put_batch(batch, mesh)

    def before_step(step: int, state: vqgan.VQGANState) -> vqgan.VQGANState:
        if step != recipe.warmup_steps:
            return state
        first = [put_batch(batches.batch_at(step + n)) for n in range(config.codebook.init_batches)]
        return vqgan.initialise_codebook(recipe, state, first, mesh)

    look = make_look(recipe, mesh)
    task = loop.TrainingTask(
        shapes=shapes,
        create=lambda: vqgan.create_state(recipe, mesh),
        train_step=vqgan.make_train_step(recipe, shapes, mesh),
        batches=batches,
        put_batch=put_batch,
        evaluate=make_evaluation(recipe, look, cohort, mesh) if len(held_out) else None,
        figures=make_figures(recipe, look, cohort, 'val' if len(held_out) else 'train', mesh),
        before_step=before_step,
        describe=describe,
        warn=lambda metrics: _codebook_warnings(metrics, config.codebook.codes),
        headline=('loss', 'l1', 'perplexity'),
        evaluated=evaluated,
    )
    loop.train(task, config.training, folder)


def open_cohort(config: ConfigDict, folder: Path) -> pipeline.PreparedCohort:
    """The prepared cohort of a training config; of several hosts, the primary prepares it and the others wait."""
    if jax.process_count() > 1:
        # The processes' first connection times out within half a minute on CPUs, which preparing may take longer than.
        multihost_utils.sync_global_devices('cohort wanted')
    if is_primary():
        cohort = prepare(config.data, folder)
        folder = cohort.folder
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices('cohort prepared')
        prepared = Path(config.data.path).expanduser() if config.data.path else folder
        cohort = pipeline.open_cohort(prepared if pipeline.is_prepared(prepared) else folder)
    return cohort


class Seen(NamedTuple):
    """What a trained stage 1 makes of a batch of volumes."""

    reconstruction: jax.Array  # float32 [B, D, H, W, 1]
    tokens: jax.Array  # int32 [B, d, h, w]
    scores: jax.Array  # float32 [B, d, h, w]
    logits: jax.Array  # float32 [B, classes]


def make_look(recipe: vqgan.Recipe, mesh: Mesh) -> Callable[[dict, jax.Array, np.bool_], Seen]:
    """The jitted forward pass that validation and figures share: to `Seen`, by rows.

    It is of variables, global volumes, and whether there is a codebook yet that quantises.
    """

    def look(variables: dict, volume: jax.Array, quantise: jax.Array) -> Seen:
        trunk = recipe.model.apply(variables, volume, quantise, method='trunk')
        reconstruction = recipe.model.apply(variables, trunk.features, method='head')
        return Seen(reconstruction, trunk.tokens, trunk.scores, trunk.logits)

    volumes, rows = partitioning.volume_sharding(mesh), partitioning.batch_sharding(mesh)
    return jax.jit(partitioning.traced_on(mesh, look), out_shardings=Seen._make((volumes, rows, rows, rows)))


def measured(roi_size: Sequence[int]) -> tuple[str, ...]:
    """What is measured of each held-out ROI: of `MEASURED` all but SSIM where its window finds no room."""
    return tuple(name for name in MEASURED if name != 'ssim' or scales(roi_size))


def evaluated_names(cohort: pipeline.PreparedCohort) -> tuple[str, ...]:
    """Names of what is evaluated on a cohort's held-out patients; none if there are none."""
    held_out = cohort.split('val')
    if not len(held_out):
        return ()
    ends = ('', *(f'/{cohort.classes[number]}' for number in np.unique(held_out.labels)))
    of_rois = (f'val/{name}{end}' for end in ends for name in measured(cohort.roi_size))
    return (*of_rois, 'val/perplexity', 'val/live_codes')


def make_evaluation(
    recipe: vqgan.Recipe,
    look: Callable[[dict, jax.Array, np.bool_], Seen],
    cohort: pipeline.PreparedCohort,
    mesh: Mesh,
) -> Callable[[vqgan.VQGANState], dict[str, float]]:
    """A function that measures the reconstructions of all held-out patients.

    The figures are means over patients, in all and by class (`val/psnr/HGG`): `l1`, `psnr` over the whole ROI (peak 2),
    `psnr_box` over the tumour's box, `ssim` where a side holds its window, and the auxiliary classifier's `accuracy`;
    and over all tokens `perplexity` and `live_codes` (share of the codes that occur). In the warm-up there are none.
    """
    source, classes = cohort.split('val'), len(cohort.classes)
    batch_size = partitioning.even_rows(recipe.settings.eval_batch_size, mesh)

    def sums(seen: Seen, batch: dict) -> tuple[dict, jax.Array, jax.Array]:
        volume, fake, weight = batch['volume'], seen.reconstruction, batch['weight']
        of_sample = {
            'l1': lambda: metrics.l1(fake, volume),
            'psnr': lambda: metrics.psnr(fake, volume, jnp.ones_like(volume, bool)),
            'psnr_box': lambda: metrics.psnr(fake, volume, metrics.tumour_box(volume)),
            'ssim': lambda: ssim(fake, volume),
            'accuracy': lambda: (jnp.argmax(seen.logits, -1) == batch['label']).astype(jnp.float32),
        }
        member = jax.nn.one_hot(batch['label'], classes) * weight[:, None]  # [B, classes]
        tokens = jax.nn.one_hot(seen.tokens, recipe.model.codes) * weight[:, None, None, None, None]
        by_class = {name: jnp.sum(of_sample[name]()[:, None] * member, axis=0) for name in measured(cohort.roi_size)}
        return by_class, member.sum(axis=0), tokens.sum(axis=(0, 1, 2, 3))

    sums = jax.jit(sums, out_shardings=partitioning.replicated(mesh))

    def evaluate(state: vqgan.VQGANState) -> dict[str, float]:
        if state.step <= recipe.warmup_steps:
            return {}
        variables, parts = vqgan.evaluation_variables(state), []
        for rows in pipeline.eval_batches(source, batch_size, **partitioning.this_process(mesh)):
            batch = partitioning.put_batch(rows, mesh)
            parts.append(jax.device_get(sums(look(variables, batch['volume'], np.True_), batch)))
        by_class, patients, tokens = jax.tree.map(lambda *values: np.sum(values, axis=0), *parts)
        figures = {f'val/{name}': float(values.sum() / patients.sum()) for name, values in by_class.items()}
        for number in np.flatnonzero(patients):
            label, count = cohort.classes[number], patients[number]
            figures |= {f'val/{name}/{label}': float(values[number] / count) for name, values in by_class.items()}
        figures['val/perplexity'] = float(quantizer.perplexity(tokens))
        figures['val/live_codes'] = float(np.mean(tokens > 0))
        return figures

    return evaluate


def make_figures(
    recipe: vqgan.Recipe,
    look: Callable[[dict, jax.Array, np.bool_], Seen],
    cohort: pipeline.PreparedCohort,
    split: str,
    mesh: Mesh,
) -> Callable[[vqgan.VQGANState], dict[str, Figure]]:
    """A function that draws the reconstructions of the first few ROIs of a split, evenly from its classes."""
    source, rows = cohort.split(split), partitioning.even_rows(recipe.settings.eval_batch_size, mesh)
    shown = pipeline.first_of_each_class(source.labels, recipe.settings.figure_rois)
    volumes = np.stack([source.volume(i) for i in shown])
    labels = [cohort.classes[source.labels[i]] for i in shown]
    ids = [source.ids[i] for i in shown]
    spacing = cohort.spacing(ids)
    first = list(range(0, len(shown), rows))
    padded = np.pad(volumes, [(0, len(first) * rows - len(shown)), *[(0, 0)] * 4], mode='edge')
    mine = pipeline.process_rows(rows, **partitioning.this_process(mesh))
    batches = [partitioning.put_batch({'volume': padded[i : i + rows][mine]}, mesh)['volume'] for i in first]

    def figures(state: vqgan.VQGANState) -> dict[str, Figure]:
        variables, quantise = vqgan.evaluation_variables(state), np.bool_(int(state.step) > recipe.warmup_steps)
        seen = [partitioning.gather(look(variables, volume, quantise)) for volume in batches]
        fakes, scores = (
            np.concatenate([getattr(one, name) for one in seen])[: len(shown)] for name in ('reconstruction', 'scores')
        )
        return {'reconstructions': viz.reconstructions(volumes[..., 0], fakes[..., 0], scores, labels, ids, spacing)}

    return figures


def _codebook_warnings(metrics: dict[str, float], codes: int) -> list[str]:
    """What the run's owner should know of the codebook, once it is in use."""
    if metrics['quantised'] < 1 or metrics['perplexity'] >= max(2.0, COLLAPSED * codes):
        return []
    return [
        f'the codebook has collapsed: {metrics["perplexity"]:.1f} of {codes} codes are effectively in use and '
        f'{metrics["dead_codes"]:.0%} are dead; try codebook.warmup, codebook.init_batches and codebook.restart_every'
    ]
