"""Many images with Ray: the masks of predict.py, whatever dies on the way."""
import glob
import json
import os
import pickle
import shutil
import signal
import threading
import time
from contextlib import nullcontext

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from mmseg_edaformer.data import drawing
from mmseg_edaformer.errors import CheckpointError, ConfigError, DataError
from mmseg_edaformer.predict import bulk, segmenter as segmenters
from mmseg_edaformer.predict.bulk import predict_many
from mmseg_edaformer.predict.ray_pool import connect, import_ray
from mmseg_edaformer.predict.run import predict_images
from mmseg_edaformer.predict.segmenter import Segmenter
from mmseg_edaformer.predict.shards import Sample
from tests.conftest import ROOT, run
from tests.predict.test_shards import write_parquet, write_tar
from tests.processes import finish, free_port, in_child, run_tool

ray = pytest.importorskip('ray')

COUNT = 24


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    """Drawn images in two folders; read-only."""
    folder = tmp_path_factory.mktemp('photos')
    rng = np.random.default_rng(0)
    (folder / 'more').mkdir()
    for index in range(COUNT):
        image, _ = drawing.draw_scene(rng, (128, 192 + index % 3))
        cv2.imwrite(str(folder / ('more' if index % 2 else '.') / f'{index:02}.png'), image)
    return folder


@pytest.fixture(scope='module')
def plain(work, photos, tmp_path_factory):
    """What tools/predict.py makes of them on one core: masks by name, and the summary."""
    out, threads = tmp_path_factory.mktemp('plain'), torch.get_num_threads()
    torch.set_num_threads(1)
    summary = predict_images(Segmenter(work, device='cpu'), [photos], out)
    torch.set_num_threads(threads)
    return masks(out), summary


@pytest.fixture(scope='module')
def connected():
    """A Ray with room for two workers."""
    import_ray()
    with connect(None, 2):
        yield


@pytest.fixture
def here(monkeypatch):
    """Workers in this process: starting real ones takes seconds."""
    def run_workers(items, expand, worker, arguments, *, batch_size, **_):
        predict = worker(*arguments)
        rows = items if expand is None else [row for item in items for row in expand(item)]
        for start in range(0, len(rows), batch_size):
            yield from predict(rows[start:start + batch_size])
    monkeypatch.setattr(bulk, 'run_workers', run_workers)
    monkeypatch.setattr(bulk, 'connect', lambda *_: nullcontext())
    monkeypatch.setattr(bulk, 'count_workers', lambda workers, threads: (workers or 2, 0))
    monkeypatch.setattr(cv2, 'setNumThreads', lambda threads: None)  # for ever, after a fork
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def masks(out):
    """The labels of all masks below a folder."""
    folder = out / 'masks'
    labels = {path.relative_to(folder).as_posix(): np.array(Image.open(path))
              for path in sorted(folder.rglob('*.png')) if not path.name.startswith('.')}
    assert not list(out.rglob('*partial*'))
    return labels


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name])
                                              for name in one)


def manifest(out):
    return [json.loads(line) for line in (out / 'manifest.jsonl').read_text().splitlines()]


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end
        time.sleep(0.002)
    return value


def count_masks(out):
    return len(glob.glob(f'{out}/masks/**/*.png', recursive=True))


def states(out):
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns)
            for path in (out / 'masks').rglob('*.png')}


def busy_workers():
    """Processes of workers that have a batch in hand: Ray puts that in their titles."""
    pids = []
    for path in glob.glob('/proc/[0-9]*/cmdline'):
        try:
            with open(path, 'rb') as file:
                title = file.read()
        except OSError:
            continue
        if title.startswith(b'ray::MapWorker(MapBatches(_Worker)).submit'):
            pids.append(int(path.split('/')[2]))
    return pids


