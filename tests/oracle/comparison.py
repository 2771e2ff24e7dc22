"""What the parity tests share: layouts, a relative comparison, and parameters that make it meaningful.

The oracle computes in double precision there, so that what differs is `vqroi_jax` in float32 alone.
"""

import jax
import jax.numpy as jnp
import numpy as np
import torch

# For `jax.jit(compiler_options=…)`: halves the time of compiling, which a few runs at test sizes do not win back.
QUICK_COMPILATION = {'xla_backend_optimization_level': 0}


def channels_first(array: np.ndarray | jax.Array) -> torch.Tensor:
    """[batch, ..., channels] to the oracle's [batch, channels, ...], in double precision."""
    return torch.tensor(np.moveaxis(np.asarray(array, np.float64), -1, 1))


def channels_last(tensor: torch.Tensor) -> np.ndarray:
    """[batch, channels, ...] to our [batch, ..., channels]."""
    return np.moveaxis(tensor.detach().numpy(), 1, -1)


def assert_near(ours, theirs, name: str, tolerance: float = 1e-4) -> None:
    """Passes if the difference of two arrays is small beside the second one, both by Euclidean norm."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape, name
    assert np.isfinite(ours).all(), name
    assert np.linalg.norm(ours - theirs) <= tolerance * np.linalg.norm(theirs), name


def random_parameters(tree, seed: int, offset: float = 3.0):
    """Random float32 parameters in the shapes of a tree, none left at zero or one, fit for comparing gradients.

    At the kink of an activation rounding alone decides which way a gradient goes. So the last bias before it is around
    plus or minus `offset`, which sets most values clearly on one side (at 3, all but one in 700). Kernels are
    of the scale of their fan-in, but for the decoder's last, whose tanh must not saturate.
    """
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape)
        *_, layer, kind = (key.key for key in path)
        if kind == 'kernel':
            noise *= np.prod(leaf.shape[:-1]) ** -0.5 * (0.3 if layer == 'last' else 1.0)
        elif kind == 'scale':
            noise = 1 + 0.1 * noise
        elif 'norm' in layer or (len(path) == 2 and layer == 'conv_0'):  # the discriminator's first has no norm
            noise = offset * np.sign(noise) + 0.1 * noise
        else:
            noise *= 0.1
        return jnp.asarray(noise, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, tree)
