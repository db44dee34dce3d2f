"""Many pictures with Ray: the masks of predict.py, whatever dies on the way."""
import glob
import io
import json
import os
import shutil
import signal
import tarfile
import threading
import time
from contextlib import nullcontext

import cv2
import numpy as np
import pytest
import torch
from mmseg.apis import init_model
from PIL import Image

from mmseg_edaformer.data import drawing as synthetic
from mmseg_edaformer.errors import CheckpointError, ConfigError, DataError
from mmseg_edaformer.predict import bulk as module, segmenter as predictor
from mmseg_edaformer.predict.bulk import find_samples, predict_many
from mmseg_edaformer.predict.segmenter import Segmenter, predict_pictures
from tests.conftest import ROOT, run, write_config
from tests.processes import finish, free_port, in_child

ray = pytest.importorskip('ray')
pa = pytest.importorskip('pyarrow')
parquet = pytest.importorskip('pyarrow.parquet')

COUNT = 24


@pytest.fixture(scope='module')
def work(scenes, tmp_path_factory):
    """A work dir with weights that see several classes, and can be killed by a picture."""
    folder = tmp_path_factory.mktemp('work')
    config = write_config(folder, scenes)
    torch.manual_seed(0)
    model = init_model(str(config), device='cpu')
    torch.nn.init.normal_(model.decode_head.conv_seg.weight)
    torch.save(dict(state_dict=model.state_dict(), meta={}), folder / 'best_mIoU_iter_4.pth')
    return folder


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    """Drawn pictures in two folders; read-only."""
    folder = tmp_path_factory.mktemp('photos')
    rng = np.random.default_rng(0)
    (folder / 'more').mkdir()
    for index in range(COUNT):
        image, _ = synthetic.draw_scene(rng, (128, 192 + index % 3))
        cv2.imwrite(str(folder / ('more' if index % 2 else '.') / f'{index:02}.png'), image)
    return folder


@pytest.fixture(scope='module')
def plain(work, photos, tmp_path_factory):
    """What tools/predict.py makes of them on one core: masks by name, and the summary."""
    out, threads = tmp_path_factory.mktemp('plain'), torch.get_num_threads()
    torch.set_num_threads(1)
    summary = predict_pictures(Segmenter(work, device='cpu'), [photos], out)
    torch.set_num_threads(threads)
    return masks(out), summary


@pytest.fixture(scope='module')
def connected():
    """A Ray with room for two workers."""
    with module._connected(None, 2):
        yield


@pytest.fixture
def here(monkeypatch):
    """Workers in this process: starting real ones takes seconds."""
    def run(self, rows, size):
        worker = module._Worker(self.job)
        for table in module._tables(rows, size):
            block = {name: table[name].to_numpy() for name in table.column_names}
            yield from map(json.loads, worker(block)['row'])
    monkeypatch.setattr(module._Pool, 'run', run)
    monkeypatch.setattr(module, '_connected', lambda *_: nullcontext())
    monkeypatch.setattr(module, '_count_workers', lambda asked, threads: (asked or 2, 0))
    monkeypatch.setattr(cv2, 'setNumThreads', lambda threads: None)  # for ever, after a fork
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope='module', autouse=True)
def _quiet():
    module._import_ray()


def masks(out):
    """The labels of all masks below a folder."""
    folder = out / 'masks'
    found = {path.relative_to(folder).as_posix(): np.array(Image.open(path))
             for path in sorted(folder.rglob('*.png')) if not path.name.startswith('.')}
    assert not list(out.rglob('*partial*'))
    return found


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name])
                                              for name in one)


def manifest(out):
    return [json.loads(line) for line in (out / 'manifest.jsonl').read_text().splitlines()]


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.002)
    return found


def count_masks(out):
    return len(glob.glob(f'{out}/masks/**/*.png', recursive=True))


def states(out):
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns)
            for path in (out / 'masks').rglob('*.png')}


def busy_workers():
    """Processes of workers that have a block in hand: Ray puts that in their titles."""
    found = []
    for path in glob.glob('/proc/[0-9]*/cmdline'):
        try:
            with open(path, 'rb') as file:
                title = file.read()
        except OSError:
            continue
        if title.startswith(b'ray::MapWorker(MapBatches(_Worker)).submit'):
            found.append(int(path.split('/')[2]))
    return found


def write_tar(path, members):
    with tarfile.open(path, 'w') as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def write_parquet(path, pictures, rows=5, **more):
    parquet.write_table(pa.table(dict(image=pictures, **more)), path, row_group_size=rows)