def stop_and_resume(work, photos, plain, out):
    """Kill a driver on its way, and run again."""
    driver = in_child(predict_many, photos, work, out, workers=1, log=out.with_name('log'))
    try:
        wait_for(lambda: count_masks(out) >= 4)
    finally:
        os.kill(driver, signal.SIGKILL)
        finish(driver)
    wait_for(lambda: not busy_workers())
    before = states(out)
    assert 4 <= len(before) < COUNT
    assert not (out / 'manifest.jsonl').exists()
    summary = predict_many(photos, work, out, workers=1)
    assert summary['kept'] == len(before)
    assert before.items() <= states(out).items()
    assert same(masks(out), plain[0])
    assert {os.path.basename(entry.pop('image')): entry for entry in manifest(out)} == {
        os.path.basename(path): entry for path, entry in plain[1]['images'].items()}
    assert (summary['images'], summary['shares']) == (COUNT, plain[1]['shares'])


def test_a_killed_run_resumes(here, work, photos, plain, tmp_path):
    stop_and_resume(work, photos, plain, tmp_path / 'out')


@pytest.mark.soak
def test_with_ray_a_killed_run_resumes_and_its_workers_end(work, photos, plain, tmp_path):
    stop_and_resume(work, photos, plain, tmp_path / 'out')


@pytest.mark.parametrize('kills', [False, pytest.param(True, marks=pytest.mark.soak)])
def test_with_ray_a_killed_worker_loses_nothing_and_does_nothing_twice(
        connected, work, photos, plain, tmp_path, kills):
    source, out, killed = tmp_path / 'source', tmp_path / 'out', []
    source.mkdir()
    for path in photos.glob('*.png'):
        shutil.copy(path, source)
    write_tar(source / 'more.tar', [
        (path.name, path.read_bytes()) for path in sorted(photos.glob('more/*'))])

    def kill():
        wait_for(lambda: count_masks(out) >= 4)
        killed.append(wait_for(busy_workers)[0])
        os.kill(killed[0], signal.SIGKILL)
        killed.append(count_masks(out))
    killer = threading.Thread(target=kill)
    if kills:
        killer.start()
    summary = predict_many(source, work, out, workers=2)
    if kills:
        killer.join()
        assert killed[1] < COUNT
        assert not os.path.exists(f'/proc/{killed[0]}')
    assert same(masks(out), plain[0])
    assert [entry['image'] for entry in manifest(out)] == [
        *(f'../source/{index:02}.png' for index in range(0, COUNT, 2)),
        *(f'../source/more.tar#{index:02}.png' for index in range(1, COUNT, 2))]
    assert (summary['images'], summary['skipped'], summary['workers']) == (COUNT, {}, 2)
    assert json.loads((out / 'summary.json').read_text()) == summary
    assert sorted(os.listdir(out)) == ['legend.png', 'manifest.jsonl', 'masks', 'summary.json']
    with pytest.raises(ConfigError, match='Ray has 2 cores and 0 GPUs, room for 2 workers'):
        predict_many(photos, work, out, workers=3)


def test_an_image_that_kills_its_worker_is_skipped(work, photos, plain, tmp_path, monkeypatch):
    names = [f'{index:02}.png' for index in range(0, 12, 2)]
    worker = bulk._Worker(dict(model=str(work)), tmp_path, 1, False,
                          Segmenter(work, device='cpu').fingerprint())
    load = Segmenter.load

    def deadly(self, item):
        if str(item).endswith('04.png'):
            os._exit(9)
        return load(self, item)
    monkeypatch.setattr(Segmenter, 'load', deadly)
    monkeypatch.setattr(cv2, 'setNumThreads', lambda threads: None)
    batch = [Sample(str(photos / name), name[:-4], name) for name in names]

    def predict():
        torch.set_num_threads(1)
        (tmp_path / 'results').write_bytes(pickle.dumps(worker(batch)))
    assert [finish(in_child(predict)) for _ in range(4)] == [9, 9, 9, 0]
    results = pickle.loads((tmp_path / 'results').read_bytes())
    assert [result.address for result in results] == names
    assert [bool(result.reason) for result in results] == [name == '04.png' for name in names]
    assert results[2].reason.startswith(f'{names[2]}: its worker died three times over it')
    assert same({**masks(tmp_path), '04.png': plain[0]['04.png']},
                {name: plain[0][name] for name in names})


