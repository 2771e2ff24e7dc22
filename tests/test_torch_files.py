import sys

import numpy as np
import pytest

from vqroi_jax import torch_files
from vqroi_jax.errors import InputError

ARRAYS = {'b.weight': np.arange(6, dtype=np.float32).reshape(2, 3), 'a.count': np.array(7)}


def test_arrays_come_back_as_they_were_written(tmp_path):
    pytest.importorskip('torch', reason='PyTorch (extra convert) reads these files')
    torch_files.write(tmp_path / 'w.pth', ARRAYS)
    back = torch_files.read(tmp_path / 'w.pth')
    assert list(back) == list(ARRAYS)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(back[name], array)
        assert back[name].dtype == array.dtype


def test_wrapped_and_prefixed_dicts_are_unwrapped(tmp_path):
    torch = pytest.importorskip('torch', reason='PyTorch (extra convert) reads these files')
    path = tmp_path / 'w.pth'
    torch.save({'epoch': 3, 'state_dict': {'module.x': torch.ones(2, dtype=torch.bfloat16)}}, path)
    back = torch_files.read(path)
    assert list(back) == ['x']
    assert back['x'].dtype == np.float32


class Unsafe:
    def __reduce__(self):
        return print, ('a file must not run code',)


@pytest.mark.parametrize('content', [b'', b'no weights', Unsafe(), [1, 2], {'x': 3}, {}])
def test_other_files_are_refused(tmp_path, content):
    torch = pytest.importorskip('torch', reason='PyTorch (extra convert) reads these files')
    path = tmp_path / 'w.pth'
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(InputError, match=r'w\.pth'):
        torch_files.read(path)


def test_a_missing_file_is_named(tmp_path):
    pytest.importorskip('torch', reason='PyTorch (extra convert) reads these files')
    with pytest.raises(InputError, match=r'no weights file .*none\.pth'):
        torch_files.read(tmp_path / 'none.pth')


def test_without_pytorch_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch', None)
    with pytest.raises(InputError, match=r'vqroi_jax\[convert\]'):
        torch_files.read(tmp_path / 'w.pth')


@pytest.mark.parametrize(
    ('shapes', 'told'),
    [
        ({'b.weight': (2, 3), 'a.count': (), 'c': (1,)}, 'has no c'),
        ({'b.weight': (2, 3)}, 'has a.count'),
        ({'b.weight': (3, 2), 'a.count': ()}, r'b.weight is \(2, 3\), not \(3, 2\)'),
    ],
)
def test_arrays_that_do_not_fit_are_named(shapes, told):
    with pytest.raises(InputError, match=f'w.pth does not fit a toy: {told}'):
        torch_files.check('w.pth', ARRAYS, shapes, 'a toy')


def test_arrays_that_fit_pass():
    torch_files.check('w.pth', ARRAYS, {'a.count': (), 'b.weight': (2, 3)}, 'a toy')
