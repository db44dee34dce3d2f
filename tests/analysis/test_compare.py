"""Results side by side: what the table says, and clear errors for what does not belong together."""
import json
import re

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS
from PIL import Image

from mmseg_edaformer.analysis import compare
from mmseg_edaformer.cost import count_macs
from mmseg_edaformer.data.drawing import CLASSES
from mmseg_edaformer.errors import CheckpointError, ConfigError, RatioError
from mmseg_edaformer.isr import isr
from tests.conftest import MINI, ROOT
from tests.processes import run_tool

TOP = {'accuracy/top1': 26.04, 'accuracy/top5': 80.0}


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch):
    monkeypatch.setattr(compare, '_ROUNDS', 1)


@pytest.fixture(scope='module')
def classifier(tmp_path_factory):
    """A classifier of drawn images, of which those of cars are the most."""
    pytest.importorskip('mmpretrain', reason='mmpretrain is not there')
    from mmseg_edaformer.pretraining.crops import draw_crops
    folder = tmp_path_factory.mktemp('classifier')
    data = draw_crops(folder / 'data', train=1, val=2)
    for i in range(20):
        (data / f'val/car/more{i}.png').write_bytes((data / 'val/car/00000.png').read_bytes())
    config = folder / 'mini.py'
    config.write_text(f'''
_base_ = ['{ROOT}/configs/eft_t_crops.py']
model = dict(backbone=dict(**{MINI}), head=dict(in_channels=128))
test_dataloader = dict(num_workers=0, persistent_workers=False,
                       dataset=dict(data_root='{data}'))
''')
    init_default_scope('mmpretrain')
    torch.save(MODELS.build(Config.fromfile(config).model).state_dict(), folder / 'mini.pth')
    return str(config), str(folder / 'mini.pth')


def write(path, model, ratio, figures, **others):
    """What tools/test.py --json writes, with other values if they are given."""
    path.write_text(json.dumps(dict(config=model[0], checkpoint=model[1], isr_ratio=ratio,
                                    isr_method='average', metrics=figures) | others))
    return path


def rows(text):
    """The cells of a table."""
    return [line.strip('| ').replace(' ', '').split('|') for line in text.splitlines()
            if line.startswith('|')]


def gmacs(model, size, ratio):
    cfg = Config.fromfile(model[0])
    init_default_scope(cfg.get('default_scope', 'mmseg'))
    built = MODELS.build(cfg.model)
    with isr(built, ratio):
        return f'{count_macs(built, size) / 1e9:.3f}'


def test_segmentor(edaformer, scenes, tmp_path):
    files = [write(tmp_path / f'{i}.json', edaformer, ratio, dict(mIoU=50. - i, mAcc=60.), **other)
             for i, (ratio, other) in enumerate(
                 (('none', {}), ('optimal', {}), ('2', dict(isr_method='max'))))]
    text = compare.compare_results(files, tmp_path / 'picture.png')
    head, *body = rows(text)
    assert head == ['isr_ratio', 'mIoU', 'GMACs', 'msperimage', 'time']
    assert [row[:3] for row in body] == [
        ['none', '50.0', gmacs(edaformer, (64, 96), 1)],
        ['2211-222', '49.0', gmacs(edaformer, (64, 96), 'optimal')],
        ['2max', '48.0', gmacs(edaformer, (64, 96), 2)]]
    assert body[0][-1] == 'x1.00'
    name, share, miou = re.search(r"Chance: '(\w+)' everywhere is right for (.*)% of the pixels, "
                                  r'mIoU (.*)\.\n4 images, batch 1', text).groups()
    masks = np.stack([np.array(Image.open(path)) for path in
                      (scenes / 'annotations/validation').iterdir()])
    counts = np.bincount(masks[masks != 255])
    assert name == CLASSES[counts.argmax()]
    assert float(share) == pytest.approx(100 * counts.max() / counts.sum(), abs=0.05)
    assert float(miou) == pytest.approx(float(share) / 8, abs=0.06)
    assert (tmp_path / 'picture.png').stat().st_size > 10_000  # of 4 images, there are no more


def test_classifier(classifier, tmp_path):
    files = [write(tmp_path / 'none.json', classifier, 'none', TOP),
             write(tmp_path / '2211.json', classifier, '2211-111', TOP | {'accuracy/top1': 25.})]
    text = compare.compare_results(files)
    head, *body = rows(text)
    assert head == ['isr_ratio', 'top-1', 'top-5', 'GMACs', 'msperimage', 'time']
    assert [row[:4] for row in body] == [
        ['none', '26.0', '80.0', gmacs(classifier, (64, 64), 1)],
        ['2211', '25.0', '80.0', gmacs(classifier, (64, 64), '2211-111')]]
    assert "Chance: 'car' everywhere is right for 55.0% of the images.\n40 images" in text
    with pytest.raises(ConfigError, match=r'--picture: only for segmentation'):
        compare.compare_results(files, tmp_path / 'picture.png')
    assert not (tmp_path / 'picture.png').exists()