def test_other_settings_are_predicted_anew_and_predict_py_resumes(here, work, photos, tmp_path,
                                                                  caplog, monkeypatch):
    segmenter, some, out = Segmenter(work, device='cpu'), photos / '0[0-5].png', tmp_path / 'out'
    wanted = predict_images(segmenter, [some], out)
    assert predict_many(some, work, out, overlays=True)['kept'] == 3
    os.remove(out / 'masks' / '02.png')
    summary = predict_many(some, work, out)  # an overlay more than asked for does no harm
    assert summary['kept'] == 2
    assert not (out / 'overlays' / '02.jpg').exists()
    assert predict_many(some, work, out, overlays=True)['kept'] == 2
    assert predict_images(segmenter, [some], out)['kept'] == 3
    other = predict_many(some, work, out, isr_ratio='optimal')
    assert (other['kept'], other['isr_ratio']) == (0, '2211-222')
    assert not list((out / 'overlays').iterdir())
    assert other['shares'] != summary['shares'] == wanted['shares']
    monkeypatch.setattr(segmenters, '_QUICK', 0)
    monkeypatch.setattr(Segmenter, '_estimate', lambda self, view: 7.)
    assert predict_many(some, work, out, max_side=64)['kept'] == 0
    assert 'an image of 192x128 pixels takes about 7 s on cpu' in caplog.text


def test_shards(here, work, photos, plain, tmp_path):
    shards, out = tmp_path / 'shards', tmp_path / 'out'
    shards.mkdir()
    files = sorted(photos.glob('*.png'))
    content = [path.read_bytes() for path in files]
    write_tar(shards / 'a.tar', [('x/0.png', content[0]), ('../1.png', b''), ('2.png', b'words')])
    write_parquet(shards / os.fsdecode(b'b\xe9.parquet'), content[3:9])
    (shards / 'c.tar').write_text('words')
    shutil.copy(files[9], shards / 'd.png')
    summary = predict_many(shards, work, out, workers=2)
    assert same(masks(out), {'a/x/0.png': plain[0][files[0].name], 'd.png': plain[0][files[9].name],
                             **{os.fsdecode(b'b\xe9/%06d.png' % row): plain[0][path.name]
                                for row, path in enumerate(files[3:9])}})
    expected = {'a.tar#../1.png': 'name leads out', 'a.tar#2.png': 'its format is unknown',
                'c.tar': 'is damaged after 0 images ('}
    for (place, reason), (name, says) in zip(summary['skipped'].items(), expected.items()):
        assert place == f'../shards/{name}'
        assert str(shards / name) in reason
        assert says in reason
    assert [entry['image'].removeprefix('../shards/') for entry in manifest(out)] == [
        'a.tar#x/0.png', 'a.tar#../1.png', 'a.tar#2.png',
        *(f'b\\xe9.parquet#{row}' for row in range(6)), 'c.tar', 'd.png']
    assert (summary['images'], summary['kept'], len(summary['skipped'])) == (8, 0, 3)
    assert predict_many(shards, work, out, workers=2)['kept'] == 8
    os.utime(shards / os.fsdecode(b'b\xe9.parquet'), (1, 1))  # a new shard is predicted anew
    assert predict_many(shards, work, out, workers=2)['kept'] == 2
    for name, content, says in (
            ('e.parquet', ['words'], r'e.parquet has no encoded images, its columns are image$'),
            ('words.tar', [('0.png', b'words')], 'no image can be read: .*words.tar#0.png')):
        (write_tar if name == 'words.tar' else write_parquet)(tmp_path / name, content)
        with pytest.raises(DataError, match=says):
            predict_many(tmp_path / name, work, tmp_path / 'none')
        assert not (tmp_path / 'none' / 'summary.json').exists()


