"""A second, independent implementation of the method in PyTorch, for parity tests and speed comparisons.

Written from the description of the method alone and sharing no code with `vqroi_jax`, so that an error has
to be made twice to pass. `torch_vqgan` has the networks and the codebook, `torch_losses` the losses with
LPIPS, `torch_training` a whole training step of stage 1, `torch_transformer` all of stage 2, `torch_inception` what
FID is computed from, and `from_flax` copies the parameters of `vqroi_jax` into them. Volumes are
[batch, 1, depth, height, width], channels first as PyTorch users write it, float32 in [-1, 1].
"""
