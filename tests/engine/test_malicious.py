"""Files made to run code, to fill the memory or to write elsewhere: none does."""
import contextlib
import functools
import hashlib
import os
import pickle
import shutil
import struct
import tarfile
import warnings
import zipfile
from collections import OrderedDict
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader, checkpoint as zoo
from mmengine.structures import PixelData
from mmseg.engine.hooks import SegVisualizationHook
from mmseg.evaluation import IoUMetric
from mmseg.structures import SegDataSample
from mmseg.visualization import SegLocalVisualizer
from PIL import Image

from mmseg_edaformer import safe_defaults
from mmseg_edaformer.engine import load_checkpoint, load_from_file
from mmseg_edaformer.engine.convert import convert_file
from mmseg_edaformer.errors import CheckpointError

CANARY = 'canary'
COMMAND = f'touch {CANARY}'
CODE = f'open({CANARY!r}, "w").close()'


class Call:
    """Pickles as a call: what it is unpickled to is what the call returns."""

    def __init__(self, function, *arguments, state=None):
        self.reduced = (function, arguments) + (() if state is None else (state,))

    def __reduce__(self):
        return self.reduced


def raw(*parts):
    """A pickle of protocol 2 written by hand."""
    return b'\x80\x02' + b''.join(parts) + b'.'


def name(module, attribute):
    return f'c{module}\n{attribute}\n'.encode()


def text(value):
    return b'X' + struct.pack('<I', len(value)) + value.encode()


BUFFER = name('mmengine.logging.history_buffer', 'HistoryBuffer')
SYSTEM = rf'{os.name}\.system'

PICKLES = {
    'os': (Call(os.system, COMMAND), SYSTEM),
    'eval': (Call(eval, CODE), r'eval'),
    'getattr': (Call(getattr, HistoryBuffer, '__subclasses__'), r'getattr.*__subclasses__'),
    'reconstruct objects': (np.array([Call(os.system, COMMAND)], dtype=object), r'dtype\(.O8.\)'),
    'scalar of objects': (
        Call(np.float64(0).__reduce__()[0], np.dtype('O'), pickle.dumps(Call(eval, CODE))),
        r'dtype\(.O8.\)'),
    'nested torch.load': (Call(torch.load, 'other.pth'), r'torch\.serialization\.load'),
    'partial': (functools.partial(os.system, COMMAND), r'functools\.partial'),
    'setstate': (Call(HistoryBuffer, state=dict(statistics_methods=dict(mean=print))),
                 r'a call of HistoryBuffer'),
    'getattr chain': (
        raw(name('__builtin__', 'getattr'), name('__builtin__', 'getattr'), BUFFER, text('mean'),
            b'\x86R', text('__globals__'), b'\x86R'), r'getattr\(.*__globals__'),
    'ndarray as a function': (
        raw(name('numpy', 'ndarray'), b'K\x01\x85', text('O'), b'\x86R'), r'numpy\.ndarray'),
    'new ndarray': (raw(name('numpy', 'ndarray'), b'K\x01\x85\x85\x81'), r'a new numpy\.ndarray'),
    'statistics of all buffers': (
        raw(BUFFER, b')\x81}',
            text('statistics_methods'), b'}', text('mean'), name('_codecs', 'encode'), b'ssb'),
        'a HistoryBuffer without histories'),
    'persistent id': (raw(text('module'), b'Q'), 'persistent_load id'),
    'a hidden attribute': (
        raw(b'}', text('state_dict'), name('collections', 'OrderedDict'), b')R}', text('items'),
            b'K\x01sbs'), 'is not a checkpoint'),
    'protocol 4': (pickle.dumps(Call(os.system, COMMAND), 4), 'without pickle_protocol'),
    'protocol 0': (pickle.dumps(Call(os.system, COMMAND), 0), SYSTEM),
}


def write_zip(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, 'w', compression) as archive:
        for member, content in members.items():
            archive.writestr(member, content)


def write_attack(path, attack, zipped=True):
    """A checkpoint of either of torch's forms with an attack in it."""
    if not isinstance(attack, bytes):
        torch.save(dict(state_dict={'w': torch.ones(2)}, meta=attack), path,
                   _use_new_zipfile_serialization=zipped)
    elif zipped:
        write_zip(path, {'archive/data.pkl': attack, 'archive/version': '3\n',
                         'archive/byteorder': 'little'})
    else:
        start = (torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {})
        with open(path, 'wb') as file:
            file.write(b''.join(pickle.dumps(each, 2) for each in start) + attack +
                       pickle.dumps([], 2))


