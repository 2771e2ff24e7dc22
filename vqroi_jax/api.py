"""Finished runs from Python: what `vqroi_jax.load` returns.

    a run's folder -> load -> Autoencoder (stage 1) or Generator (stage 2): arrays in, arrays out

Thin: `vqroi_jax.trained` does the work, and the commands go the same way. All devices are used. Volumes are NumPy
arrays in the networks' range, [-1, 1] with the background at -1, which is what prepared cohorts give
(`vqroi_jax.data.pipeline.RoiSource.volume`); `vqroi_jax.data.roi.scale` makes them from other intensities.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike
from ml_collections import ConfigDict

from vqroi_jax.errors import InputError
from vqroi_jax.trained import Sampler, TrainedTransformer, TrainedVQGAN, load_transformer, load_vqgan
from vqroi_jax.training import partitioning
from vqroi_jax.workdir import read_config

__all__ = ['Autoencoder', 'Generator', 'open_run']

_LARGEST = 2**32 - 1  # of seeds and of the samples' numbers


def open_run(workdir: str | Path, checkpoint: str, vqgan_workdir: str) -> 'Autoencoder':
    """What `vqroi_jax.load` does, once this module is imported."""
    task = read_config(Path(workdir).expanduser()).task
    if task == 'transformer':
        return Generator(load_transformer(workdir, checkpoint, vqgan_workdir))
    if task == 'vqgan':
        return Autoencoder(load_vqgan(workdir, checkpoint))
    raise InputError(
        f"{workdir} is a run of the task {task!r}; give the folder of a run of stage 2 ('transformer') or 1 ('vqgan')"
    )


class Autoencoder:
    """A run of stage 1: volumes to tokens and back.

    Every method takes one volume `[D, H, W]` or a batch `[n, D, H, W]`, and returns as many. Volumes are computed one
    by one on each device, so what becomes of one does not depend on the others.

    Attributes:
        vqgan: the run, as `vqroi_jax.trained` has it.
    """

    def __init__(self, vqgan: TrainedVQGAN):
        self.vqgan = vqgan
        self._mesh = partitioning.make_mesh({'data': -1})

    @property
    def roi_size(self) -> tuple[int, int, int]:
        """Voxels of a volume: D, H, W."""
        return self.vqgan.roi_size

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens of a volume: d, h, w."""
        return self.vqgan.grid

    @property
    def codes(self) -> int:
        """Tokens are numbers from 0 to `codes` - 1."""
        return self.vqgan.model.codes

    def encode(self, volume: ArrayLike) -> np.ndarray:
        """The tokens of volumes.

        Args:
            volume: `[D, H, W]` or `[n, D, H, W]` in [-1, 1].

        Returns:
            int32 `[d, h, w]` or `[n, d, h, w]` in [0, codes). In raster order (reshaped to `[d * h * w]`) they are the
            sequence that stage 2 is trained on.

        Raises:
            InputError: wrong shape, or voxels outside of [-1, 1] or not finite.
        """
        return self._look(volume)[0]

    def importance(self, volume: ArrayLike) -> np.ndarray:
        """The importance scores of volumes, which guide the masking of stage 2.

        Args:
            volume: `[D, H, W]` or `[n, D, H, W]` in [-1, 1].

        Returns:
            float32 `[d, h, w]` or `[n, d, h, w]` in (0, 1), one for each token.

        Raises:
            InputError: wrong shape, or voxels outside of [-1, 1] or not finite.
        """
        return self._look(volume)[1]

    def decode(self, tokens: ArrayLike) -> np.ndarray:
        """The volumes of tokens.

        Args:
            tokens: whole numbers `[d, h, w]` or `[n, d, h, w]` in [0, codes).

        Returns:
            float32 `[D, H, W]` or `[n, D, H, W]` in (-1, 1).

        Raises:
            InputError: wrong shape, not whole numbers, or codes that there are not.
        """
        batch, single = _as_batch(tokens, self.grid, 'tokens')
        if batch.dtype.kind not in 'iu':
            raise InputError(f'tokens are {batch.dtype}: whole numbers are expected')
        if batch.min() < 0 or batch.max() >= self.codes:
            raise InputError(f'tokens from {batch.min()} to {batch.max()}: 0 to {self.codes - 1} are expected')
        volumes = self._by_device(self._decoder, batch.astype(np.int32))
        return volumes[0] if single else volumes

    def reconstruct(self, volume: ArrayLike) -> np.ndarray:
        """What is left of volumes when they are encoded and decoded.

        Args:
            volume: `[D, H, W]` or `[n, D, H, W]` in [-1, 1].

        Returns:
            float32 of the same shape in (-1, 1).

        Raises:
            InputError: wrong shape, or voxels outside of [-1, 1] or not finite.
        """
        return self.decode(self.encode(volume))

    def sample(self, label: str, n: int = 1, seed: int = 0, first: int = 0, **sampling: Any) -> np.ndarray:
        """Refused: stage 1 draws nothing; see `Generator.sample`.

        Raises:
            InputError: always; it says what to load.
        """
        raise InputError(
            f'{self.vqgan.workdir} is a run of stage 1, which draws no samples; train stage 2 on it with '
            f'--config=configs/transformer.py --config.vqgan_workdir={self.vqgan.workdir}, and load that run'
        )

    def _look(self, volume: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """Tokens int32 and scores float32, both `[d, h, w]` or `[n, d, h, w]`."""
        batch, single = _as_batch(volume, self.roi_size, 'the volume')
        if batch.dtype.kind not in 'iuf':
            raise InputError(f'the volume is {batch.dtype}: real numbers are expected')
        low, high = batch.min(), batch.max()
        if not (low >= -1 and high <= 1):
            raise InputError(
                f'the volume has voxels from {low:g} to {high:g}: -1 (background) to 1 is expected; '
                'vqroi_jax.data.roi.scale brings intensities there'
            )
        found = self._by_device(self._encoder, batch.astype(np.float32)[..., None])
        tokens, scores = (part.reshape(-1, *self.grid) for part in found)
        return (tokens[0], scores[0]) if single else (tokens, scores)

    def _by_device(self, function: Callable, batch: np.ndarray) -> Any:
        """The function's results for each row, stacked."""
        rows = list(partitioning.in_batches(function, self._variables, batch, partitioning.row_parts(self._mesh)))
        return jax.tree.map(lambda *parts: np.stack(parts), *rows)

    @functools.cached_property
    def _variables(self) -> Any:
        return partitioning.put_whole(self.vqgan.variables, self._mesh)

    @functools.cached_property
    def _encoder(self) -> Callable:
        return partitioning.on_each_device(self.vqgan.encode, self._mesh)

    @functools.cached_property
    def _decoder(self) -> Callable:
        return partitioning.on_each_device(self.vqgan.decode, self._mesh)


class Generator(Autoencoder):
    """A run of stage 2 with its stage 1: new tumours by class, and all that an `Autoencoder` does.

    Attributes:
        transformer: the run, as `vqroi_jax.trained` has it.
    """

    def __init__(self, transformer: TrainedTransformer):
        super().__init__(transformer.vqgan)
        self.transformer = transformer
        self._last: tuple[ConfigDict, Sampler] | None = None  # one alone: each holds the weights

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.transformer.classes

    @property
    def spacing(self) -> tuple[float, ...] | None:
        """Millimetres a voxel along D, H and W; None if the cohort's differ."""
        return self.transformer.spacing

    def sample(self, label: str, n: int = 1, seed: int = 0, first: int = 0, **sampling: Any) -> np.ndarray:
        """New tumours: synthetic, not patients.

        They are those that `configs/generate.py` writes for the same checkpoint, seed, class, number and `sampling`
        block (in the range [-1, 1], before its background is cut off). As there, samples of one number are the same
        whatever else is asked for.

        Args:
            label: name of the class.
            n: how many.
            seed: 0 to 2**32 - 1.
            first: number of the first; `first=4` goes on after `n=4`.
            **sampling: fields of the block `sampling` of `configs/generate.py` that are to differ from the run's own
                config, such as `top_k=100`.

        Returns:
            float32 `[n, D, H, W]` in (-1, 1).

        Raises:
            InputError: an unknown class or field, or a value that it cannot have.
        """
        if label not in self.classes:
            raise InputError(f'class {label!r} is unknown; the model knows {", ".join(self.classes)}')
        for name, value, least in (('n', n, 1), ('seed', seed, 0), ('first', first, 0)):
            if not isinstance(value, int | np.integer) or not least <= value <= _LARGEST:
                raise InputError(f'{name}={value!r}: a whole number from {least} to {_LARGEST} is expected')
        if first + n - 1 > _LARGEST:
            raise InputError(f'first={first} and n={n}: samples are numbered up to {_LARGEST}')
        drawn = self._sampler(sampling).reseed(seed).draw(self.classes.index(label), range(first, first + n))
        return np.stack(list(drawn))

    def _sampler(self, changes: dict[str, Any]) -> Sampler:
        """The sampler of the run's own settings with some changed."""
        settings = self.transformer.config.sampling.copy_and_resolve_references().unlock()
        for name, value in changes.items():
            if name not in settings:
                raise InputError(f'sampling has no field {name!r}; there are {", ".join(settings)}')
            try:
                settings[name] = value
            except TypeError:
                kind = type(settings[name]).__name__
                raise InputError(f'sampling.{name}={value!r}: a value of type {kind} is expected') from None
        if self._last is None or self._last[0] != settings:
            self._last = settings, self.transformer.sampler(settings, 0, self._mesh)
        return self._last[1]


def _as_batch(array: ArrayLike, sides: tuple[int, ...], name: str) -> tuple[np.ndarray, bool]:
    """An array as `[n, *sides]`, and whether it was a single one; refuses other shapes."""
    found = np.asarray(array)
    if found.shape[-3:] != tuple(sides) or found.ndim > 4 or not found.size:
        expected = ', '.join(map(str, sides))
        raise InputError(f'{name} has shape {found.shape}: ({expected}) or (n, {expected}) is expected')
    return found.reshape(-1, *sides), found.ndim == 3
