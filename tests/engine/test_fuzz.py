"""Thousands of damaged checkpoints: each is read as it was, or refused.

They are drawn from a seed, for two seconds each, or in a soak for FUZZ_SECONDS (120).
"""
import os
import random
import resource
import time
import zipfile

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from safetensors.torch import save_file

from mmseg_edaformer.engine import load_from_file
from mmseg_edaformer.errors import CheckpointError

SOAK = float(os.environ.get('FUZZ_SECONDS', 120))

seconds = pytest.mark.parametrize('seconds', [2, pytest.param(SOAK, marks=pytest.mark.soak)])

FORMS = ('zip.pth', 'legacy.pth', 'whole.safetensors')


@pytest.fixture(scope='module')
def good(tmp_path_factory):
    """The bytes of a good checkpoint in each form."""
    folder = tmp_path_factory.mktemp('good')
    weights = {'w': torch.arange(8.), 'half.b': torch.ones(2, 3).bfloat16(),
               'n': torch.tensor(3)}
    content = dict(
        meta=dict(iter=3, mmseg_edaformer=dict(format=1, version='0.1.0')), state_dict=weights,
        message_hub=dict(log_scalars=dict(loss=HistoryBuffer(np.arange(4.), np.ones(4)))))
    torch.save(content, folder / FORMS[0])
    torch.save(content, folder / FORMS[1], _use_new_zipfile_serialization=False)
    save_file(weights, folder / FORMS[2])
    return {form: (folder / form).read_bytes() for form in FORMS}


def plain(value):
    """Content as something that compares by value, types and order included."""
    if isinstance(value, HistoryBuffer):
        return HistoryBuffer, plain(vars(value)['_log_history']), plain(
            vars(value)['_count_history']), value.max_length
    if isinstance(value, dict):
        return type(value), [(plain(key), plain(each)) for key, each in value.items()]
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.contiguous().view(torch.uint8).tolist() \
            if value.ndim else value.item()
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.tolist()
    return type(value), value


def load(path, content):
    """The content of a file of these bytes, or None where it is refused."""
    path.write_bytes(content)
    try:
        return plain(load_from_file(path, map_location='cpu'))
    except CheckpointError as error:
        message = str(error)
    assert str(path) in message
    assert len(message) < 1500
    return None


def test_every_byte_counts(tmp_path, good):
    """A .pth with any one byte changed is refused, or has the same content all the same."""
    path, content = tmp_path / FORMS[0], good[FORMS[0]]
    whole = load(path, content)
    harmless = 0
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8 if place % 2 else 255
        found = load(path, bytes(damaged))
        assert found in (None, whole), place
        harmless += found is not None
    path.write_bytes(content)
    with zipfile.ZipFile(path) as archive:
        covered = sum(member.file_size for member in archive.infolist())
    assert harmless <= len(content) - covered  # none of them in what the members hold


@pytest.mark.parametrize('form', FORMS)
def test_every_truncation_is_refused(tmp_path, good, form):
    for length in range(len(good[form])):
        assert load(tmp_path / form, good[form][:length]) is None, length


WORDS = (b'\xff\xff\xff\x7f', b'PK\5\6', b'cos\nsystem\n', b'R', b'b', b'\x81', b'.', b'0',
         b'9' * 20, b'-1', b'}')


def mutate(draw, content):
    """One to four changes: bytes, bits, pieces left out, doubled, moved or made up."""
    content = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        start, other = (draw.randrange(len(content) or 1) for _ in range(2))
        length = draw.choice((1, 2, 4, 8, 64, 512))
        piece = bytes(content[start:start + length])
        content[start:start + length] = draw.choice((
            draw.randbytes(len(piece)), bytes(byte ^ 1 << draw.randrange(8) for byte in piece),
            b'', piece * 2, b'\xff' * len(piece), bytes(len(piece)), draw.choice(WORDS),
            content[other:other + length]))
    return bytes(content)


@seconds
@pytest.mark.parametrize('form', FORMS)
def test_damaged_checkpoints(tmp_path, good, form, seconds):
    path, draw, counts = tmp_path / form, random.Random(0), dict(refused=0, same=0, other=0)
    whole, memory = load(path, good[form]), peak_memory()
    assert whole is not None
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = load(path, mutate(draw, good[form]))
        counts['refused' if found is None else 'same' if found == whole else 'other'] += 1
    print(form, counts)
    assert counts['refused'] > 100
    assert peak_memory() - memory < 500
    # The other forms have no checksums.
    assert form != 'zip.pth' or counts['other'] == 0


def peak_memory():
    """MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