def stop_and_go_on(work, photos, plain, out):
    """Kill a driver on its way, and run again."""
    log = out.with_name('log')
    driver = in_child(predict_many, photos, work, out, workers=1, log=log)
    try:
        wait_for(lambda: count_masks(out) >= 4)
    finally:
        os.kill(driver, signal.SIGKILL)
        finish(driver)
        for folder in glob.glob(f'/tmp/ray-{driver}-*'):
            shutil.rmtree(folder, ignore_errors=True)
    wait_for(lambda: not busy_workers())
    before = states(out)
    assert 4 <= len(before) < COUNT
    assert not (out / 'manifest.jsonl').exists()
    summary = predict_many(photos, work, out, workers=1)
    assert summary['kept'] == len(before)
    assert before.items() <= states(out).items()
    assert same(masks(out), plain[0])
    assert {os.path.basename(entry.pop('picture')): entry for entry in manifest(out)} == {
        os.path.basename(path): entry for path, entry in plain[1]['pictures'].items()}
    assert (summary['pictures'], summary['shares']) == (COUNT, plain[1]['shares'])


def test_a_killed_run_goes_on(here, work, photos, plain, tmp_path):
    stop_and_go_on(work, photos, plain, tmp_path / 'out')


@pytest.mark.soak
def test_with_ray_a_killed_run_goes_on_and_its_workers_end(work, photos, plain, tmp_path):
    stop_and_go_on(work, photos, plain, tmp_path / 'out')


def test_a_killed_worker_loses_nothing_and_does_nothing_twice(
        connected, work, photos, plain, tmp_path):
    out, killed = tmp_path / 'out', []

    def kill():
        wait_for(lambda: count_masks(out) >= 4)
        killed.append(wait_for(busy_workers)[0])
        os.kill(killed[0], signal.SIGKILL)
        killed.append(count_masks(out))
    killer = threading.Thread(target=kill)
    killer.start()
    summary = predict_many(photos, work, out, workers=2)
    killer.join()
    assert killed[1] < COUNT
    assert not os.path.exists(f'/proc/{killed[0]}')
    assert same(masks(out), plain[0])
    assert [entry['picture'] for entry in manifest(out)] == list(dict.fromkeys(
        os.path.relpath(path, out)
        for path in sorted(photos.glob('*.png')) + sorted(photos.glob('more/*'))))
    assert (summary['pictures'], summary['skipped'], summary['workers']) == (COUNT, {}, 2)
    assert json.loads((out / 'summary.json').read_text()) == summary
    assert sorted(os.listdir(out)) == ['legend.png', 'manifest.jsonl', 'masks', 'summary.json']


def test_other_settings_are_predicted_anew_and_predict_py_goes_on(here, work, photos, tmp_path):
    segmenter, some, out = Segmenter(work, device='cpu'), photos / '0[0-5].png', tmp_path / 'out'
    wanted = predict_pictures(segmenter, [some], out)
    assert predict_many(some, work, out, overlays=True)['kept'] == 3
    os.remove(out / 'masks' / '02.png')
    summary = predict_many(some, work, out)  # an overlay more than asked for does no harm
    assert summary['kept'] == 2
    assert not (out / 'overlays' / '02.jpg').exists()
    assert predict_many(some, work, out, overlays=True)['kept'] == 2
    assert predict_pictures(segmenter, [some], out)['kept'] == 3
    other = predict_many(some, work, out, isr='optimal')
    assert (other['kept'], other['isr_ratio']) == (0, '2211-222')
    assert not list((out / 'overlays').iterdir())
    assert other['shares'] != summary['shares'] == wanted['shares']


def test_large_images_and_max_side(here, work, photos, tmp_path, caplog, monkeypatch):
    some = photos / '0[0-2].png'
    for name, value in dict(LARGE=128 * 160, _QUICK=0).items():
        monkeypatch.setattr(predictor, name, value)
    for kept in 0, 2:
        summary = predict_many(some, work, tmp_path / 'auto')
        assert summary['isr_ratio'] == 'auto'
        assert summary['kept'] == kept
    assert 'an image of 192x128 pixels takes about 0 s on cpu at ISR ratio auto' in (
        caplog.messages[0])
    segmenter = Segmenter(work, device='cpu', isr='auto')
    predict_pictures(segmenter, [some], tmp_path / 'wanted')
    assert same(masks(tmp_path / 'auto'), masks(tmp_path / 'wanted'))
    summary = predict_many(some, work, tmp_path / 'small', max_side=64)
    assert (summary['isr_ratio'], summary['skipped']) == ('none', {})
    predict_pictures(Segmenter(work, device='cpu', max_side=64), [some], tmp_path / 'less')
    assert same(masks(tmp_path / 'small'), masks(tmp_path / 'less'))
    assert not same(masks(tmp_path / 'small'), masks(tmp_path / 'wanted'))


