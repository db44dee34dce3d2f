"""Thousands of damaged inputs: each is understood, or refused as the user is told it is.

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
from mmseg_edaformer.errors import CheckpointError, RatioError
from mmseg_edaformer.isr.ratio import ISRRatio

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
        for flipped in (1 << place % 8, 255):
            damaged = bytearray(content)
            damaged[place] ^= flipped
            found = load(path, bytes(damaged))
            assert found in (None, whole), place
            harmless += found is not None
    covered = sum(map(len, members(content, tmp_path)))
    assert harmless <= 2 * (len(content) - covered)  # none of them in what the members hold


def members(content, folder):
    (folder / 'members.zip').write_bytes(content)
    with zipfile.ZipFile(folder / 'members.zip') as archive:
        return [archive.read(name) for name in archive.namelist()]


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


PIECES = ('1', '2', '9', '0', '12', ',', '-', ' ', '2211-222', 'optimal', 'none', 'auto', 'AUTO',
          '٣', '²', '１', '-1', '1e9', '0x1', '_', '1_0', '.5', '\n', '\0', '\ud800', 'é',
          '9' * 5000, '1,' * 50, 'None', '+1', '1-1-1')

OTHERS = (None, True, False, 0, -1, 1, 7, 10 ** 30, 10 ** 5000, 1.0, float('nan'), float('inf'),
          2j, b'2', (), (1, 2), [2, 2], {}, {'encoder': 1}, object(), int, {1, 2}, ((2,), (2,)))


def draw_ratio(draw):
    if draw.random() < .1:
        value = draw.choice(OTHERS)
        for _ in range(draw.choice((0, 0, 1, 1000))):
            value = [value]
        return value
    text = ''.join(draw.choice(PIECES) for _ in range(draw.randrange(8)))
    if draw.random() < .2:
        text += chr(draw.randrange(0x110000))
    return text


@seconds
def test_ratios(seconds):
    draw, counts = random.Random(0), dict(refused=0, read=0)
    longest = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = draw_ratio(draw)
        before = time.process_time()
        try:
            ratio = ISRRatio.parse(value)
        except RatioError as error:
            counts['refused'] += 1
            longest = max(longest, len(str(error)))
        else:
            counts['read'] += 1
            assert str(ratio) == 'none' or ISRRatio.parse(str(ratio)) == ratio, value
            assert max(*ratio.encoder, *ratio.decoder) >= 1
        assert time.process_time() - before < 1
    print(counts)
    assert longest < 1000
    assert min(counts.values()) > 100


@pytest.mark.parametrize('part', ['encoder', 'decoder'])
def test_ratios_made_by_hand(part):
    other = dict(encoder=(1,), decoder=(1,))
    for value in (*OTHERS, 'x', [1], (1.5,), ('1',), (10 ** 5000,)):
        try:
            ratio = ISRRatio(**{**other, part: value})
        except RatioError:
            continue
        assert ISRRatio.parse(str(ratio)) == ratio
