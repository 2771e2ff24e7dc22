"""Class-conditional generation of 3D brain-tumour regions of interest in JAX."""
