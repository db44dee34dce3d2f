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


def told(single, target, change):
    """A copy of the file with a changed description."""
    with safe_open(single, 'pt') as file:
        content = json.loads(file.metadata()['mmseg_edaformer'])
    text = change(content)
    save_file(load_file(single), target,
              dict(mmseg_edaformer=text if isinstance(text, str) else json.dumps(content)))
    return target


def set_value(part, name, value):
    """A change of one value of a step of the pipeline, or of a part of the model."""
    def change(content):
        steps = {step['type']: step for step in content['pipeline']}
        if part in ('Resize', 'ResizeToMultiple'):
            content['pipeline'].insert(1, {'type': part, name: value})
        else:
            {**steps, **content['model']}[part][name] = value
    return change


REFUSED = {
    'a function': (lambda c: c['model'].update(backbone=dict(
        type='os.system', command='touch canary')), ''),
    'a function deep inside': (lambda c: c['model']['decode_head'].update(
        norm_cfg=dict(type='os.system', command='touch canary')), ''),
    'another library': (lambda c: c['model']['backbone'].update(type='evil.EFT'), ''),
    'a class that is not listed': (
        lambda c: c['model']['backbone'].update(type='TIMMBackbone'), ''),
    'no name': (lambda c: c['model']['backbone'].update(type=['EFT']), ''),
    'a pickle to read': (lambda c: c['model']['decode_head'].update(loss_decode=dict(
        type='CrossEntropyLoss', class_weight='weights.pkl')), ''),
    'weights to fetch': (lambda c: c['model']['backbone'].update(init_cfg=dict(
        type='Pretrained', checkpoint='http://localhost/x.pth')), ''),
    'a scope': (lambda c: c['model'].update(_scope_='evil'), ''),
    'a step': (lambda c: c['pipeline'].insert(1, dict(type='Albu', transforms=[])), ''),
    'a file to write': (lambda c: c['pipeline'][0].update(skip_list='canary'), ''),
    'no model': (lambda c: c.pop('model'), ''),
    'no pipeline': (lambda c: c.pop('pipeline'), ''),
    'half a pipeline': (lambda c: c['pipeline'].pop(), ''),
    'other classes': (lambda c: c.update(classes=['a', 'b']), ''),
    'a newer form': (lambda c: c.update(format=99), ''),
    'senseless sizes': (lambda c: c['model']['backbone'].update(embed_dims=[0, -1, 'x', None]), ''),
    'a word for sizes': (lambda c: c['model']['decode_head'].update(in_channels='many'), ''),
    'no JSON': (lambda c: 'import os', ''),
    'deep JSON': (lambda c: '[' * 100000, ''),
    # Values that no image can be predicted with.
    **{f'{part} {name} {value}': (set_value(part, name, value), rf': .*\({name}=')
       for part, name, value in (
        *(('Resize', 'scale', value) for value in (
            0, -1, [64, float('nan')], [100000, 100000], 'x', [float('inf'), 64], {})),
        ('Resize', 'scale_factor', 1000), ('Resize', 'keep_ratio', 'yes'),
        ('ResizeToMultiple', 'size_divisor', 0), ('data_preprocessor', 'size_divisor', 0),
        ('data_preprocessor', 'std', [1, 0, 1]), ('data_preprocessor', 'mean', [0, float('nan')]),
        ('data_preprocessor', 'bgr_to_rgb', 'x'), ('decode_head', 'align_corners', 'x'),
        ('decode_head', 'in_index', [1, 2, 99]), ('decode_head', 'depths', [1, 1, 10 ** 6]),
        ('test_cfg', 'mode', 'other'), ('test_cfg', 'stride', [0, 0]),
        *(('LoadImageFromFile', 'imdecode_backend', value) for value in (
            'turbojpeg', 'tifffile', 'other', None, [])),
        ('LoadImageFromFile', 'color_type', 'unchanged'))},
    # Values that do not go together.
    **{f'mismatch {index}': (
        change, r': (it cannot predict an image|its model cannot be built) \(.+\)')
       for index, change in enumerate((
        lambda c: c['pipeline'][-1].update(meta_keys=['ori_shape']),
        lambda c: c['pipeline'].insert(1, dict(type='Resize')),
        lambda c: c['model']['data_preprocessor'].update(mean=[1, 2], std=[1, 1]),
        lambda c: c['model'].update(test_cfg=dict(mode='slide'))))}}


@pytest.mark.parametrize(('change', 'reason'), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(single, tmp_path, monkeypatch, change, reason):
    monkeypatch.chdir(tmp_path)
    target = told(single, tmp_path / 'hostile.safetensors', change)
    with pytest.raises(CheckpointError, match=f'hostile.safetensors is refused{reason}'):
        Segmenter(target, device='cpu')
    assert os.listdir(tmp_path) == ['hostile.safetensors']


def test_names_do_a_terminal_no_harm(single, tmp_path):
    target = told(single, tmp_path / 'x.safetensors', lambda c: c.update(
        classes=['\x1b[2J', *CLASSES[1:]], palette=[[300, 0, 0]] * 8))
    segmenter = Segmenter(target, device='cpu')
    assert segmenter.classes[0] == '?[2J'
    assert len(set(segmenter.description.palette)) == 8


@pytest.mark.parametrize(('target', 'config', 'says'), [
    ('x.pth', 'mini.py', 'with a config, write to a .safetensors file'),
    ('x.safetensors', 'foreign.py', "cannot be written as data .it must not name 'TimmMaps'"),
])
def test_what_cannot_be_one_file(work, tmp_path, target, config, says):
    cfg = Config.fromfile(work / 'mini.py')
    if config == 'foreign.py':
        cfg.model.backbone.type = 'TimmMaps'
    with pytest.raises((CheckpointError, ConfigError), match=says):
        pack_file(work / 'best_mIoU_iter_4.pth', tmp_path / target, cfg)
    assert not os.listdir(tmp_path)