@pytest.fixture(autouse=True)
def _canary(tmp_path, monkeypatch):
    """What the attacks of this file are to leave behind, none does."""
    monkeypatch.chdir(tmp_path)
    HistoryBuffer()
    methods = dict(HistoryBuffer._statistics_methods)
    yield
    assert not [*tmp_path.rglob(CANARY), *tmp_path.parent.glob(CANARY)]
    assert HistoryBuffer._statistics_methods == methods


@pytest.mark.parametrize(('attack', 'named'), PICKLES.values(), ids=PICKLES)
@pytest.mark.parametrize('zipped', [True, False])
def test_no_code_runs_and_the_message_names_it(attack, named, zipped):
    write_attack('evil.pth', attack, zipped)
    for load in (load_checkpoint, CheckpointLoader.load_checkpoint,
                 lambda path: convert_file(path, 'new.pth')):
        with pytest.raises(CheckpointError, match=rf'evil\.pth.*({named})'):
            load('evil.pth')
    assert not os.path.exists('new.pth')


@pytest.mark.parametrize('protocol', range(6))
def test_a_plain_pickle(tmp_path, protocol):
    for suffix in 'pth', 'safetensors':
        path = tmp_path / f'old.{suffix}'
        path.write_bytes(pickle.dumps(Call(os.system, COMMAND), protocol))
        with pytest.raises(CheckpointError):
            load_from_file(path)


def test_the_attacks_would_work():
    """The canary is made when the same file is read by pickle."""
    for attack in ('os', 'eval', 'reconstruct objects', 'protocol 4'):
        attack = PICKLES[attack][0]
        pickle.loads(attack if isinstance(attack, bytes) else pickle.dumps(attack, 2))
        os.remove(CANARY)


def test_what_others_allow_is_not_allowed_here(monkeypatch):
    write_attack('evil.pth', Call(exec, CODE))
    before = set(torch.serialization.get_safe_globals())
    with torch.serialization.safe_globals([exec]):
        with pytest.raises(CheckpointError, match=r'asks for .*exec'):
            load_from_file('evil.pth')
        assert exec in torch.serialization.get_safe_globals()
    assert set(torch.serialization.get_safe_globals()) == before
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
    with pytest.raises(CheckpointError, match=r'asks for .*exec'):
        load_from_file('evil.pth')


@pytest.mark.parametrize('member', [f'../{CANARY}', f'/tmp/{CANARY}', f'good/../../{CANARY}'])
def test_archives_are_not_unpacked(member):
    torch.save(dict(state_dict={'w': torch.ones(2)}), 'good.pth')
    with zipfile.ZipFile('good.pth', 'a') as archive:
        archive.writestr(member, 'owned')
    with contextlib.suppress(CheckpointError):
        load_from_file('good.pth')
    write_zip('evil.pth', {member: 'owned'})
    with pytest.raises(CheckpointError):
        load_from_file('evil.pth')
    assert not os.path.exists(f'/tmp/{CANARY}')


def test_tar_archives_and_programs_are_refused(tmp_path):
    (tmp_path / 'pickle').write_bytes(pickle.dumps(Call(os.system, COMMAND)))
    with tarfile.open('old.pth', 'w') as archive:
        for member in ('storages', 'tensors', 'pickle'):
            archive.add('pickle', member)
    with pytest.raises(CheckpointError, match='tar archive'):
        load_from_file('old.pth')
    torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)).save('program.pth')
    with pytest.raises(CheckpointError, match='TorchScript'):
        load_from_file('program.pth')


