"""Precision, recall, density and coverage: how much of the samples is realistic, and how much of reality is sampled.

Sources: Kynkäänniemi et al. 2019, *Improved precision and recall metric for assessing generative models*; Naeem et al.
2020, *Reliable fidelity and diversity metrics for generative models*.
"""

import jax
import jax.numpy as jnp


def precision_recall_density_coverage(
    real: jax.Array, fake: jax.Array, between: jax.Array, neighbours: int = 5
) -> dict[str, jax.Array]:
    """From distances (squared or not) to the four figures, sample by sample: their means are the figures.

    A sample's ball reaches to its `neighbours`-th nearest neighbour in its own set.

    Args:
        real: `[n, n]`, between real samples.
        fake: `[m, m]`, between synthetic ones.
        between: `[n, m]`, from real to synthetic ones.
        neighbours: 1 to n - 1 and m - 1.

    Returns:
        float32: `precision` `[m]`, whether a synthetic sample lies in the ball of a real one; `recall` `[n]`, whether a
        real sample lies in the ball of a synthetic one; `density` `[m]`, in how many balls of real samples a synthetic
        one lies, divided by `neighbours` (the mean may exceed 1); `coverage` `[n]`, whether a real sample's ball has a
        synthetic one in it.
    """
    of_real, of_fake = (jnp.sort(own, axis=1)[:, neighbours] for own in (real, fake))  # itself comes first
    in_real, in_fake = between <= of_real[:, None], between <= of_fake[None]
    figures = {
        'precision': jnp.any(in_real, axis=0),
        'recall': jnp.any(in_fake, axis=1),
        'density': jnp.sum(in_real, axis=0) / neighbours,
        'coverage': jnp.min(between, axis=1) <= of_real,
    }
    return {name: value.astype(jnp.float32) for name, value in figures.items()}
