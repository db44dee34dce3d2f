"""The authors' checkpoints in, ours out; and encoders of every origin in a backbone."""
import os
import re

import pytest
import torch
from mmseg.registry import MODELS
from safetensors.torch import load_file, save_file

from mmseg_edaformer import EFT
from mmseg_edaformer.engine import load_from_file
from mmseg_edaformer.engine.convert import convert_file, convert_state_dict, load_backbone
from mmseg_edaformer.engine.launch import prepare_train
from mmseg_edaformer.engine.run_config import load_config
from mmseg_edaformer.errors import CheckpointError, ConfigError
from tests import plain
from tests.conftest import MINI, segmentor_config
from tests.engine.training import run_to_end, state
from tests.processes import done, run_tool

CLASSIFIER = {'head.weight': torch.zeros(1000, 8), 'head.bias': torch.zeros(1000)}


def released(size='tiny', num_classes=150):
    """A state dict as the authors save it, with the unused classifier."""
    weights = plain.build(size, num_classes).state_dict()
    weights['decode_head.conv_seg.weight'] = torch.zeros(num_classes, 128, 1, 1)
    weights['decode_head.conv_seg.bias'] = torch.zeros(num_classes)
    return weights


def encoder(size='tiny'):
    """The weights of an encoder under the authors' names."""
    weights = plain.build(size).backbone.state_dict()
    for tensor in weights.values():
        tensor.normal_()
    return weights


def ours(weights):
    """The same under our names, by the converter, which has an oracle of its own."""
    return convert_state_dict(weights).state_dict


def prefixed(weights, prefix='backbone.'):
    return {f'{prefix}{name}': tensor for name, tensor in weights.items()}


@pytest.mark.parametrize('target', ['ours.pth', 'ours.safetensors'])
def test_a_segmentor(tmp_path, target):
    weights = released('tiny', 19)
    torch.save(dict(meta=dict(CLASSES=('road', 'car'), PALETTE=[[1, 2, 3], [4, 5, 6]]),
                    state_dict=weights, optimizer=dict(state={}, param_groups=[])),
               tmp_path / 'theirs.pth')
    output = done('tools/convert_checkpoint.py', tmp_path / 'theirs.pth', tmp_path / target)
    assert 'backbone.block1.0.attn.sr.weight -> backbone.stages.0.blocks.0.attn.kv.weight' in output
    assert 'decode_head.conv_seg.bias dropped: unused in the release' in output
    assert f'{len(weights) - 2} keys converted, 2 dropped' in output
    assert 'use configs/edaformer_t_cityscapes.py' in output
    content = load_from_file(tmp_path / target)
    written = content['state_dict']
    assert torch.equal(written['decode_head.levels.2.1.attn.kv.weight'],
                       weights['decode_head.attn44.attn.sr.weight'])
    assert torch.equal(written['decode_head.conv_seg.bias'],
                       weights['decode_head.linear_pred.bias'])
    if target.endswith('.pth'):
        assert content['meta']['dataset_meta'] == dict(classes=('road', 'car'),
                                                       palette=[[1, 2, 3], [4, 5, 6]])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(['theirs.pth', target])


@pytest.mark.parametrize('size', ['tiny', 'base'])
def test_an_imagenet_encoder(tmp_path, size):
    torch.save(dict(model={**encoder(size), **CLASSIFIER}), tmp_path / 'EFT.pth')
    conversion = convert_file(tmp_path / 'EFT.pth', tmp_path / 'eft.safetensors')
    assert f'EFT {size}, an encoder' in conversion.advice
    assert conversion.dropped.keys() == CLASSIFIER.keys()
    EFT(size).load_state_dict(load_file(tmp_path / 'eft.safetensors'))


@pytest.mark.parametrize(('change', 'message'), [
    (lambda s: s.pop('backbone.block3.4.attn.sr.weight'),
     'backbone.stages.2.blocks.4.attn.kv.weight is not in it'),
    (lambda s: s.update({'backbone.block1.0.extra': torch.zeros(1)}),
     'backbone.stages.0.blocks.0.extra is not in the model'),
    (lambda s: s.update({'backbone.norm2.weight': torch.zeros(5)}),
     'backbone.stages.1.norm.weight is 5 in the checkpoint and 64 in the model'),
    (dict.clear, 'stages.0.blocks.0.ffn.fc1.weight is missing'),
])
def test_every_key_is_strict(change, message):
    weights = dict(released())
    change(weights)
    with pytest.raises(CheckpointError, match=message):
        convert_state_dict(weights)


