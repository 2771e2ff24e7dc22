"""The command `transformer`: trains stage 2 on the tokens of a cohort, and shows what it draws.

finished stage 1 -> tokens and scores -> batches -> [the loop: step, validation, figures, checkpoints] -> a run's folder
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from clu import parameter_overview
from jax.sharding import Mesh
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from vqroi_jax import masking, model_card, viz
from vqroi_jax.data import pipeline
from vqroi_jax.data.learnt_from import LearntFrom
from vqroi_jax.decoding import UNKNOWN
from vqroi_jax.errors import InputError
from vqroi_jax.tokens import TokenSource, encode_cohort, encode_mirrored, find_cohort
from vqroi_jax.trained import (
    STAGE1_FILE,
    Sampler,
    Stage1Facts,
    TrainedVQGAN,
    TrainingRois,
    check_finished,
    check_trainable,
    load_vqgan,
    rois_identity,
)
from vqroi_jax.training import loop, partitioning, transformer
from vqroi_jax.training.checkpoints import CHECKPOINTS_FOLDER, saved_steps
from vqroi_jax.workdir import CONFIG_FILE, is_primary, open_workdir, read_config

MEASURED = ('cross_entropy', 'perplexity', 'top1')  # of the held-out patients
MASKING_FIGURE = 'masking.png'


def run(config: ConfigDict, workdir: str | Path) -> None:
    """Runs `--config=configs/transformer.py`."""
    check_trainable(workdir, "state of stage 2's optimiser")
    free = ('vqgan_workdir',) if is_stage1_moved(config, Path(workdir)) else ()
    with open_workdir(workdir, config, free, goes_on_from=CHECKPOINTS_FOLDER) as folder:
        train(config, folder)


def is_stage1_moved(config: ConfigDict, workdir: Path) -> bool:
    """Whether a run that goes on is given another path to its stage 1; False for one that has not begun.

    Raises:
        InputError: what is at the other path is not the stage 1 that it began with.
    """
    if not all((workdir / name).exists() for name in (STAGE1_FILE, CONFIG_FILE)):
        return False
    if read_config(workdir).vqgan_workdir == config.vqgan_workdir:
        return False
    vqgan = load_vqgan(config.vqgan_workdir, config.vqgan_checkpoint)
    if vqgan.identity != Stage1Facts.read(workdir).identity:
        raise InputError(
            f'{vqgan.workdir} is not the stage 1 that {workdir} was started with: the weights of step {vqgan.step} '
            'differ; give --config.vqgan_workdir that one, or name another --workdir'
        )
    return True


def train(config: ConfigDict, folder: Path) -> None:
    """Trains, or goes on training, in an opened workdir.

    Args:
        config: as `configs/transformer.py` has it.
        folder: the run's.

    Raises:
        InputError: a setting, stage 1 or the cohort cannot be used; before anything is compiled.
    """
    transformer.check_settings(config)
    mesh = partitioning.make_mesh(config.mesh)
    transformer.check_mesh(config, mesh)
    partitioning.check_batch('batch_size', config.batch_size, config.micro_batches, mesh)
    vqgan = load_vqgan(config.vqgan_workdir, config.vqgan_checkpoint)
    cohort = find_cohort(vqgan, config.data.path)
    rois = cohort.split('train')
    check_finished(vqgan, config.vqgan_checkpoint, stage1_rois(vqgan))
    batch = pipeline.Batches(rois, config.batch_size, config.seed, **partitioning.this_process(mesh))
    pipeline.check_classes(rois, cohort.classes)
    evaluated = evaluated_names(cohort)
    loop.Schedule.read(config.training, batch.steps_per_epoch, evaluated)
    recipe = transformer.make_recipe(config, vqgan.model.codes, len(cohort.classes), vqgan.grid, batch.steps_per_epoch)
    if config.print_shardings:
        if is_primary():
            print(partitioning.shardings_table(transformer.state_shapes(recipe), mesh))
        return
    sampler = make_sampler(recipe, vqgan, mesh)
    same = rois_identity(cohort.report['scans'])
    facts = Stage1Facts.of(vqgan, cohort.classes, cohort.spacing(), cohort.report['synthetic'], same)
    if is_primary():
        begun = bool(saved_steps(folder))
        facts.record(folder, begun)
        LearntFrom.of_scans(cohort.report['scans']).record(folder, begun)

    sources = encode_cohort(vqgan, cohort, mesh)
    views = encode_mirrored(vqgan, cohort, config.augment.flip, mesh) if config.augment.flip else sources['train']
    batches = pipeline.Batches(views, config.batch_size, config.seed, **partitioning.this_process(mesh))
    shapes = partitioning.placed_state(transformer.state_shapes(recipe), mesh)
    if is_primary():
        loop.write_parameters(folder, shapes.params)
        print(
            f'Stage 2: {parameter_overview.count_parameters(shapes.params):,} parameters on '
            f'{mesh.devices.size} {mesh.devices.flat[0].platform} device(s); {recipe.masking.length} tokens of '
            f'{vqgan.model.codes} codes, {batches.steps_per_epoch:g} steps an epoch.'
        )
    describe = model_card.keep(folder, config, cohort, batches.steps_per_epoch, shapes.params, facts)
    held_out = sources['val']
    if not len(held_out) and is_primary():
        print('warning: no held-out patients, so no validation and no best checkpoint; figures show training ROIs')
    shown = 'val' if len(held_out) else 'train'
    if is_primary():
        viz.save_figure(masking_figure(recipe, sources[shown], cohort.classes), folder / 'figures' / MASKING_FIGURE)

    task = loop.TrainingTask(
        shapes=shapes,
        create=lambda: transformer.create_state(recipe, mesh),
        train_step=transformer.jit_step(recipe, shapes, mesh),
        batches=batches,
        put_batch=lambda rows: partitioning.put_batch(rows, mesh),
        evaluate=make_evaluation(recipe, held_out, cohort.classes, mesh) if len(held_out) else None,
        figures=make_figures(recipe, sampler, sources[shown], cohort),
        describe=describe,
        headline=('loss', 'top1'),
        evaluated=evaluated,
    )
    loop.train(task, config.training, folder)


def stage1_rois(vqgan: TrainedVQGAN) -> int | None:
    """How many ROIs stage 1 was trained on; None if that is not known.

    A run of before this was recorded is asked for its own cohort, which may be gone.
    """
    if recorded := TrainingRois.read(vqgan.workdir):
        return recorded.number
    try:
        return len(find_cohort(vqgan, '').split('train'))
    except InputError:
        return None


def evaluated_names(cohort: pipeline.PreparedCohort) -> tuple[str, ...]:
    """Names of what is evaluated on a cohort's held-out patients; none if there are none."""
    held_out = cohort.split('val')
    if not len(held_out):
        return ()
    ends = ('', *(f'/{cohort.classes[number]}' for number in np.unique(held_out.labels)))
    return tuple(f'val/{name}{end}' for end in ends for name in MEASURED)