def test_a_folder_with_entries_that_are_no_pictures(here, work, photos, tmp_path):
    folder, out = tmp_path / 'photos', tmp_path / 'out'
    folder.mkdir()
    for name in b'a.png', b'\xe9.png', b'n' * 251 + b'.png', b'n' * 250 + b'm.png':
        shutil.copy(photos / '00.png', folder / os.fsdecode(name))
    (folder / 'gone.png').symlink_to('nowhere')
    (folder / 'loop.png').symlink_to('loop.png')
    (folder / 'here').symlink_to('.')
    os.mkfifo(folder / 'pipe.png')
    first = predict_many(folder, work, out)
    assert (first['pictures'], first['kept']) == (4, 0)
    bad = [f'../photos/{name}.png' for name in ('gone', 'loop', 'pipe')]
    assert sorted(first['skipped']) == bad
    assert {entry['picture'] for entry in manifest(out)} >= {*bad, '../photos/\\xe9.png'}
    assert '\\ud' not in (out / 'manifest.jsonl').read_text() + (out / 'summary.json').read_text()
    again = predict_many(folder, work, out)
    assert (again['kept'], again['seconds']) == (4, first['seconds'])
    plain = predict_pictures(Segmenter(work, device='cpu'), [folder], tmp_path / 'plain')
    assert plain['skipped'].keys() == first['skipped'].keys()
    assert same(masks(out), masks(tmp_path / 'plain'))


def test_shards(here, work, photos, plain, tmp_path):
    shards = tmp_path / 'shards'
    shards.mkdir()
    files = sorted(photos.rglob('*.png'), key=lambda path: path.name)
    content = [path.read_bytes() for path in files]
    wanted = [plain[0][path.relative_to(photos).as_posix()] for path in files]
    write_tar(shards / 'a.tar', [
        ('./one/00.cls', b'7'), ('./one/00.png', content[0]), ('one/00.seg.png', b'no picture'),
        ('one/01.PNG', content[1]), ('02.png', b'words'), ('../03.png', content[3])])
    write_tar(shards / 'cut.tar', [(f'{i:02}.png', content[i]) for i in (4, 5, 6)])
    whole = (shards / 'cut.tar').read_bytes()
    (shards / 'cut.tar').write_bytes(whole[:whole.rindex(b'06.png') + 2000])
    (shards / 'no.tar').write_text('words' * 300)
    (shards / 'gone.tar').symlink_to('nowhere')
    (shards / 'no.parquet').write_text('words')
    write_parquet(shards / 'b.parquet', [
        dict(bytes=content[7], path='07.png'), dict(bytes=None, path='08.png'),
        dict(bytes=b'words', path=None), dict(bytes=content[9], path='/abs/09.png'),
        *(dict(bytes=each, path=None) for each in content[10:20])])
    write_parquet(shards / 'c.parquet', content[20:24], label=[0, 1, 2, 3])
    os.rename(shards / 'c.parquet', shards / os.fsdecode(b'\xe9.parquet'))  # no UTF-8
    summary = predict_many(shards, work, tmp_path / 'out', workers=2)
    found = masks(tmp_path / 'out')
    assert same(found, {
        'one/00.png': wanted[0], 'one/01.png': wanted[1], '04.png': wanted[4], '05.png': wanted[5],
        '07.png': wanted[7], 'abs/09.png': wanted[9],
        **{f'b/{row:06}.png': wanted[row + 6] for row in range(4, 14)},
        **{os.fsdecode(b'\xe9/%06d.png' % row): wanted[row + 20] for row in range(4)}})
    says = {place.removeprefix('../shards/'): reason
            for place, reason in summary['skipped'].items()}
    assert {place: next((part for part in (
        'name leads out', 'its format is unknown', 'the shard ends before it does',
        'cut off or damaged after 3 files', 'cut off or damaged after 0 files', 'is damaged (',
        'holds no picture', 'is a broken link') if part in reason), reason)
        for place, reason in says.items()} == {
            'a.tar#../03.png': 'name leads out', 'a.tar#02.png': 'its format is unknown',
            'cut.tar#06.png': 'the shard ends before it does',
            'cut.tar': 'cut off or damaged after 3 files',
            'no.tar': 'cut off or damaged after 0 files', 'no.parquet': 'is damaged (',
            'gone.tar': 'is a broken link',
            'b.parquet#1': 'holds no picture', 'b.parquet#2': 'its format is unknown'}
    assert all(str(shards) in reason and 'sample://' not in reason
               for reason in summary['skipped'].values())
    entries = manifest(tmp_path / 'out')
    assert len({entry['picture'] for entry in entries}) == len(entries) == len(found) + len(says)
    assert summary['pictures'] == len(found) == 20
    assert predict_many(shards, work, tmp_path / 'out', workers=2)['kept'] == 20
    # A shard made anew is predicted anew, its neighbours are not.
    os.utime(shards / os.fsdecode(b'\xe9.parquet'), (1, 1))
    assert predict_many(shards, work, tmp_path / 'out', workers=2)['kept'] == 16


