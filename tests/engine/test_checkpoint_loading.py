"""Weights from files, good and bad."""
import pickle
import zipfile

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer

from mmseg_edaformer.engine import load_checkpoint, load_from_file
from mmseg_edaformer.errors import CheckpointError


def test_what_mmengine_writes(tmp_path):
    buffer = HistoryBuffer(np.arange(4.), np.ones(4), max_length=10)
    content = dict(meta=dict(iter=3), state_dict={'w': torch.ones(2)},
                   message_hub=dict(log_scalars=dict(loss=buffer), value=np.float64(2.)))
    torch.save(content, tmp_path / 'iter.pth')
    loaded = load_checkpoint(tmp_path / 'iter.pth')
    assert loaded['meta'] == dict(iter=3)
    restored = loaded['message_hub']['log_scalars']['loss']
    assert restored.mean(4) == buffer.mean(4) == 1.5
    assert loaded['message_hub']['value'] == 2.


@pytest.mark.parametrize(('name', 'content', 'message'), [
    ('none.pth', None, 'checkpoint not found'),
    ('empty.pth', b'', 'damaged'),
    ('text.pth', b'<html>404</html>', 'damaged, or not a checkpoint'),
    ('short.safetensors', b'\x10\x00\x00\x00\x00\x00\x00\x00{"w"', 'damaged or cut short'),
    ('list.pth', [1, 2], 'holds a list'),
    ('numbers.pth', dict(a=1), 'holds no weights: its entries are a'),
])
def test_bad_files_are_named(tmp_path, name, content, message):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=f'{message}') as caught:
        load_from_file(path)
    assert str(path) in str(caught.value)


def test_a_damaged_tensor_is_found(tmp_path):
    """torch reads it without a word."""
    path = tmp_path / 'iter.pth'
    torch.save(dict(state_dict={'w': torch.full((100,), 1.5)}), path)
    content = bytearray(path.read_bytes())
    content[content.index(np.full(9, 1.5, 'f4').tobytes()) + 3] ^= 1
    path.write_bytes(content)
    assert torch.load(path, weights_only=True)['state_dict']['w'][0] != 1.5
    with pytest.raises(CheckpointError, match=r'iter\.pth is damaged: the checksum of iter/data/0 '
                                              'in it is wrong; copy it again, or resume from an '):
        load_from_file(path)


def test_without_checksums(tmp_path):
    """What torch writes with set_crc32_options(False): nothing can be verified."""
    path = tmp_path / 'w.pth'
    torch.save(dict(state_dict={'w': torch.ones(2)}), path)
    whole = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            # The checksum stands in the table of contents alone.
            place = whole.rindex(member.CRC.to_bytes(4, 'little'))
            whole[place:place + 4] = bytes(4)
    path.write_bytes(whole)
    assert load_from_file(path)['state_dict']['w'].tolist() == [1, 1]


@pytest.mark.parametrize(('form', 'message'), [
    (1, None), (0, None), (2, r'written by mmseg_edaformer 9\.1, which is newer .*: upgrade'),
    ('2', 'does not say its format'), (None, 'does not say its format')])
def test_a_future_version(tmp_path, form, message):
    path = tmp_path / 'iter.pth'
    torch.save(dict(meta=dict(mmseg_edaformer=dict(format=form, version='9.1')),
                    state_dict={'w': torch.ones(2)}), path)
    if message is None:
        assert load_from_file(path)['meta']['mmseg_edaformer']['format'] == form
    else:
        with pytest.raises(CheckpointError, match=rf'iter\.pth .*{message}'):
            load_from_file(path)


def test_arrays_of_both_numpy_versions(tmp_path):
    """Each names the functions by another module."""
    values = [np.array(array) for array in (
        [1.5, 2], [[1, 2], [3, 4]], [True, False], np.arange(3, dtype='f4'),
        np.arange(3, dtype='u1'), np.zeros((0, 3)))]
    for core, other in ((b'numpy._core.', b'numpy.core.'), (b'numpy.core.', b'numpy._core.')):
        with zipfile.ZipFile(tmp_path / 'w.pth', 'w') as archive:
            torch.save(dict(w=torch.ones(2)), tmp_path / 'bare.pth')
            with zipfile.ZipFile(tmp_path / 'bare.pth') as bare:
                state = bare.read('bare/data.pkl')[2:-1]
                archive.writestr('bare/data/0', bare.read('bare/data/0'))
            start = b'\x80\x02}X\x0a\x00\x00\x00state_dict' + state + b's'
            logs = pickle.dumps((values, np.float32(1.5), np.int64(-3)), 2)[2:-1]
            archive.writestr('bare/data.pkl', start + b'X\x04\x00\x00\x00logs' +
                             logs.replace(core, other) + b's.')
            archive.writestr('bare/version', '3\n')
        arrays, *scalars = load_from_file(tmp_path / 'w.pth')['logs']
        for found, array in zip(arrays, values, strict=True):
            assert type(found) is np.ndarray
            assert found.dtype == array.dtype
            assert np.array_equal(found, array)
        assert [type(each) for each in scalars] == [np.float32, np.int64]
        assert scalars == [1.5, -3]
