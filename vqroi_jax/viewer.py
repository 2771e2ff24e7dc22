"""An interactive viewer of ROIs, slices and 3D, as a piece of HTML that needs no network: for reports and notebooks.

The viewer is NiiVue (https://github.com/niivue/niivue), which is bundled; it needs a browser with WebGL 2.
"""

import base64
import html
import importlib.resources
from collections.abc import Mapping, Sequence

import numpy as np
from markupsafe import Markup

from vqroi_jax.data.samples import centred_affine, make_nifti, pack
from vqroi_jax.templates import render_page

TEMPLATE = 'viewer.html.jinja'
_HEIGHT = 520  # pixels of the frame in a notebook


class Viewer:
    """ROIs to look at from all sides. A notebook shows it; `fragment` is for a page.

    Args:
        volumes: by title, `[D, H, W]` in [-1, 1], -1 being the background. They are shown with 256 grey levels.
        spacing: mm a voxel along depth, height and width.
    """

    def __init__(self, volumes: Mapping[str, np.ndarray], spacing: Sequence[float] = (1.0, 1.0, 1.0)):
        if not volumes:
            raise ValueError('a viewer of no volumes')
        self._files = {title: _encode(np.asarray(volume), spacing) for title, volume in volumes.items()}

    def fragment(self) -> Markup:
        """HTML for the body of a page, once a page."""
        program = importlib.resources.files('vqroi_jax').joinpath('niivue', 'niivue.umd.js').read_text(encoding='utf-8')
        return render_page(TEMPLATE, files=self._files, program=Markup(program))

    def _repr_html_(self) -> str:
        """A frame of its own, so that several viewers of a notebook keep out of each other's way."""
        page = f'<!doctype html><meta charset="utf-8"><body style="margin:0">{self.fragment()}</body>'
        return (
            f'<iframe srcdoc="{html.escape(page)}" width="100%" height="{_HEIGHT}" style="border:0" '
            'title="Viewer of ROIs"></iframe>'
        )


def _encode(volume: np.ndarray, spacing: Sequence[float]) -> str:
    """A volume `[D, H, W]` in [-1, 1] as a .nii.gz file of 8 bits a voxel, in base64."""
    levels = np.round((np.clip(volume, -1, 1) + 1) * 127.5).astype(np.uint8)
    image = make_nifti(levels.transpose(1, 2, 0), centred_affine(volume.shape, spacing), 'vqroi_jax viewer')
    return base64.b64encode(pack(image)).decode()
