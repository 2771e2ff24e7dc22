"""The viewer: a page's script tags are parsed, and the files in them read back by nibabel."""

import base64
import gzip
import html
import json
import re

import nibabel
import numpy as np
import pytest

from vqroi_jax.viewer import Viewer


def volumes():
    rng = np.random.default_rng(0)
    return {name: rng.uniform(-1.1, 1, (3, 4, 5)).astype(np.float32) for name in ('LGG <1>', "HGG's")}


def files(page):
    coded = json.loads(re.search(r'const files = (\[.*?\]);', page)[1])
    return [nibabel.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(one))) for one in coded]


def test_volumes_are_in_the_page_with_their_axes_and_voxel_size():
    images = files(Viewer(volumes(), spacing=(3.0, 1.0, 2.0)).fragment())
    for image, volume in zip(images, volumes().values(), strict=True):
        back = np.asarray(image.dataobj).transpose(2, 0, 1) / 127.5 - 1
        np.testing.assert_allclose(back, np.maximum(volume, -1), atol=0.5 / 127.5 + 1e-6)
        assert image.header.get_zooms() == (1.0, 2.0, 3.0)
        assert nibabel.aff2axcodes(image.affine) == ('L', 'P', 'S')


def test_the_page_loads_nothing_and_shows_titles_as_text():
    page = Viewer(volumes()).fragment()
    assert not re.search(r'<(script|link|img|iframe)[^>]*\s(src|href)\s*=', page)
    assert page.count('</script>') == 2
    assert 'LGG &lt;1&gt;' in page
    assert 'niivue' in page


def test_a_notebook_gets_the_same_in_a_frame():
    viewer = Viewer(volumes())
    (page,) = re.findall(r'srcdoc="([^"]*)"', viewer._repr_html_())
    assert viewer.fragment() in html.unescape(page)


def test_no_volumes_are_refused():
    with pytest.raises(ValueError, match='no volumes'):
        Viewer({})