def make_evaluation(
    recipe: transformer.Recipe, source: TokenSource, classes: tuple[str, ...], mesh: Mesh
) -> Callable[[transformer.TransformerState], dict[str, float]]:
    """A function that measures how well all held-out patients' tokens are told, each corrupted in one fixed way.

    In all and by class (`val/top1/HGG`): `cross_entropy` over the positions that count for the loss; its exponential,
    `perplexity`; and `top1`, the share of the corrupted tokens that are told exactly.
    """

    def sums(params: Any, batch: dict) -> dict[str, jax.Array]:
        key = jax.random.key(recipe.settings.seed)
        keys = jax.vmap(lambda index: jax.random.fold_in(key, index))(batch['index'])
        example = transformer.make_example(recipe, keys, batch['tokens'], batch['scores'], batch['label'])
        logits = transformer.token_logits(recipe, params, example.ids)
        told = jnp.take_along_axis(jax.nn.log_softmax(logits), example.target[..., None], axis=-1)[..., 0]
        right = (jnp.argmax(logits, axis=-1) == example.target) & example.corrupted
        member = jax.nn.one_hot(batch['label'], len(classes)) * batch['weight'][:, None]
        of_sample = {
            'cross_entropy': -jnp.sum(told * example.weight, axis=1),
            'counted': example.weight.sum(axis=1),
            'right': right.sum(axis=1),
            'corrupted': example.corrupted.sum(axis=1),
        }
        return {name: jnp.sum(values[:, None] * member, axis=0) for name, values in of_sample.items()}

    sums = jax.jit(partitioning.traced_on(mesh, sums), out_shardings=partitioning.replicated(mesh))
    batch_size = partitioning.even_rows(recipe.settings.eval_batch_size, mesh)

    def figures(total: dict[str, np.ndarray], end: str) -> dict[str, float]:
        cross_entropy = float(total['cross_entropy'] / max(total['counted'], 1.0))
        values = cross_entropy, float(np.exp(cross_entropy)), float(total['right'] / max(total['corrupted'], 1.0))
        return {f'val/{name}{end}': value for name, value in zip(MEASURED, values, strict=True)}

    def evaluate(state: transformer.TransformerState) -> dict[str, float]:
        params = transformer.evaluation_params(state)
        batches = pipeline.eval_batches(source, batch_size, **partitioning.this_process(mesh))
        parts = [jax.device_get(sums(params, partitioning.put_batch(batch, mesh))) for batch in batches]
        total = jax.tree.map(lambda *values: np.sum(values, axis=0), *parts)
        result = figures({name: values.sum() for name, values in total.items()}, '')
        for number in np.unique(source.labels):
            result |= figures({name: values[number] for name, values in total.items()}, f'/{classes[number]}')
        return result

    return evaluate


