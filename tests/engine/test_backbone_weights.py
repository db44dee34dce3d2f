"""Pretrained encoders of every origin, into the backbone of a segmentor."""
import re

import pytest
import torch
from mmseg.registry import MODELS
from safetensors.torch import save_file

from mmseg_edaformer import EFT
from mmseg_edaformer.engine.backbone_weights import load_backbone
from mmseg_edaformer.engine.convert import convert_state_dict
from mmseg_edaformer.engine.launch import prepare_train
from mmseg_edaformer.engine.run_config import load_config
from mmseg_edaformer.errors import CheckpointError, ConfigError
from tests import plain
from tests.conftest import MINI, segmentor_config
from tests.engine.training import run_to_end, state

CLASSIFIER = {'head.weight': torch.zeros(1000, 8), 'head.bias': torch.zeros(1000)}


def released(size):
    """As the authors save their encoders: their names, with the classifier."""
    weights = plain.build(size).backbone.state_dict()
    for tensor in weights.values():
        tensor.normal_()
    return weights


def ours(released_weights):
    """The same under our names, by the converter, which has an oracle of its own."""
    return convert_state_dict(released_weights).state_dict


def prefixed(weights, prefix='backbone.'):
    return {f'{prefix}{name}': tensor for name, tensor in weights.items()}


FORMS = {
    'the authors\'': lambda w: {**w, **CLASSIFIER},
    'the authors\', wrapped': lambda w: dict(model={**w, **CLASSIFIER}),
    'converted': ours,
    'of a classifier': lambda w: dict(state_dict={
        **prefixed(ours(w)), 'head.fc.weight': torch.zeros(10, 8)}, meta=dict(epoch=3)),
    'of a distributed one': lambda w: dict(state_dict=prefixed(ours(w), 'module.backbone.')),
    'of a segmentor': lambda w: dict(state_dict={
        **prefixed(ours(w)), 'decode_head.conv_seg.weight': torch.zeros(19, 8, 1, 1)}),
    'of the authors\' segmentor': lambda w: dict(state_dict={
        **prefixed(w), 'decode_head.linear_pred.weight': torch.zeros(19, 8, 1, 1)}),
}


@pytest.mark.parametrize(('form', 'suffix'), [
    *((form, '.pth') for form in FORMS), ('converted', '.safetensors'),
    ('the authors\'', '.safetensors')])
def test_every_form(tmp_path, form, suffix):
    weights = released('tiny')
    content, path = FORMS[form](weights), tmp_path / f'eft{suffix}'
    if suffix == '.pth':
        torch.save(content, path)
    else:
        content = content.get('model', content.get('state_dict', content))
        save_file({name: tensor.contiguous() for name, tensor in content.items()}, path)
    backbone = EFT('tiny')
    said = load_backbone(backbone, path)
    found = backbone.state_dict()
    expected = ours(weights)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert f'{len(expected)} weights used' in said
    left = {'the authors\'': 2, 'the authors\', wrapped': 2, 'converted': 0,
            'of a distributed one': 0}.get(form, 1)
    assert f'{left} left out' in said


@pytest.mark.parametrize(('size', 'weights', 'says'), [
    ('tiny', lambda: released('base'), r'It is EFT base: train configs/edaformer_b_\*.py'),
    ('base', lambda: released('tiny'), r'It is EFT tiny: train configs/edaformer_t_\*.py'),
    ('tiny', lambda: EFT(MINI).state_dict(), r'set model.backbone.arch=dict\(embed_dims='),
    ('tiny', lambda: {'layer1.0.conv1.weight': torch.ones(3)}, 'It is not an EFT'),
    ('tiny', lambda: {key: value for key, value in released('tiny').items() if 'block3.4' not in
                      key}, r'stages.2.blocks.4.\S+ is not in it'),
])
def test_what_does_not_fit_is_refused(tmp_path, size, weights, says):
    torch.save(weights(), tmp_path / 'eft.pth')
    backbone = EFT(size)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    with pytest.raises(CheckpointError, match=says):
        load_backbone(backbone, tmp_path / 'eft.pth')
    assert all(torch.equal(before[name], tensor)
               for name, tensor in backbone.state_dict().items())


def test_another_backbone_keeps_its_names(tmp_path):
    cfg = dict(type='MixVisionTransformer', embed_dims=16, num_layers=(1, 1, 1, 1),
               num_heads=(1, 2, 4, 8), qkv_bias=True)
    source, target = MODELS.build(cfg), MODELS.build(cfg)
    torch.save(prefixed(source.state_dict()), tmp_path / 'mit.pth')
    load_backbone(target, tmp_path / 'mit.pth')
    for (name, expected), found in zip(source.state_dict().items(), target.state_dict().values()):
        assert torch.equal(found, expected), name


def test_a_training_starts_from_it_and_a_resumed_one_does_not(config, tmp_path):
    backbone = MODELS.build(dict(segmentor_config()['backbone'], depths=(1, 1, 1, 1)))
    torch.nn.init.constant_(backbone.stages[0].norm.bias, 5.)
    torch.save(backbone.state_dict(), tmp_path / 'eft.pth')
    flags = dict(backbone_weights=str(tmp_path / 'eft.pth'))
    longer = {'train_cfg.max_iters': 4, 'train_cfg.val_interval': 4}
    work = tmp_path / 'work'
    log = run_to_end(config, work, options={**longer, 'train_cfg.max_iters': 3}, **flags)
    assert re.search(r'Backbone from .*eft.pth: \d+ weights used \(stages.0 \d+, ', log)
    assert 'random weights' not in log
    first = state(work, 'iter_3.pth')['weights']
    assert (first['backbone.stages.0.norm.bias'] - 5).abs().max() < 0.1
    run_to_end(config, work, options=longer, **flags)
    run_to_end(config, tmp_path / 'whole', options=longer, **flags)
    whole = state(tmp_path / 'whole', 'iter_4.pth')['weights']
    assert all(torch.equal(tensor, whole[name])
               for name, tensor in state(work, 'iter_4.pth')['weights'].items())


def test_not_with_the_weights_of_a_whole_model(config, tmp_path):
    cfg = load_config(config)
    with pytest.raises(ConfigError, match='give only one of them'):
        prepare_train(cfg, load_from='a.pth', backbone_weights='b.pth')