def test_a_truncated_file_or_a_full_disk_writes_nothing(tmp_path):
    torch.save(released(), tmp_path / 'whole.pth')
    data = (tmp_path / 'whole.pth').read_bytes()
    (tmp_path / 'cut.pth').write_bytes(data[:len(data) // 2])
    for target in ('new.pth', 'new.safetensors'):
        with pytest.raises(CheckpointError, match=r'cut.pth is damaged or cut short'):
            convert_file(tmp_path / 'cut.pth', tmp_path / target)
    (tmp_path / f'.new.{os.getpid()}.partial.pth').symlink_to('/dev/full')
    with pytest.raises(CheckpointError, match=r'new\.pth cannot be written'):
        convert_file(tmp_path / 'whole.pth', tmp_path / 'new.pth')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['cut.pth', 'whole.pth']


def test_what_the_tool_refuses(tmp_path):
    (tmp_path / 'ours.pth').touch()
    for arguments, message in (
            (['none.pth', 'new.pth'], 'checkpoint not found: none.pth: give the path of a .pth'),
            ([tmp_path / 'ours.pth', 'new.pth', '--config', 'none.py'],
             'error: config not found: none.py\n'),
            ([tmp_path / 'ours.pth', 'new.onnx'], 'write to a .pth or a .safetensors file')):
        code, output = run_tool('tools/convert_checkpoint.py', *arguments)
        assert code == 1
        assert message in output


FORMS = {
    'theirs.pth': (lambda w: {**w, **CLASSIFIER}, 2),
    'theirs.safetensors': (lambda w: {**w, **CLASSIFIER}, 2),
    'converted.safetensors': (ours, 0),
    'classifier.pth': (lambda w: dict(state_dict={
        **prefixed(ours(w)), 'head.fc.weight': torch.zeros(10, 8)}, meta=dict(epoch=3)), 1),
    'distributed.pth': (lambda w: dict(state_dict=prefixed(ours(w), 'module.backbone.')), 0),
    'segmentor.pth': (lambda w: dict(state_dict={
        **prefixed(ours(w)), 'decode_head.conv_seg.weight': torch.zeros(19, 8, 1, 1)}), 1),
    'their_segmentor.pth': (lambda w: dict(state_dict={
        **prefixed(w), 'decode_head.linear_pred.weight': torch.zeros(19, 8, 1, 1)}), 1),
}
"""Contents of a file of an encoder, and how many weights of them are another part's."""


@pytest.mark.parametrize('name', FORMS)
def test_every_form_of_an_encoder(tmp_path, name):
    weights, (form, left) = encoder(), FORMS[name]
    path, content = tmp_path / name, form(weights)
    if path.suffix == '.pth':
        torch.save(content, path)
    else:
        save_file({name: tensor.contiguous() for name, tensor in content.items()}, path)
    backbone, expected = EFT('tiny'), ours(weights)
    line = load_backbone(backbone, path)
    loaded = backbone.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    assert f'{len(expected)} weights used' in line
    assert f'{left} left out' in line


@pytest.mark.parametrize(('size', 'weights', 'says'), [
    ('tiny', lambda: encoder('base'), r'It is EFT base: train configs/edaformer_b_\*.py'),
    ('tiny', lambda: EFT(MINI).state_dict(), r'set model.backbone.arch=dict\(embed_dims='),
    ('tiny', lambda: {'layer1.0.conv1.weight': torch.ones(3)}, 'It is not an EFT'),
    ('tiny', lambda: {key: value for key, value in encoder().items() if 'block3.4' not in key},
     r'stages.2.blocks.4.\S+ is not in it'),
])
def test_an_encoder_that_does_not_fit_is_refused(tmp_path, size, weights, says):
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
    for name, expected in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], expected), name


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
    with pytest.raises(ConfigError, match='give only one of them'):
        prepare_train(load_config(config), load_from='a.pth', backbone_weights='b.pth')
