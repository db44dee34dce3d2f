"""Shards of classification data: what other readers see, what ours reads, and runs on them."""
import errno
import multiprocessing
import os
import pickle
import re
import signal
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine import fileio
from mmengine.config import Config
from mmengine.registry import DATASETS
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from mmseg_edaformer.data import shards
from mmseg_edaformer.data.shards import ShardedImages, read_index, write_shards
from mmseg_edaformer.engine import checks
from mmseg_edaformer.engine.loop import CountedLoader
from mmseg_edaformer.errors import ConfigError, DataError
from mmseg_edaformer.pretraining import folders as pretrain
from tests.engine.training import differences, run_to_end, state, train
from tests.processes import finish, in_child, run_tool

LOAD = dict(type='mmseg.LoadImageFromFile')


@pytest.fixture(scope='module')
def packed(crops, tmp_path_factory):
    """The same in shards of 16 images; read-only."""
    root = tmp_path_factory.mktemp('packed') / 'shards'
    for split in ('train', 'val'):
        write_shards(crops / split, root / split, images=16)
    return root


@pytest.fixture
def folders(tmp_path):
    """Two classes whose names are awkward."""
    root = tmp_path / 'two words'
    for number, name in enumerate((
            'a/1.b.JPEG', 'a/1_b.png', 'a/in/2.jpg', 'a/1.b.png', 'b.c/ü.PNG',
            'b.c/' + 'long' * 40 + '.png', 'b.c/#1+2.png')):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([number]) * (500 + 300 * number))
        os.utime(path, (10 ** 9 + number, 10 ** 9 + number))
    for name in ('a/.hidden.png', 'a/readme.txt'):
        (root / name).touch()
    return root


def by_tarfile(folder):
    """Of each shard its samples: the key, the image's suffix and bytes, and the class."""
    found = []
    for path in sorted(folder.glob('*.tar')):
        with tarfile.open(path) as handle:
            members = [(each.name, handle.extractfile(each).read()) for each in handle]
        images, classes = members[::2], members[1::2]
        keys = [re.fullmatch(r'((?:.*/)?[^.]+)\.([^/]*)', name).groups() for name, _ in images]
        assert [f'{key}.cls' for key, _ in keys] == [name for name, _ in classes]
        found.append([(*key, content, int(label)) for key, (_, content), (_, label)
                      in zip(keys, images, classes)])
    return found


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def damaged(packed, tmp_path):
    """A copy that may be changed."""
    for path in packed.rglob('*.*'):
        copy = tmp_path / 'copy' / path.relative_to(packed)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    return tmp_path / 'copy'


def test_any_reader_sees_the_images_and_their_classes(crops, packed):
    found = by_tarfile(packed / 'train')
    assert [len(shard) for shard in found] == [16, 16, 8]
    expected = {(f'{name}/{path.stem}', 'png', path.read_bytes(), label)
                for label, name in enumerate(pretrain.CROPS)
                for path in (crops / 'train' / name).iterdir()}
    assert {sample for shard in found for sample in shard} == expected
    for shard in found:  # of ten classes with four images each
        assert len({label for *_, label in shard}) > 4


def test_same_images_in_the_same_order_as_folders(crops, packed):
    folder = pretrain_dataset('CustomDataset', crops)
    ours = pretrain_dataset('ShardedImages', packed)
    assert len(ours) == len(folder) == 40
    assert ours.CLASSES == tuple(folder.CLASSES) == ours.metainfo['classes']
    for index in (*range(40), -1):
        first, second = folder[index], ours[index]
        assert first['gt_label'] == second['gt_label'] == ours.get_cat_ids(index)[0]
        assert first['sample_idx'] == second['sample_idx']
        np.testing.assert_array_equal(first['img'], second['img'])
        assert os.path.basename(first['img_path']) == os.path.basename(second['img_path'])
    few = pretrain_dataset('ShardedImages', packed, indices=3)
    assert [few[place]['img_path'] for place in range(len(few))] == [
        ours[place]['img_path'] for place in range(3)]
    assert ours.get_subset([5, 7])[1]['img_path'] == ours[7]['img_path']
    with pytest.raises(IndexError):
        ours[40]


def pretrain_dataset(kind, root, **settings):
    pytest.importorskip('mmpretrain', reason='mmpretrain is not there')
    return DATASETS.build(dict(type=kind, data_root=str(root), data_prefix='train',
                               pipeline=[LOAD], _scope_='mmpretrain', **settings))


