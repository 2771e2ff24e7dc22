"""The TFDS dataset of tumour ROIs: `crops` cuts them out in parallel, the builder stores them.

Nothing is imported here: the processes that crop need neither TFDS nor JAX.
"""
