"""Weights from files, good and bad."""
import os
import pickle

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader
from safetensors.torch import save_file

from mmseg_edaformer.engine import load_from_file
from mmseg_edaformer.errors import CheckpointError


class Attack:

    def __reduce__(self):
        return os.system, ('touch pwned',)


class GetAttr:
    """What a real attack would use the allowed getattr for."""

    def __reduce__(self):
        return getattr, (HistoryBuffer, '__subclasses__')


def test_what_mmengine_writes(tmp_path):
    buffer = HistoryBuffer(np.arange(4.), np.ones(4), max_length=10)
    content = dict(meta=dict(iter=3), state_dict={'w': torch.ones(2)},
                   message_hub=dict(log_scalars=dict(loss=buffer), value=np.float64(2.)))
    torch.save(content, tmp_path / 'iter.pth')
    loaded = CheckpointLoader.load_checkpoint(str(tmp_path / 'iter.pth'), map_location='cpu')
    assert loaded['meta'] == dict(iter=3)
    restored = loaded['message_hub']['log_scalars']['loss']
    assert restored.mean(4) == buffer.mean(4) == 1.5
    assert loaded['message_hub']['value'] == 2.


def test_safetensors(tmp_path):
    save_file({'w': torch.ones(2)}, tmp_path / 'w.safetensors')
    loaded = CheckpointLoader.load_checkpoint(str(tmp_path / 'w.safetensors'), map_location='cpu')
    assert torch.equal(loaded['state_dict']['w'], torch.ones(2))


@pytest.mark.parametrize(('attack', 'named'), [(Attack(), 'system'), (GetAttr(), '__subclasses__')])
def test_code_is_refused(tmp_path, monkeypatch, attack, named):
    monkeypatch.chdir(tmp_path)
    torch.save(dict(state_dict={'w': torch.ones(2)}, meta=attack), 'evil.pth')
    with pytest.raises(CheckpointError, match=rf'evil.pth.*{named}'):
        load_from_file('evil.pth')
    with pytest.raises(CheckpointError):
        CheckpointLoader.load_checkpoint('evil.pth')
    assert not os.path.exists('pwned')


@pytest.mark.parametrize(('name', 'content', 'message'), [
    ('none.pth', None, 'checkpoint not found'),
    ('empty.pth', b'', 'damaged'),
    ('text.pth', b'<html>404</html>', 'not a checkpoint, or it is damaged'),
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


def test_an_old_pickle_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'old.pth').write_bytes(pickle.dumps(Attack()))
    with pytest.raises(CheckpointError):
        load_from_file('old.pth')
    assert not os.path.exists('pwned')
