import shutil
import sys
import types

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


def test_whatever_is_in_a_file_comes_back(tmp_path):
    torch = pytest.importorskip('torch', reason='PyTorch (extra convert) reads these files')
    contents = {
        'net': {'w': ARRAYS['b.weight'].T},
        'state': {0: {'step': np.array(3.0, np.float16)}},
        'rest': [(1, None)],
    }
    torch_files.write(tmp_path / 'w.pth', contents)
    back = torch_files.read_contents(tmp_path / 'w.pth')
    np.testing.assert_array_equal(back['net'].pop('w'), ARRAYS['b.weight'].T)
    assert back['state'][0]['step'].dtype == np.float16
    assert back == {'net': {}, 'state': {0: {'step': 3.0}}, 'rest': [(1, None)]}
    assert [path.name for path in tmp_path.iterdir()] == ['w.pth']
    torch.save({'w': torch.ones(2, dtype=torch.bfloat16)}, tmp_path / 'b.pth')
    with pytest.raises(InputError, match=r'b\.pth has tensors that cannot be read as they are: .*BFloat16'):
        torch_files.read_contents(tmp_path / 'b.pth')


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, monkeypatch):
    pytest.importorskip('torch', reason='PyTorch (extra convert) reads these files')
    monkeypatch.setattr(shutil, 'disk_usage', lambda folder: types.SimpleNamespace(free=20))
    with pytest.raises(InputError, match=r'no disk space: w\.pth needs'):
        torch_files.write(tmp_path / 'w.pth', ARRAYS)
    assert not list(tmp_path.iterdir())


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


def test_how_to_let_a_file_run_code_is_not_told(tmp_path):
    torch = pytest.importorskip('torch', reason='PyTorch (extra convert) reads these files')
    torch.save(Unsafe(), tmp_path / 'w.pth')
    with pytest.raises(InputError, match=r'w\.pth is not a file of tensors that PyTorch has saved$'):
        torch_files.read(tmp_path / 'w.pth')


def test_a_missing_file_is_named_without_pytorch_too(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch', None)
    with pytest.raises(InputError, match=r'no weights file .*none\.pth'):
        torch_files.read(tmp_path / 'none.pth')


def test_without_pytorch_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch', None)
    path = tmp_path / 'w.pth'
    path.touch()
    with pytest.raises(InputError, match=r'^PyTorch is needed to read .*/w\.pth: pip install "vqroi_jax\[convert\]"$'):
        torch_files.read(path)
    with pytest.raises(InputError, match=r'^PyTorch is needed to write .*/w\.pth: pip install'):
        torch_files.write(path, ARRAYS)


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
