"""Figures: contact sheets of ROIs, reconstructions with importance overlays, and training curves.

Pure drawing, for commands and notebooks alike: arrays in, a matplotlib `Figure` out, which `save_figure` writes.
Nothing here touches pyplot, so it works in threads and without a display.

Volumes are [depth, height, width] = NIfTI axes 2, 0 and 1. For the orientation of BraTS (axes to the left, to the
back and up) the three planes come out in the radiological way: the patient's right is on the left of axial and
coronal slices, the front is up in axial and left in sagittal ones, the head's top is up in the other two.
"""

from vqroi_jax.viz.charts import confusion, curves, distributions, intensities, plan, roc
from vqroi_jax.viz.page import save_figure
from vqroi_jax.viz.rois import cohort, completions, contact_sheet, middle, neighbours, reconstructions, slices
from vqroi_jax.viz.surfaces import surfaces, triangulate
from vqroi_jax.viz.tokens import masking

__all__ = [
    'cohort',
    'completions',
    'confusion',
    'contact_sheet',
    'curves',
    'distributions',
    'intensities',
    'masking',
    'middle',
    'neighbours',
    'plan',
    'reconstructions',
    'roc',
    'save_figure',
    'slices',
    'surfaces',
    'triangulate',
]
