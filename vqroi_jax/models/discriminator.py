"""PatchGAN in 3D: tells real ROIs from reconstructions patch by patch, and lends its feature maps to the loss.

Source: section 2.1 of the design (Isola et al. 2017, with group instead of batch normalisation).
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from vqroi_jax.models.layers import Conv3D, GroupNorm


class Discriminator(nn.Module):
    """Halves the volume `len(channels)` times, then judges every 4³ window of what is left.

    Attributes:
        channels: of the halving convolutions, the first without normalisation.
        num_groups: of the group normalisations.
        dtype: of the convolutions; logits are float32.
    """

    channels: Sequence[int] = (64, 128, 256, 512)
    num_groups: int = 8
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, volume: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        """Judges volumes.

        Args:
            volume: `[B, D, H, W, 1]` in [-1, 1]; sides of at least `4 * 2**len(channels)`.

        Returns:
            Logits float32 `[B, d, h, w, 1]`, high for real, and the `len(channels)` hidden feature maps.
        """
        x, hidden = volume, []
        for level, features in enumerate(self.channels):
            x = Conv3D(features, kernel_size=4, stride=2, padding=1, dtype=self.dtype, name=f'conv_{level}')(x)
            if level > 0:
                x = GroupNorm(num_groups=self.num_groups, dtype=self.dtype, name=f'norm_{level}')(x)
            x = nn.leaky_relu(x, 0.2)
            hidden.append(x)
        logits = Conv3D(1, kernel_size=4, padding=0, dtype=self.dtype, name='logits')(x)
        return logits.astype(jnp.float32), hidden