def test_classifier_without_top5(classifier, tmp_path):
    only = write(tmp_path / 'only.json', classifier, 2, {'accuracy/top1': 30.})
    head, body = rows(compare.compare_results([only]))
    assert (head[1:3], body[:2]) == (['top-1', 'GMACs'], ['2', '30.0'])


def test_results_of_other_models(edaformer, tmp_path):
    one = write(tmp_path / 'one.json', edaformer, 'none', dict(mIoU=50.))
    for name, value in (('config', 'other.py'), ('checkpoint', 'other.pth')):
        other = write(tmp_path / 'other.json', edaformer, '2', dict(mIoU=50.), **{name: value})
        with pytest.raises(ConfigError, match=rf'one\.json and .*other\.json differ in the '
                                              rf'{name}, .* and {value}'):
            compare.compare_results([one, other])


@pytest.mark.parametrize(('change', 'error', 'told'), [
    (dict(metrics=dict(mAcc=3.)), ConfigError, 'lacks the metric mIoU, it has mAcc: test again'),
    (dict(metrics=dict(mIoU='good')), ConfigError, 'lacks numbers as metrics'),
    (dict(metrics=None, checkpoint=3), ConfigError, 'it lacks checkpoint, metrics: test again'),
    (dict(isr_method='much'), RatioError, "'much'"),
    (dict(checkpoint='gone.pth'), CheckpointError, r'checkpoint not found: gone\.pth'),
])
def test_results_that_cannot_be_used(change, error, told, edaformer, tmp_path):
    file = write(tmp_path / 'one.json', edaformer, 'none', dict(mIoU=50.), **change)
    with pytest.raises(error, match=told):
        compare.compare_results([file])


@pytest.mark.parametrize('content', [b'', b'[1]', b'\xff\xfe'])
def test_files_that_are_no_results(content, tmp_path):
    (tmp_path / 'x.json').write_bytes(content)
    with pytest.raises(ConfigError, match=r'x\.json was not written by tools/test\.py --json'):
        compare.compare_results([tmp_path / 'x.json'])


@pytest.mark.parametrize(('arguments', 'told'), [
    (['gone.json'], 'gone.json cannot be read: No such file or directory'),
    (['x.json', '--large', 2], '--isr-ratio and --large test a checkpoint'),
    (['edaformer_t_ade', 'x.pth', 'y.pth'], 'give CONFIG and CHECKPOINT, or .json files'),
])
def test_mistakes_on_the_command_line(arguments, told):
    code, output = run_tool('tools/compare_isr.py', *arguments)
    assert code in (1, 2)
    assert told in output


def test_command_line(edaformer, tmp_path):
    """Of a checkpoint that is tested on the way, also on larger worlds."""
    code, told = run_tool('tools/compare_isr.py', *edaformer, '--isr-ratio', 'none', '2', 'auto',
                          '--large', 1, '--picture', tmp_path / 'x.png',
                          '--cfg-options', 'test_dataloader.dataset.indices=2')
    assert code == 0, told
    head, *body = rows(told)
    assert head == ['isr_ratio', 'mIoU64,96', 'GMACs', 'ms', 'time', 'mIoU1024,1024', 'GMACs',
                    'ms', 'time']
    assert [row[0] for row in body] == ['none', '2', 'auto']
    assert float(body[1][6]) < float(body[0][6])
    assert float(body[2][6]) < float(body[0][6])  # auto acts on large images
    assert body[2][2] == body[0][2]  # and on large ones only
    assert 'Larger worlds: 1 images of 1024,1024 pixels' in told
    assert Image.open(tmp_path / 'x.png').size[0] > 1000


def test_without_the_trained_ratio(edaformer):
    text = compare.compare_checkpoint(*map(str, edaformer), ['2', 'optimal', '2'])
    assert [row[0] for row in rows(text)] == ['isr_ratio', '2', '2211-222']
    assert 'time: median ratio to 2 in' in text


def test_what_cannot_be_compared(edaformer, monkeypatch):
    with pytest.raises(ConfigError, match='trains a classifier: test it with'):
        compare.compare_checkpoint(f'{ROOT}/configs/eft_t_crops.py', edaformer[1], ['2'])
    monkeypatch.setattr(compare, 'CLASSES', ('other',))
    with pytest.raises(ConfigError, match='--large draws scenes, whose classes are not those'):
        compare.compare_checkpoint(*map(str, edaformer), ['2'], large=1)