def test_the_column(photos, tmp_path):
    picture = (photos / '00.png').read_bytes()
    write_parquet(tmp_path / 'two.parquet', [1], one=[picture], other=[picture])
    with pytest.raises(DataError, match=r'several columns of encoded .* name one of one, other'):
        find_samples(tmp_path / 'two.parquet')
    assert len(find_samples(tmp_path / 'two.parquet', column='other')[0]) == 1
    with pytest.raises(DataError, match='no column none of encoded pictures, its columns are ima'):
        find_samples(tmp_path / 'two.parquet', column='none')
    write_parquet(tmp_path / 'words.parquet', ['word'])
    with pytest.raises(DataError, match=r'words.parquet has no encoded pictures'):
        find_samples(tmp_path / 'words.parquet')
    write_tar(tmp_path / 'two.tar', [('a.jpg', picture), ('a.png', picture)])
    with pytest.raises(DataError, match=r'the sample a in .*two.tar has jpg and png: say with'):
        find_samples(tmp_path / 'two.tar')
    [sample], _ = find_samples(tmp_path / 'two.tar', column='jpg')
    assert sample.name == 'a.jpg'
    write_tar(tmp_path / 'none.tar', [('a.txt', b'words')])
    with pytest.raises(DataError, match=r'none.tar holds no sample that ends in \.avif'):
        find_samples(tmp_path / 'none.tar')
    with pytest.raises(ConfigError, match=r'--column x is for .tar and .parquet'):
        find_samples(photos, column='x')


def test_hostile_names_stay_within_the_results(photos, tmp_path):
    picture = (photos / '00.png').read_bytes()
    write_tar(tmp_path / 'x.tar', [
        ('../../a.png', picture), ('b/../../c.png', picture), ('/etc/d.png', picture),
        ('e/' * 1000 + 'e.png', picture), ('f\x1b[2J.png', picture)])
    samples, skipped = find_samples(tmp_path / 'x.tar')
    assert [sample.name for sample in samples] == ['etc/d.png', 'f\x1b[2J.png']
    assert len(skipped) == 3