def make_sampler(recipe: transformer.Recipe, vqgan: TrainedVQGAN, mesh: Mesh) -> Sampler:
    """What draws the figures' samples, once it is given parameters to use."""
    settings = recipe.settings
    return Sampler(recipe.model, vqgan, recipe.classes, settings.sampling, settings.seed, mesh)


def make_figures(
    recipe: transformer.Recipe, sampler: Sampler, source: TokenSource, cohort: pipeline.PreparedCohort
) -> Callable[[transformer.TransformerState], dict[str, Figure]]:
    """A function that draws, of a few ROIs, what becomes of half of their tokens, and of their class alone."""
    shown = pipeline.first_of_each_class(source.labels, recipe.settings.figure_rois)
    tokens, labels, ids = source.tokens[shown], source.labels[shown], [source.ids[i] for i in shown]
    grid = recipe.masking.grid
    rois = cohort.split(source.name)
    originals = np.stack([rois.volume(i)[..., 0] for i in shown])
    scores = source.scores[shown].reshape(-1, *grid)
    names, spacing = [cohort.classes[label] for label in labels], cohort.spacing(ids)
    half = np.where(np.arange(tokens.shape[1]) < tokens.shape[1] // 2, tokens, UNKNOWN)
    given = np.concatenate([half, np.full_like(half, UNKNOWN)])

    def figures(state: transformer.TransformerState) -> dict[str, Figure]:
        drawing = sampler.use(transformer.evaluation_params(state))  # not kept: its weights are whole on each device
        drawn = drawing.tokens(np.tile(labels, 2), range(len(given)), given)
        volumes = np.stack(list(sampler.decode(np.concatenate([tokens, drawn]))))
        reconstructed, completed, sampled = np.split(volumes, 3)
        shown = viz.completions(originals, reconstructed, completed, sampled, scores, names, ids, spacing)
        return {'completions': shown}

    return figures


def masking_figure(recipe: transformer.Recipe, source: TokenSource, classes: tuple[str, ...]) -> Figure:
    """What the masking hides of a few ROIs."""
    shown = pipeline.first_of_each_class(source.labels, recipe.settings.figure_rois)
    keys = jax.random.split(jax.random.key(recipe.settings.seed), len(shown))
    corrupt = jax.jit(masking.corrupt, static_argnums=3)
    roles = corrupt(keys, source.tokens[shown], source.scores[shown], recipe.masking).roles
    scores, marks = (np.asarray(part).reshape(-1, *recipe.masking.grid) for part in (source.scores[shown], roles))
    return viz.masking(scores, marks, [classes[i] for i in source.labels[shown]], [source.ids[i] for i in shown])