def test_awkward_names(folders, tmp_path):
    index = write_shards(folders, tmp_path / 'shards', images=3)
    expected = ['a/1.b.JPEG', 'a/1.b.png', 'a/1_b.png', 'a/in/2.jpg', 'b.c/#1+2.png',
                'b.c/' + 'long' * 40 + '.png', 'b.c/ü.PNG']
    assert index.classes == ['a', 'b.c']
    assert [(fileio.get(each['img_path']), each['gt_label']) for each in index] == [
        ((folders / name).read_bytes(), int(name.startswith('b'))) for name in expected]
    keys = [sample[0] for shard in by_tarfile(tmp_path / 'shards') for sample in shard]
    assert len(set(keys)) == len(expected)
    assert {'a/1_b', 'a/1_b_1', 'a/1_b_2', 'a/in/2', 'b.c/ü'} < set(keys)


def test_the_index_and_tarfile_agree(packed):
    index = read_index(packed / 'train')
    for row in index.rows:
        with tarfile.open(packed / 'train' / f'{row["shard"]:06d}.tar') as handle:
            member, = (each for each in handle if each.offset_data == row['offset'])
            assert member.size == row['length']
    shards.check_shards(index)


def test_the_seed_chooses_and_nothing_else_does(folders, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in folders.rglob('*')}
    for name, seed in (('one', 0), ('two', 0), ('three', 1)):
        write_shards(folders, tmp_path / name, images=2, seed=seed)
    assert contents(tmp_path / 'one') == contents(tmp_path / 'two')
    assert contents(tmp_path / 'one') != contents(tmp_path / 'three')
    assert before == {path: path.stat().st_mtime_ns for path in folders.rglob('*')}


def test_killed_and_done_again(folders, tmp_path):
    whole, part = tmp_path / 'whole', tmp_path / 'part'
    write_shards(folders, whole, images=2)

    def until_killed():
        add = tarfile.TarFile.addfile

        def kill(self, info, *args):
            if os.path.basename(self.name).startswith('.000002'):
                os.kill(os.getpid(), signal.SIGKILL)
            add(self, info, *args)

        tarfile.TarFile.addfile = kill
        write_shards(folders, part, images=2)

    assert finish(in_child(until_killed)) == -signal.SIGKILL
    left = sorted(path.name for path in part.iterdir())
    assert left[1:] == ['000000.tar', '000001.tar']
    assert '.partial' in left[0]
    with pytest.raises(DataError, match=r'no index\.npz in it, which is written last'):
        read_index(part)
    times = [(part / name).stat().st_mtime_ns for name in left[1:]]
    counts = []
    write_shards(folders, part, images=2, advance=lambda done, total: counts.append(done))
    assert sum(counts) == 7
    assert contents(part) == contents(whole)
    assert times == [(part / name).stat().st_mtime_ns for name in left[1:]]
    # Done once more, nothing is written.
    times = {path: path.stat().st_mtime_ns for path in part.iterdir()}
    write_shards(folders, part, images=2)
    assert times == {path: path.stat().st_mtime_ns for path in part.iterdir()}


def test_no_room(folders, tmp_path, monkeypatch):
    add = tarfile.TarFile.addfile

    def full(self, info, *args):
        if os.path.basename(self.name).startswith('.000001'):
            raise OSError(errno.ENOSPC, 'No space left on device')
        return add(self, info, *args)

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, 'addfile', full)
        with pytest.raises(DataError, match=r'no room .* the 1 of 4 that are done are kept'):
            write_shards(folders, tmp_path / 'shards', images=2)
    assert list(contents(tmp_path / 'shards')) == ['000000.tar']
    write_shards(folders, tmp_path / 'shards', images=2)


def test_what_is_there_already(folders, tmp_path):
    target = tmp_path / 'shards'
    write_shards(folders, target, images=4)
    other = 'holds other shards than those asked for'
    for settings in (dict(images=5), dict(images=4, seed=1)):
        with pytest.raises(DataError, match=other):
            write_shards(folders, target, **settings)
    (target / 'index.npz').unlink()
    with pytest.raises(DataError, match=other):
        write_shards(folders, target, images=4, seed=1)
    changed = folders / 'a' / '1_b.png'
    os.utime(changed, (1, 1))  # since the interrupted call
    with pytest.raises(DataError, match=other):
        write_shards(folders, target, images=4)
    (target / '000000.tar').write_bytes((target / '000000.tar').read_bytes()[:1500])
    with pytest.raises(DataError, match=r'000000\.tar is not a whole shard'):
        write_shards(folders, target, images=4)
    (target / 'notes.txt').touch()
    with pytest.raises(DataError, match=r'holds notes\.txt: remove it'):
        write_shards(folders, target, images=4)


