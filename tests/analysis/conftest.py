"""Small models with checkpoints, whose labels depend on the ratio."""
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS
from torch import nn

from mmseg_edaformer.predict.segmenter import Segmenter
from tests.conftest import ROOT, write_config


def save(config):
    """The paths of a config and of a checkpoint beside it."""
    init_default_scope('mmseg')
    torch.manual_seed(3)
    model = MODELS.build(Config.fromfile(config).model)
    model.init_weights()
    for module in model.modules():
        if isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
            nn.init.normal_(module.weight, 1, 0.5)
            nn.init.normal_(module.bias, 0, 0.5)
    nn.init.normal_(model.decode_head.conv_seg.weight, 0, 0.5)
    checkpoint = config.parent / 'best_mIoU_iter_4.pth'
    torch.save(dict(meta={}, state_dict=model.state_dict()), checkpoint)
    return str(config), str(checkpoint)


@pytest.fixture(scope='session')
def edaformer(scenes, tmp_path_factory):
    return save(write_config(tmp_path_factory.mktemp('edaformer'), scenes))


@pytest.fixture(scope='session')
def segformer(scenes, tmp_path_factory):
    config = tmp_path_factory.mktemp('segformer') / 'segformer.py'
    config.write_text(f'''
_base_ = ['{ROOT}/configs/segformer_b0_synthetic.py']
model = dict(data_preprocessor=dict(size=(64, 64)), backbone=dict(num_layers=[1, 1, 1, 1]))
test_dataloader = dict(num_workers=0, persistent_workers=False,
                       dataset=dict(data_root='{scenes}'))
''')
    return save(config)


@pytest.fixture(scope='module')
def segmenter(edaformer):
    return Segmenter(Path(edaformer[0]).parent, device='cpu')


@pytest.fixture(scope='module')
def other(segformer):
    return Segmenter(Path(segformer[0]).parent, device='cpu')