def test_archives_that_torch_does_not_write():
    with zipfile.ZipFile('bomb.pth', 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('archive/data.pkl', raw(b'}'))
        with archive.open('archive/data/0', 'w') as member:
            for _ in range(256):
                member.write(bytes(2 ** 20))
    assert os.path.getsize('bomb.pth') < 2 ** 19
    with pytest.raises(CheckpointError, match='is compressed'):  # before it is read
        load_from_file('bomb.pth')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        with zipfile.ZipFile('twice.pth', 'w') as archive:
            archive.writestr('archive/data.pkl', raw(b'}'))
            archive.writestr('archive/data.pkl', raw(b'}'))
    with pytest.raises(CheckpointError, match='table of contents'):
        load_from_file('twice.pth')


@pytest.mark.parametrize('zipped', [True, False])
def test_a_small_file_is_no_large_model(zipped):
    torch.save(dict(state_dict={'w': torch.zeros(1).expand(10 ** 6, 10 ** 6)}), 'large.pth',
               _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match='w of shape 1000000x1000000 would be larger'):
        load_from_file('large.pth')


@pytest.mark.parametrize('source', [('builtins', 'bytearray'), ('torch', 'FloatTensor')])
def test_memory_without_end(source):
    call = name(*source) + b'\x8a\x08' + struct.pack('<q', 2 ** 60) + b'\x85R'
    write_attack('large.pth', raw(call))
    with pytest.raises(CheckpointError):
        load_from_file('large.pth')


@pytest.mark.parametrize('header', [
    '{"w":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}',
    '{"w":' * 100000 + '1' + '}' * 100000, '1', ''], ids=lambda header: header[:20])
def test_safetensors_headers_that_lie(tmp_path, header):
    path = tmp_path / 'w.safetensors'
    for length in (len(header), 2 ** 63, 101_000_000):
        path.write_bytes(struct.pack('<Q', length) + header.encode() + bytes(8))
        with pytest.raises(CheckpointError, match=r'w\.safetensors is damaged'):
            load_from_file(path)


def test_every_scheme_ends_here():
    assert CheckpointLoader._schemes == safe_defaults.LOADERS


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server of the folder ``web``, torch's cache beside it; yields its address."""
    (tmp_path / 'web').mkdir()
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))
    served = functools.partial(SimpleHTTPRequestHandler, directory=str(tmp_path / 'web'))
    monkeypatch.setattr(SimpleHTTPRequestHandler, 'log_message', lambda *_: None)
    with ThreadingHTTPServer(('127.0.0.1', 0), served) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_address[1]}'
        server.shutdown()


def test_downloads(tmp_path, server, monkeypatch):
    good, cache = tmp_path / 'web' / 'good.pth', tmp_path / 'cache' / 'hub' / 'checkpoints'
    torch.save({'v': torch.ones(2), 'w': torch.ones(2)}, good)
    digest = hashlib.sha256(good.read_bytes()).hexdigest()[:8]
    for called in (f'net_20210101-{digest}.pth', 'net_20210101-deadbeef.pth', 'net-20210101.pth'):
        shutil.copy(good, good.with_name(called))
    write_attack(good.with_name('evil.pth'), Call(os.system, COMMAND))
    read = CheckpointLoader.load_checkpoint
    for called in (f'net_20210101-{digest}.pth', 'net-20210101.pth', 'good.pth?raw=true'):
        assert len(read(f'{server}/{called}')['state_dict']) == 2
    os.remove(good)
    assert len(read(f'{server}/good.pth')['state_dict']) == 2  # from the cache
    with pytest.raises(CheckpointError, match=r'deadbeef\.pth cannot be downloaded: invalid '
                                              'hash value'):
        read(f'{server}/net_20210101-deadbeef.pth')
    with pytest.raises(CheckpointError, match=f'asks for {SYSTEM}'):
        read(f'{server}/evil.pth')
    with pytest.raises(CheckpointError, match=r'gone\.pth cannot be downloaded: HTTP Error 404'):
        read(f'{server}/gone.pth')
    for path in ('', '..', 'a/..', '..\\..\\x.pth', 'c:x.pth'):
        with pytest.raises(CheckpointError, match='does not end in the name of a file'):
            read(f'{server}/{path}')
    assert sorted(os.listdir(cache)) == sorted(
        ['evil.pth', 'good.pth', 'net-20210101.pth', f'net_20210101-{digest}.pth'])

    monkeypatch.setattr(zoo, 'get_torchvision_models', lambda: {'evil': f'{server}/evil.pth'})
    monkeypatch.setattr(zoo, 'get_external_models', lambda: {
        'evil': f'{server}/evil.pth', 'local': str(tmp_path / 'web' / 'evil.pth'),
        'new': f'{server}/good.pth'})
    monkeypatch.setattr(zoo, 'get_deprecated_model_names', lambda: {'old': 'new'})
    for source in ('torchvision://evil', 'modelzoo://evil', 'open-mmlab://evil',
                   'openmmlab://evil', 'openmmlab://local'):
        with pytest.raises(CheckpointError, match=f'asks for {SYSTEM}'):
            read(source)
    assert len(read('open-mmlab://old')['state_dict']) == 2
    with pytest.raises(CheckpointError, match='torchvision://evli is not known to mmengine'):
        read('torchvision://evli')
    for source in ('pavi://evil', 's3://x/evil.pth', 'cluster:s3://x/evil.pth', 'mmcls://evil'):
        with pytest.raises(CheckpointError, match='download it and give the file'):
            read(source)