def test_sources_that_cannot_be_packed(folders, tmp_path):
    with pytest.raises(DataError, match='has no folders, one per class'):
        write_shards(tmp_path / 'nowhere', tmp_path / 'shards')
    (folders / 'empty').mkdir()
    with pytest.raises(DataError, match='empty has no image in it'):
        write_shards(folders, tmp_path / 'shards')
    (folders / 'empty' / 'link.png').symlink_to(tmp_path / 'gone.png')
    with pytest.raises(DataError, match=r'link\.png: it is a link to .*gone\.png'):
        write_shards(folders, tmp_path / 'shards')
    assert list((tmp_path / 'shards').iterdir()) == []
    with pytest.raises(DataError, match='at least one image per shard'):
        write_shards(folders, tmp_path / 'shards', images=0)


def test_damage_is_found(packed, tmp_path):
    root = damaged(packed, tmp_path)
    index, shard = read_index(root / 'train'), root / 'train' / '000001.tar'
    place = int(np.flatnonzero(index.rows['shard'] == 1)[0])
    name = index[place]['img_path']
    content = bytearray(shard.read_bytes())
    content[index.rows['offset'][place] + 30] ^= 1
    shard.write_bytes(content)
    load = pretrain.ShardedImages(str(root), 'train', pipeline=[])
    assert load[place]['img_path'] == name
    with pytest.raises(DataError, match=r'000001\.tar#.*png: its bytes .* \(CRC32\)'):
        fileio.get(name)
    with pytest.raises(DataError, match=r'1 of 40 images .* such as .*000001\.tar#'):
        shards.check_shards(index)
    os.truncate(shard, 1024)
    with pytest.raises(DataError, match='the shard ends before it does'):
        fileio.get(index[place]['img_path'])
    with pytest.raises(DataError, match=r'1 of 3 shards .* is cut or replaced, such as 000001\.tar '
                                        r'with 1,024 bytes instead of [\d,]+: copy'):
        read_index(root / 'train')
    shard.unlink()
    with pytest.raises(DataError, match=r'1 of 3 shards .* is missing, such as 000001\.tar'):
        read_index(root / 'train')