def test_bad_arguments(work, photos, tmp_path, monkeypatch):
    (tmp_path / 'file').write_text('')
    with pytest.raises(ConfigError, match='file cannot be written to'):
        predict_many(photos, work, tmp_path / 'file')
    with pytest.raises(CheckpointError, match='does not fit the model'):
        predict_many(photos, ROOT / 'configs' / 'edaformer_t_synthetic.py', tmp_path / 'out',
                     checkpoint=work / 'best_mIoU_iter_4.pth')
    for wrong in dict(workers=0), dict(threads=0), dict(column='x'):
        with pytest.raises(ConfigError, match=r'must be 1 or more|--column x is'):
            predict_many(photos, work, tmp_path / 'out', **wrong)
    port = free_port()
    for address in f'ray://127.0.0.1:{port}', f'127.0.0.1:{port}', 'host:word':
        with pytest.raises(ConfigError, match=f'no Ray answers at {address} .*: start one with'):
            predict_many(photos, work, tmp_path / 'out', address=address)
    assert os.listdir(tmp_path / 'out') == ['legend.png']
    monkeypatch.setitem(__import__('sys').modules, 'ray', None)
    with pytest.raises(ConfigError, match=rf'pip install -e .*{ROOT}\[cluster\]'):
        predict_many(photos, work, tmp_path / 'out')


def test_a_machine_that_sees_nothing_or_another_model(here, work, photos, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(bulk.os.path, 'commonpath', lambda paths: '/nowhere')
        with pytest.raises(ConfigError, match='does not see /nowhere: images, model and results'):
            predict_many(photos, work, tmp_path / 'out')
    prints = iter(['mine', 'theirs'])
    monkeypatch.setattr(Segmenter, 'fingerprint', lambda self: next(prints))
    with pytest.raises(ConfigError, match=r'has another model in .*best_mIoU_iter_4.pth than the'):
        predict_many(photos, work, tmp_path / 'out')


def test_the_tool(here, work, photos, tmp_path):
    def predict(source, model=work):
        return run_tool('tools/predict_many.py', source, '--model', model, '--out', tmp_path)
    code, text = predict(photos / '0[0-4].png')
    assert code == 0
    assert text.startswith(f'{work}/best_mIoU_iter_4.pth, 8 classes, on 2 CPU workers with 1 ')
    assert '3 images at ISR ratio none' in text
    assert f'masks, legend.png, manifest.jsonl and summary.json are in {tmp_path}\n' in text
    (tmp_path / 'bad.png').write_text('words')
    for arguments, says in {(tmp_path / 'bad.png',): 'no image can be read: ',
                            (tmp_path / 'no.tar',): f'no such file or folder: {tmp_path}/no.tar',
                            (photos, 'no.safetensors'): 'no such model: no.safetensors'}.items():
        code, text = predict(*arguments)
        assert code == 1
        assert f'error: {says}' in text


@pytest.mark.soak
def test_with_ray_an_image_that_kills_its_worker_is_skipped(work, photos, plain, tmp_path):
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
    test_pipeline[0], dict(type='Deadly'), *test_pipeline[1:]]))
''')
    done = run('tools/predict_many.py', photos, '--model', tmp_path / 'mini.py', '--checkpoint',
               work / 'best_mIoU_iter_4.pth', '--out', tmp_path / 'out', '--workers', 1,
               env=dict(os.environ, PYTHONPATH=f'{tmp_path}:{ROOT}'))
    assert '23 images at ISR ratio none, 1 skipped\n' in done.stdout
    assert 'Warning' not in done.stderr
    summary = json.loads((tmp_path / 'out' / 'summary.json').read_text())
    [place] = summary['skipped']
    assert os.path.samefile(tmp_path / 'out' / place, photos / 'more' / '05.png')
    assert 'its worker died three times over it' in summary['skipped'][place]
    assert summary['images'] == COUNT - 1
    assert same({**masks(tmp_path / 'out'), 'more/05.png': 0}, {**plain[0], 'more/05.png': 0})