@pytest.mark.parametrize(('source', 'says'), [
    ('none', 'no such file or folder: .*none'),
    ('empty', 'no picture in the folder .*empty: nothing below it ends in .*parquet'),
    ('*.webp', 'no file matches'),
    ('page.pdf', r'page.pdf is neither a picture nor a shard, which end in .tar or .parquet$'),
    ('x.tar.gz', r'x.tar.gz is neither .*: unpack it'),
    ('both', 'holds pictures and shards: give a pattern'),
    ('twice', r'a.tar#0.png and .*b.tar#0.png would be written under one name'),
    ('again.tar', r'again.tar#0.png is there twice'),
    ('words.tar', r'not one picture can be read: .*words.tar is cut off or damaged'),
])
def test_bad_input(work, photos, tmp_path, source, says):
    picture = (photos / '00.png').read_bytes()
    for folder in 'empty', 'both', 'twice':
        (tmp_path / folder).mkdir()
    for name in 'page.pdf', 'x.tar.gz', 'both/x.png', 'words.tar':
        (tmp_path / name).write_text('words')
    for name in 'both/x.tar', 'twice/a.tar', 'twice/b.tar':
        write_tar(tmp_path / name, [('0.png', picture)])
    write_tar(tmp_path / 'again.tar', [('0.png', picture), ('0.png', picture)])
    with pytest.raises(DataError, match=says):
        predict_many(tmp_path / source, work, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_what_cannot_work_is_said_at_once(work, photos, tmp_path, monkeypatch):
    (tmp_path / 'file').write_text('')
    with pytest.raises(ConfigError, match='file cannot be written to'):
        predict_many(photos, work, tmp_path / 'file')
    with pytest.raises(CheckpointError, match='does not fit the model'):
        predict_many(photos, ROOT / 'configs' / 'edaformer_t_synthetic.py', tmp_path / 'out',
                     checkpoint=work / 'best_mIoU_iter_4.pth')
    for wrong in dict(workers=0), dict(threads=0):
        with pytest.raises(ConfigError, match='must be 1 or more'):
            predict_many(photos, work, tmp_path / 'out', **wrong)
    port = free_port()
    for address in f'ray://127.0.0.1:{port}', f'127.0.0.1:{port}', 'host:word':
        with pytest.raises(ConfigError, match=f'no Ray answers at {address} .*: start one with'):
            predict_many(photos, work, tmp_path / 'out', address=address)
    assert sorted(os.listdir(tmp_path / 'out')) == ['legend.png', 'masks']
    monkeypatch.setitem(__import__('sys').modules, 'ray', None)
    with pytest.raises(ConfigError, match=rf'pip install -e .*{ROOT}\[cluster\]'):
        predict_many(photos, work, tmp_path / 'out')


def test_too_many_workers(connected, work, photos, tmp_path):
    with pytest.raises(ConfigError, match='Ray has 2 cores and 0 GPUs, room for 2 workers'):
        predict_many(photos, work, tmp_path / 'out', workers=3)


def test_a_machine_that_sees_nothing_or_another_model(here, work, photos, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(module, '_roots', lambda samples: ('/nowhere',))
        with pytest.raises(ConfigError, match='does not see /nowhere: pictures, model and result'):
            predict_many(photos, work, tmp_path / 'out')
    prints = iter(['mine', 'theirs'])
    monkeypatch.setattr(Segmenter, 'fingerprint', lambda self: next(prints))
    with pytest.raises(ConfigError, match=r'has another model in .*best_mIoU_iter_4.pth than the'):
        predict_many(photos, work, tmp_path / 'out')


def test_not_one_picture(here, work, tmp_path):
    for name in 'a.png', 'b.png':
        (tmp_path / name).write_text('words')
    with pytest.raises(DataError, match=r'not one picture can be read: .*a.png'):
        predict_many(tmp_path, work, tmp_path / 'out')
    assert sorted(os.listdir(tmp_path / 'out')) == ['legend.png', 'masks']


def test_what_does_not_fit_into_memory_is_listed(here, work, photos, tmp_path, monkeypatch):
    own = Segmenter._labels

    def labels(self, batch):
        if batch[0]['inputs'].shape[2] == 193:
            raise DataError('an image of 193x128 pixels does not fit')
        return own(self, batch)
    monkeypatch.setattr(Segmenter, '_labels', labels)
    summary = predict_many(photos / '*.png', work, tmp_path / 'out', batch_size=6)
    assert len(summary['skipped']) == 4
    assert summary['pictures'] == count_masks(tmp_path / 'out') == 8


def test_a_defect_keeps_its_traceback(here, work, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(Segmenter, '_labels', lambda self, batch: 1 / 0)
    with pytest.raises(RuntimeError, match=r'(?s)Traceback .*ZeroDivisionError'):
        predict_many(photos, work, tmp_path / 'out')


@pytest.mark.soak
def test_a_picture_that_kills_its_worker_is_listed_and_the_others_are_done(
        work, photos, plain, tmp_path):
    (tmp_path / 'deadly.py').write_text('''
import os
from mmseg.registry import TRANSFORMS

@TRANSFORMS.register_module()
class Deadly:
    def __call__(self, results):
        if results['img_path'].endswith('/05.png'):
            os.kill(os.getpid(), 9)
        return results
''')
    (tmp_path / 'mini.py').write_text((work / 'mini.py').read_text() + '''
custom_imports = dict(imports=['deadly'])
test_dataloader = dict(dataset=dict(data_root=data_root, pipeline=[
    dict(type='LoadImageFromFile'), dict(type='Deadly'), dict(type='PackSegInputs')]))
''')
    done = run('tools/predict_many.py', photos, '--model', tmp_path / 'mini.py', '--checkpoint',
               work / 'best_mIoU_iter_4.pth', '--out', tmp_path / 'out', '--workers', 1,
               env=dict(os.environ, PYTHONPATH=f'{tmp_path}:{ROOT}'))  # two in a block
    assert '23 pictures at ISR ratio none, 1 skipped\n' in done.stdout
    assert 'Warning' not in done.stderr
    summary = json.loads((tmp_path / 'out' / 'summary.json').read_text())
    [place] = summary['skipped']
    assert os.path.samefile(tmp_path / 'out' / place, photos / 'more' / '05.png')
    assert 'its worker died 3 times over it' in summary['skipped'][place]
    assert summary['pictures'] == COUNT - 1
    assert same({**masks(tmp_path / 'out'), 'more/05.png': 0}, {**plain[0], 'more/05.png': 0})