def test_a_damaged_index(packed, tmp_path):
    root = damaged(packed, tmp_path) / 'train'
    whole = (root / 'index.npz').read_bytes()
    for content in (b'', whole[:len(whole) // 2], b'x' * 100, whole.replace(b'bird', b'bard')):
        (root / 'index.npz').write_bytes(content)
        with pytest.raises(DataError, match=r'index\.npz is damaged'):
            read_index(root)
    with np.load(packed / 'train' / 'index.npz') as content:
        parts = dict(content)
    about = np.frombuffer(parts['about'].tobytes().replace(b'"version": 1', b'"version": 2'),
                          np.uint8)
    np.savez(root / 'index.npz', **{**parts, 'about': about})
    with pytest.raises(DataError, match='of another version of this package'):
        read_index(root)
    for field, value in (('offset', 2 ** 64 - 1), ('length', 2 ** 40), ('shard', 3), ('label', 10),
                         ('chars', 10 ** 6)):
        rows = parts['rows'].copy()
        rows[field][7] = value
        np.savez(root / 'index.npz', **{**parts, 'rows': rows})
        with pytest.raises(DataError, match=r'index\.npz is damaged'):
            read_index(root)


def test_images_are_checked_as_in_folders(tmp_path):
    """By LoadImageFromFile: an empty file, no picture, one too large to decode."""
    folder = tmp_path / 'data' / 'train' / 'a'
    folder.mkdir(parents=True)
    bomb = b'\x89PNG\r\n\x1a\n' + b''.join(
        len(data).to_bytes(4, 'big') + kind + data + zlib.crc32(kind + data).to_bytes(4, 'big')
        for kind, data in ((b'IHDR', (10 ** 6).to_bytes(4, 'big') * 2 + b'\x08\x02\0\0\0'),
                           (b'IDAT', zlib.compress(b'')), (b'IEND', b'')))
    for name, content in (('1.png', b''), ('2.png', b'no picture'), ('3.png', bomb)):
        (folder / name).write_bytes(content)
    write_shards(folder.parent, tmp_path / 'shards')
    dataset = ShardedImages(str(tmp_path / 'shards'), pipeline=[LOAD])
    for place, reason in enumerate(('it is empty', 'no picture is recognised', 'pixels')):
        name = rf'shards://.*/000000\.tar#\d+\+\d+\+[0-9a-f]{{8}}/a/{place + 1}\.png'
        with pytest.raises(DataError, match=rf'image cannot be decoded: {name} .*{reason}'):
            dataset[place]


def test_addresses(packed, monkeypatch):
    index = read_index(packed / 'train')
    address = index[0]['img_path']
    assert fileio.get_text(index[0]['img_path'], encoding='latin-1').startswith('\x89PNG')
    with pytest.raises(DataError, match='is no place in a shard'):
        fileio.get('shards://somewhere')
    monkeypatch.setattr(shards, 'MAX_PIXELS', 100)
    with pytest.raises(DataError, match='too many for 100 pixels'):
        fileio.get(address)
    monkeypatch.setattr(shards, 'MAX_PIXELS', 2 ** 28)
    # What a network returns in pieces.
    whole, read = fileio.get(address), os.pread
    monkeypatch.setattr(os, 'pread', lambda handle, length, offset: read(
        handle, min(length, 1000), offset))
    assert fileio.get(address) == whole


def test_open_files_are_bounded(folders, tmp_path, monkeypatch):
    index = write_shards(folders, tmp_path / 'shards', images=1)
    monkeypatch.setattr(shards, '_open', shards.lru_cache(2)(shards._Shard))
    before = len(os.listdir('/proc/self/fd'))
    for each in index:
        fileio.get(each['img_path'])
    assert len(os.listdir('/proc/self/fd')) == before + 2


@pytest.mark.parametrize('start', ['fork', 'spawn'])
def test_worker_processes(packed, start):
    """Open files are shared by forks; spawned ones open their own."""
    dataset = ShardedImages(str(packed), 'train', pipeline=[LOAD])
    expected = [dataset[place]['img'] for place in range(len(dataset))]
    with multiprocessing.get_context(start).Pool(2 if start == 'fork' else 1) as pool:
        found = pool.map(dataset.__getitem__, range(len(dataset)), chunksize=5)
    for first, second in zip(expected, found, strict=True):
        np.testing.assert_array_equal(first, second['img'])


def test_memory(packed):
    """Forty bytes and a name for an image; nothing is built per image until it is asked for."""
    dataset = ShardedImages(str(packed), 'train')
    assert len(pickle.dumps(dataset.data_list.rows)) < 40 * 40 + 500
    assert dataset.data_list.rows.itemsize == 40
    assert not hasattr(dataset, 'data_bytes')


@pytest.fixture(scope='module')
def config(classifier):
    """The small config, on folders."""
    pytest.importorskip('mmpretrain', reason='mmpretrain is not there')
    return classifier


def on_shards(packed):
    """What changes a config from folders to shards."""
    return {f'{split}_dataloader.dataset.{key}': value for split in ('train', 'val', 'test')
            for key, value in (('type', 'ShardedImages'), ('data_root', str(packed)))}


def test_batches_from_any_start(config, packed):
    """Bit for bit those of folders, with 0 and 2 workers and from a later step."""
    cfg = Config.fromfile(config)
    shards_cfg = cfg.copy()
    shards_cfg.merge_from_dict(on_shards(packed))

    def batches(cfg, workers, start, stop=12):
        dataset = DATASETS.build(dict(cfg.train_dataloader.dataset, _scope_='mmpretrain'))
        sampler = BatchSampler(RandomSampler(dataset), 8, drop_last=True)
        loader = CountedLoader(DataLoader(dataset, batch_sampler=sampler, num_workers=workers,
                                          collate_fn=list), 0, 1)
        loader.batch_sampler.seed, loader.batch_sampler.start = 3, start
        return [torch.stack([each['inputs'] for each in batch])
                for batch, _ in zip(loader, range(stop - start))]

    expected = batches(cfg, 0, 0)
    for workers, start in ((0, 0), (2, 0), (2, 7)):
        found = batches(shards_cfg, workers, start)
        assert len(found) == 12 - start
        assert all(map(torch.equal, found, expected[start:]))


def test_a_run_on_folders_killed_and_resumed_on_shards(config, packed, tmp_path):
    """Bit for bit the run on folders that nothing interrupted."""
    def kill(cfg):
        from mmengine.hooks import Hook
        from mmengine.registry import HOOKS

        @HOOKS.register_module(name='KillAtEightHook', force=True)
        class KillHook(Hook):
            def before_train_iter(self, runner, batch_idx, data_batch=None):
                if runner.iter == 8:
                    os.kill(os.getpid(), signal.SIGKILL)

        cfg.custom_hooks.append(dict(type='KillAtEightHook'))

    whole, work = tmp_path / 'whole', tmp_path / 'work'
    run_to_end(config, whole)
    assert finish(in_child(train, config, work, log=tmp_path / 'log',
                           before=kill)) == -signal.SIGKILL
    log = run_to_end(config, work, options={
        **on_shards(packed), 'train_dataloader.num_workers': 2,
        'train_dataloader.persistent_workers': True})
    assert 'iter: 6' in log
    assert 'different' not in log  # the classes of folders and shards
    assert differences(state(whole), state(work)) == []


def test_checks_before_a_run(config, crops, packed, tmp_path):
    cfg = Config.fromfile(config)
    cfg.merge_from_dict(on_shards(packed))
    checks.check_data(cfg, 'train', 'val')
    cfg.val_dataloader.dataset.update(type='CustomDataset', data_root=str(crops))
    checks.check_data(cfg, 'train', 'val')  # one of each
    cfg.model.head.num_classes = 1000
    with pytest.raises(ConfigError, match=r'train set has 10 classes, .* the model 1000: set '):
        checks.check_data(cfg, 'train')
    cfg.model.head.num_classes = 10
    cfg.train_dataloader.dataset.type = 'CustomDataset'
    with pytest.raises(DataError, match=r'holds shards: set train_dataloader.dataset.type=Sharded'):
        checks.check_data(cfg, 'train')
    cfg.train_dataloader.dataset.update(type='ShardedImages', data_root=str(crops))
    with pytest.raises(DataError, match=r'no index\.npz'):
        checks.check_data(cfg, 'train')
    copy = damaged(packed, tmp_path)
    os.truncate(copy / 'train' / '000002.tar', 100)
    cfg.train_dataloader.dataset.data_root = str(copy)
    with pytest.raises(DataError, match=r'cut or replaced, such as 000002\.tar'):
        checks.check_data(cfg, 'train')
    others = tmp_path / 'others'
    for name in pretrain.CROPS:
        (others / 'val' / name.replace('tree', 'shrub')).mkdir(parents=True)
        (others / 'val' / name.replace('tree', 'shrub') / 'a.png').touch()
    write_shards(others / 'val', tmp_path / 'packed' / 'val')
    cfg.train_dataloader.dataset.data_root = str(packed)
    cfg.val_dataloader.dataset.update(type='ShardedImages', data_root=str(tmp_path / 'packed'))
    with pytest.raises(DataError, match='different class folders, such as shrub'):
        checks.check_data(cfg, 'train', 'val')


def test_the_tool(crops, tmp_path):
    root = tmp_path / 'shards'
    command = ('tools/prepare_data.py', 'shards', '--source', crops, '--root', root)
    code, output = run_tool(*command, '--images', 15)
    assert code == 0, output
    assert re.search(r'train: 40 images of 10 classes in 3 shards, 0 MB\n'
                     r'  val: 10 images of 10 classes in 1 shard, ', output)
    options = dict(word.split('=') for word in output.split('--cfg-options')[1].split())
    assert options == on_shards(root)
    assert run_tool(*command, '--check')[0] == 0
    path = Path(root, 'val', '000000.tar')
    content = bytearray(path.read_bytes())
    content[700] ^= 1
    path.write_bytes(content)
    code, output = run_tool(*command, '--check')
    assert code == 1
    assert 'error: 1 of 10 images in' in output
    code, output = run_tool(*command[:-1], crops / 'train' / 'new')
    assert code == 1
    assert 'which is only read' in output
    code, output = run_tool(*command[:3], tmp_path / 'nowhere')
    assert code == 1
    assert 'neither a folder train nor val' in output
