"""Tools on a folder of images and one of masks, with a model of transformers and no config."""
import json

import numpy as np
import pytest
from PIL import Image

pytest.importorskip('transformers', reason='this checks models of transformers')

from mmseg_edaformer.analysis.bench import open_folders
from mmseg_edaformer.analysis.benchmark import Plan, load_contenders, run
from mmseg_edaformer.analysis.labelled import LabelledImages, score, unpack_dataset
from mmseg_edaformer.analysis.sweep import sweep_bench
from mmseg_edaformer.analysis.sweep_report import Goal
from mmseg_edaformer.analysis.visualize import visualize
from mmseg_edaformer.errors import ConfigError, DataError
from mmseg_edaformer.predict.run import predict_images
from mmseg_edaformer.predict.segmenter import Segmenter
from tests.predict.foreign_models import NAMES, save, scene
from tests.processes import done, run_tool


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A model, images, and masks that hold its predictions but for a seventh of the pixels."""
    folder = tmp_path_factory.mktemp('labelled')
    save(folder / 'model', 'Segformer')
    segmenter = Segmenter(folder / 'model', device='cpu')
    for kind in ('images', 'masks'):
        (folder / kind).mkdir()
    for index in range(3):
        image = scene(64 + 10 * index, 96)
        Image.fromarray(image).save(folder / 'images' / f'{index}.png')
        labels = segmenter(folder / 'images' / f'{index}.png').labels.copy()
        labels[:, ::7] = (labels[:, ::7] + 1) % 7
        labels[:5] = 255
        Image.fromarray(labels).save(folder / 'masks' / f'{index}.png')
    return folder


def test_a_sweep_without_a_config(folder, tmp_path):
    segmenter = Segmenter(folder / 'model', device='cpu')
    bench = open_folders(segmenter, folder / 'images', folder / 'masks', folder=tmp_path)
    told = []
    rows = sweep_bench(bench, tmp_path, [str(folder / 'model'), ''], isr_ratios=['none', '2'],
                       goal=Goal(max_drop=99), say=told.append)
    by_ratio = {row.isr_ratio: row for row in rows}
    assert set(by_ratio) == {'none', '2', 'scale 0.5', 'scale 0.75', 'scale 0.9'}
    assert by_ratio['none'].miou > max(50, by_ratio['2'].miou)
    assert by_ratio['2'].gmacs < by_ratio['none'].gmacs
    summary = predict_images(segmenter, [folder / 'images'], tmp_path / 'out')
    metrics = score(summary, tmp_path / 'out', folder / 'masks')
    assert metrics['mIoU'] == round(by_ratio['none'].miou, 2)
    assert metrics['accuracy'] == pytest.approx(600 / 7, abs=1)
    assert set(metrics['IoU']) <= set(NAMES)
    again = open_folders(segmenter, folder / 'images', folder / 'masks', folder=tmp_path)
    assert again.count('2') == 3


def test_masks_that_begin_with_one(folder, tmp_path):
    shifted = LabelledImages(Segmenter(folder / 'model', device='cpu'), folder / 'images',
                             folder / 'masks', reduce_zero_label=True)
    plain = np.array(Image.open(folder / 'masks' / '0.png')).astype(int)
    labels = shifted[0]['data_samples'].gt_sem_seg.data[0].numpy()
    assert (labels == np.where(plain % 255 == 0, 255, plain - 1)).all()
    with pytest.raises(DataError, match='0 masks called'):
        LabelledImages(shifted.segmenter, folder / 'images', tmp_path)[0]


def test_a_data_set_of_hugging_face(folder, tmp_path, monkeypatch, capfd):
    """In parquet, images as bytes beside their masks; the sweep keeps what it measured."""
    datasets = pytest.importorskip('datasets', reason='this reads data sets of Hugging Face')
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', str(tmp_path / 'cache'))
    files = {kind: sorted((folder / kind).glob('*.png')) for kind in ('images', 'masks')}
    kinds = datasets.Features(image=datasets.Image(), label=datasets.Image(),
                              place=datasets.Value('string'))
    rows = [dict(image=str(image), label=str(mask), place='here') for image, mask in zip(
        *files.values())]
    for split, count in (('train', 1), ('validation', 3)):
        datasets.Dataset.from_list(rows[:count], kinds).to_parquet(
            tmp_path / 'set' / 'data' / f'{split}-00000-of-00001.parquet')
    images, masks = unpack_dataset(str(tmp_path / 'set'), tmp_path / 'out' / 'data')
    for place, kind in ((images, 'images'), (masks, 'masks')):
        assert [path.read_bytes() for path in sorted(place.iterdir())] == [
            path.read_bytes() for path in files[kind]]
    before = {path: path.stat().st_mtime_ns for path in images.iterdir()}
    (images / '000007.png').touch()
    (tmp_path / 'own' / 'images').mkdir(parents=True)
    (tmp_path / 'own' / 'images' / 'holiday.png').touch()
    with pytest.raises(DataError, match='holds files that are not of a data set'):
        unpack_dataset(str(tmp_path / 'set'), tmp_path / 'own')
    assert (tmp_path / 'own' / 'images' / 'holiday.png').exists()
    code, text = run_tool('tools/isr_sweep.py', '--model', folder / 'model', '--dataset',
                          tmp_path / 'set', '--isr-ratio', 'none', '--out', tmp_path / 'out')
    assert not code, text
    assert {path: path.stat().st_mtime_ns for path in images.iterdir()} == before
    assert '3 images' in text
    code, text = run_tool('tools/predict.py', '--model', folder / 'model', '--dataset',
                          tmp_path / 'set', '--out', tmp_path / 'predicted')
    assert not code, text
    assert '85.' in text.splitlines()[-1], text
    wrong = datasets.Dataset.from_list(rows).rename_column('label', 'other')
    wrong.to_parquet(tmp_path / 'wrong' / 'test.parquet')
    with pytest.raises(DataError, match='columns image, other, place, and not one of images'):
        unpack_dataset(str(tmp_path / 'wrong'), tmp_path / 'out' / 'data')
    with pytest.raises(DataError, match='no data set that the library datasets loads'):
        unpack_dataset(str(tmp_path / 'none'), tmp_path / 'out' / 'data')


def test_sheets_and_times(folder, tmp_path):
    segmenter = Segmenter(folder / 'model', device='cpu')
    assert len(visualize(segmenter, [folder / 'images' / '0.png'], tmp_path,
                         isr_ratio=['none', 2])) == 3
    contenders = load_contenders(str(folder / 'model'), isr_ratios=['none', '2'])
    with pytest.raises(ConfigError, match='has its own weights and settings: leave x'):
        load_contenders(str(folder / 'model'), 'x.pth')
    [rows] = run(contenders, Plan(sizes=[(64, 64)], repeats=1, seconds=0.1))
    assert [(row.config, row.isr_ratio, row.status) for row in rows] == [
        ('model', 'none', 'ok'), ('model', '2', 'ok')]


def test_the_tools(folder, tmp_path):
    where = ['--model', folder / 'model']
    text = done('tools/predict.py', folder / 'images', *where, '--out', tmp_path / 'out',
                '--json', '--labels', folder / 'masks', '--keep-ratio')
    assert json.loads(text[text.index('{\n'):])['metrics']['mIoU'] > 5
    assert 'images keep their ratio, with 64 pixels on the shorter side' in text
    text = done(
        'tools/isr_sweep.py', *where, '--images', folder / 'images', '--masks', folder / 'masks',
        '--isr-ratio', 'none', '2', '--max-drop', '0', '--out', tmp_path)
    assert 'makes all images 64x64' in text
    assert f'tools/predict.py IMAGES --model {folder / "model"} --out RESULTS' in text
    code, text = run_tool('tools/isr_sweep.py', *where)
    assert code == 2
    assert 'give CONFIG and CHECKPOINT, or --model and either --images' in text
