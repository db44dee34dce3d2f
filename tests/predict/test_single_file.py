"""One .safetensors that holds all that a prediction needs, and whose text is data, not code."""
import json
import os
import shutil

import pytest
import torch
from mmengine.config import Config
from mmseg.apis import inference_model, init_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mmseg_edaformer.data.drawing import CLASSES, PALETTE
from mmseg_edaformer.engine.single_file import pack_file
from mmseg_edaformer.errors import CheckpointError, ConfigError
from mmseg_edaformer.predict.segmenter import Segmenter
from tests.conftest import ROOT
from tests.predict.conftest import same


@pytest.fixture(scope='module')
def single(work, tmp_path_factory):
    path = tmp_path_factory.mktemp('single') / 'model.safetensors'
    pack_file(work / 'best_mIoU_iter_4.pth', path, Config.fromfile(work / 'mini.py'))
    return path


def test_one_file_predicts_alone(single, work, segmenter, images, tmp_path):
    shutil.copy(single, tmp_path / 'alone.safetensors')
    alone = Segmenter(tmp_path / 'alone.safetensors', device='cpu')
    assert alone.classes == CLASSES
    assert [list(colour) for colour in alone.description.palette] == PALETTE
    for path in images:
        assert same(alone(path).labels, segmenter(path).labels)
    save_file(load_file(single), tmp_path / 'weights.safetensors')
    with pytest.raises(CheckpointError, match=r'weights.safetensors holds weights alone'):
        Segmenter(tmp_path / 'weights.safetensors', device='cpu')
    with pytest.raises(ConfigError, match=r'model.safetensors holds its own weights: leave'):
        Segmenter(single, work / 'best_mIoU_iter_4.pth', device='cpu')


def test_a_segformer_is_told_as_data_too(tmp_path, images):
    config = ROOT / 'configs' / 'segformer_b0_synthetic.py'
    model = init_model(str(config), device='cpu')
    torch.nn.init.normal_(model.decode_head.conv_seg.weight)
    save_file(model.state_dict(), tmp_path / 'weights.safetensors')
    for source in ([config, tmp_path / 'weights.safetensors'], [tmp_path / 'one.safetensors']):
        if len(source) == 1:
            pack_file(tmp_path / 'weights.safetensors', source[0], Config.fromfile(config))
        segmenter = Segmenter(*source, device='cpu')
        assert segmenter.classes == CLASSES  # of the data set, where the checkpoint names none
        assert same(segmenter(images[0]).labels,
                    inference_model(model, str(images[0])).pred_sem_seg.data[0].numpy())


@pytest.fixture
def told(single, tmp_path):
    """Writes a copy of the file whose description a function has changed, or returned as text."""
    def write(change):
        with safe_open(single, 'pt') as file:
            content = json.loads(file.metadata()['mmseg_edaformer'])
        text = change(content)
        target = tmp_path / 'hostile.safetensors'
        save_file(load_file(single), target, dict(
            mmseg_edaformer=text if isinstance(text, str) else json.dumps(content)))
        return target
    return write


def in_model(part, **values):
    """A change of a part of the model."""
    return lambda content: content['model'][part].update(values)


def in_pipeline(name, **values):
    """A change of a step of the pipeline, which is added if it is not there."""
    def change(content):
        if content['pipeline'][0]['type'] == name:
            content['pipeline'][0].update(values)
        else:
            content['pipeline'].insert(1, dict(type=name, **values))
    return change


CODE = dict(type='os.system', command='touch canary')
REFUSED = {
    'a function': lambda c: c['model'].update(backbone=CODE),
    'a function deep inside': in_model('decode_head', norm_cfg=CODE),
    'no name': in_model('backbone', type=['EFT']),
    'a pickle to read': in_model('decode_head', loss_decode=dict(
        type='CrossEntropyLoss', class_weight='weights.pkl')),
    'weights to fetch': in_model('backbone', init_cfg=dict(
        type='Pretrained', checkpoint='http://localhost/x.pth')),
    'a scope': lambda c: c['model'].update(_scope_='evil'),
    'a step': in_pipeline('Albu', transforms=[]),
    'a file to write': in_pipeline('LoadImageFromFile', skip_list='canary'),
    'no model': lambda c: c.pop('model'),
    'half a pipeline': lambda c: c['pipeline'].pop(),
    'other classes': lambda c: c.update(classes=['a', 'b']),
    'a newer form': lambda c: c.update(format=99),
    'senseless sizes': in_model('backbone', embed_dims=[0, -1, 'x', None]),
    'no JSON': lambda c: 'import os',
    'deep JSON': lambda c: '[' * 100000}
SENSELESS = [  # values that no image can be predicted with
    *(in_pipeline('Resize', scale=scale) for scale in (0, [64, float('nan')], [100000, 1], 'x')),
    in_pipeline('Resize', scale_factor=1000), in_pipeline('Resize', keep_ratio='yes'),
    in_pipeline('LoadImageFromFile', imdecode_backend='tifffile'),
    in_pipeline('LoadImageFromFile', color_type='unchanged'),
    in_model('data_preprocessor', size_divisor=0), in_model('data_preprocessor', std=[1, 0, 1]),
    in_model('decode_head', in_index=[1, 2, 99]), in_model('decode_head', depths=[10 ** 6]),
    in_model('test_cfg', mode='other')]
MISMATCHED = [
    lambda c: c['pipeline'][-1].update(meta_keys=['ori_shape']), in_pipeline('Resize'),
    in_model('data_preprocessor', mean=[1, 2], std=[1, 1]),
    lambda c: c['model'].update(test_cfg=dict(mode='slide'))]


@pytest.mark.parametrize(('change', 'reason'), [
    *(pytest.param(change, '', id=name) for name, change in REFUSED.items()),
    *((change, r': .*\(\w+=.*: it must be') for change in SENSELESS),
    *((change, r': (it cannot predict an image|its model cannot be built) \(.+\)')
      for change in MISMATCHED)])
def test_what_is_refused(told, tmp_path, monkeypatch, change, reason):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=f'hostile.safetensors is refused{reason}'):
        Segmenter(told(change), device='cpu')
    assert os.listdir(tmp_path) == ['hostile.safetensors']


def test_names_do_a_terminal_no_harm(told):
    segmenter = Segmenter(told(lambda c: c.update(
        classes=['\x1b[2J', *CLASSES[1:]], palette=[[300, 0, 0]] * 8)), device='cpu')
    assert segmenter.classes[0] == '?[2J'
    assert len(set(segmenter.description.palette)) == 8


@pytest.mark.parametrize(('target', 'config', 'says'), [
    ('x.pth', 'mini.py', 'write to a .safetensors file'),
    ('x.safetensors', 'foreign.py', "cannot be written as data .it must not name 'TimmMaps'"),
])
def test_what_cannot_be_one_file(work, tmp_path, target, config, says):
    cfg = Config.fromfile(work / 'mini.py')
    if config == 'foreign.py':
        cfg.model.backbone.type = 'TimmMaps'
    with pytest.raises((CheckpointError, ConfigError), match=says):
        pack_file(work / 'best_mIoU_iter_4.pth', tmp_path / target, cfg)
    assert not os.listdir(tmp_path)