@pytest.mark.parametrize(('info', 'named'), [
    (dict(best_ckpt='/home/user/'), '/home/user/'), (dict(best_ckpt='work/..'), 'work/..'),
    ({'best_ckpt_aAcc': 'C:\\Users'}, 'Users'), (dict(best_ckpt=3), 'is 3,'),
    (dict(keep_ckpt_ids=['/../../x']), 'x'),
    (dict(best_ckpt='/moved/run/best_mIoU_iter_3.pth', keep_ckpt_ids=[1, 2]), None),
    (dict(best_ckpt=None), None)])
def test_a_resumed_run_is_not_told_to_remove_files(info, named):
    """mmengine removes what the checkpoint calls the best one before, be it a folder."""
    torch.save(dict(state_dict={'w': torch.ones(2)}, message_hub=dict(runtime_info=info)), 'w.pth')
    if named is None:
        assert load_from_file('w.pth')['message_hub']['runtime_info'] == info
    else:
        with pytest.raises(CheckpointError, match=rf'w\.pth is refused: .*{named}'):
            load_from_file('w.pth')


@pytest.mark.parametrize('image', ['../../image.png', '{}/../image.png', '..png', '....png'])
def test_results_stay_in_their_folder(tmp_path, monkeypatch, image):
    """What --out and --show-dir write is named after the image."""
    folder = tmp_path / 'x' / 'y'
    for name in ('labels', 'painted'):
        (folder / name).mkdir(parents=True)
    monkeypatch.chdir(folder)
    image = image.format(folder)
    Image.new('RGB', (4, 4)).save(image, 'png')
    before = set(tmp_path.rglob('*'))
    metric = IoUMetric(output_dir=str(folder / 'labels'), format_only=True)
    metric.dataset_meta = dict(classes=('a',))
    label = torch.zeros(1, 4, 4, dtype=torch.long)
    metric.process({}, [dict(img_path=image, pred_sem_seg=dict(data=label))])
    visualizer = SegLocalVisualizer.get_instance(
        f'test of {image}', vis_backends=[dict(type='LocalVisBackend')],
        save_dir=str(folder / 'painted'))
    visualizer.dataset_meta = dict(classes=('a',), palette=[[0, 0, 0]])
    sample = SegDataSample(metainfo=dict(img_path=image), pred_sem_seg=PixelData(data=label))
    hook = SegVisualizationHook(draw=True, interval=1)
    hook.after_test_iter(SimpleNamespace(iter=0), 0, {}, [sample])
    written = {path for path in tmp_path.rglob('*') if path.is_file()} - before
    assert {path.relative_to(folder).parts[0] for path in written} == {'labels', 'painted'}


def test_messages_do_not_steer_the_terminal():
    for number, attack in enumerate((
            raw(name('evil\x1b]0;owned\x07', 'call\x1b[2J')),
            raw(b'}', text('state_dict'), b'}', text('w\x1b[2J' + 'x' * 100000), b'K\x01ss'))):
        write_attack(f'{number}.pth', attack)
        with pytest.raises(CheckpointError) as caught:
            load_from_file(f'{number}.pth')
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 600


def test_a_log_does_not_change_what_all_logs_do(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(HistoryBuffer._statistics_methods, 'mean', OrderedDict)
        torch.save(dict(state_dict={'w': torch.ones(2)}, log=HistoryBuffer([1., 3.], [1, 1])),
                   'w.pth')
    log = load_from_file('w.pth')['log']
    assert type(log) is HistoryBuffer
    assert log.statistics('mean') == 2
