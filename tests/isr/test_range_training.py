"""Training for a range of ratios: what each step computes, and that it helps."""
import copy
from collections import Counter

import pytest
import torch
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

from mmseg_edaformer import isr
from mmseg_edaformer.errors import ConfigError, RatioError
from mmseg_edaformer.isr.range_training import RatioRange, consistency
from mmseg_edaformer.isr.ratio import ISRRatio
from tests.conftest import segmentor_config

RATIOS = ('2211-222', '4422-444')
SEGFORMER = dict(
    backbone=dict(type='MixVisionTransformer', embed_dims=16, num_heads=[1, 2, 4, 8],
                  num_layers=[1, 1, 1, 1], sr_ratios=[8, 4, 2, 1], drop_path_rate=0.),
    decode_head=dict(type='SegformerHead', in_channels=[16, 32, 64, 128], in_index=[0, 1, 2, 3],
                     channels=16, num_classes=8, dropout_ratio=0.))


def build(ratios=RATIOS, weight=1., **parts):
    """A small segmentor in training mode whose passes are alike but for the ratio."""
    config = dict(segmentor_config(dropout_ratio=0., drop_path_rate=0.),
                  type='StreamedEncoderDecoder')
    config['backbone']['drop_path_rate'] = 0.
    if ratios is not None:
        config['train_cfg'] = dict(isr_range=dict(isr_ratios=ratios, weight=weight))
    model = MODELS.build({**config, **copy.deepcopy(parts)})
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.normal_(module.weight, 0, 0.1)
    return model.train()


def batch():
    labels = torch.randint(8, (2, 1, 64, 64))
    return torch.randn(2, 3, 64, 64), [SegDataSample(gt_sem_seg=PixelData(data=label))
                                       for label in labels]


def test_consistency():
    reduced, full = (torch.randn(2, 5, 4, 3, requires_grad=True) for _ in range(2))
    p, q = full.softmax(1), reduced.softmax(1)
    value = consistency(reduced, full)
    torch.testing.assert_close(value, (p * (p / q).log()).sum() / (2 * 4 * 3))
    value.backward()
    assert full.grad is None
    # The gradient of the divergence is what it is of a cross entropy: q - p.
    torch.testing.assert_close(reduced.grad, (q - p).detach() / (2 * 4 * 3))
    assert consistency(full, full).abs() < 1e-7
    assert consistency(reduced.bfloat16(), full.bfloat16()).dtype == torch.float32


def test_draws():
    drawn = RatioRange((*RATIOS, 2))
    counts = Counter(str(drawn.draw()) for _ in range(600))
    assert counts.keys() == {*RATIOS, '2'}
    assert min(counts.values()) > 150
    torch.manual_seed(1)
    first = [drawn.draw() for _ in range(20)]
    torch.manual_seed(1)
    assert [drawn.draw() for _ in range(20)] == first


@pytest.mark.parametrize('parts', [{}, SEGFORMER], ids=['EDAFormer', 'SegFormer'])
def test_losses(parts):
    """The labels' loss is that of the full pass, the other that of the drawn ratio."""
    ratio = '4422-4' if parts else '4422-444'
    model = build([ratio], 0.5, **parts)
    plain = build(None, **parts)
    plain.load_state_dict(model.state_dict())
    images, samples = batch()
    losses = model.loss(images, samples)
    expected = plain.loss(images, samples)
    assert losses.keys() - expected.keys() == {'loss_isr'}
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value)
    full = plain._forward(images)
    with isr(plain, ratio):
        reduced = plain._forward(images)
    assert (full - reduced).abs().max() > 1e-3
    torch.testing.assert_close(losses['loss_isr'], 0.5 * consistency(reduced, full))
    losses['loss_isr'].backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters())
    # The ratio is gone after it, and state dicts know nothing of it.
    torch.testing.assert_close(model._forward(images), plain._forward(images))
    assert model.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize(('ratio', 'alike'), [(1, True), ('4422-444', False)])
def test_passes_differ_by_the_ratio_alone(ratio, alike):
    """They drop the same paths and channels."""
    config = segmentor_config(dropout_ratio=0.5, drop_path_rate=0.5)
    model = build([ratio], backbone=dict(config['backbone'], drop_path_rate=0.5),
                  decode_head=config['decode_head'])
    images, samples = batch()
    losses = [model.loss(images, samples) for _ in range(2)]
    assert losses[0]['decode.loss_ce'] != losses[1]['decode.loss_ce']
    assert all((each['loss_isr'] < 1e-6) == alike for each in losses)


def test_auxiliary_heads_have_their_loss():
    head = dict(type='FCNHead', in_channels=64, in_index=2, channels=16, num_convs=1,
                num_classes=8, norm_cfg=dict(type='BN'))
    losses = build(auxiliary_head=head).loss(*batch())
    assert losses.keys() == {'decode.loss_ce', 'decode.acc_seg', 'aux.loss_ce', 'aux.acc_seg',
                             'loss_isr'}


def test_a_failed_pass_leaves_no_ratio(monkeypatch):
    model = build()

    def fail(*args):
        raise RuntimeError('no memory')

    monkeypatch.setattr(model, '_forward', fail)
    with pytest.raises(RuntimeError, match='no memory'):
        model.loss(*batch())
    assert {module.isr_ratio for module in model.modules() if hasattr(module, 'isr_ratio')} == {1}


def test_it_keeps_the_ratios_together():
    """After as many steps on the same images, the reduced pass is nearer to the full one."""
    start = build(['4422-444'])
    images, samples = batch()
    distances = []
    for trained_range in (None, start.isr_range):
        model = copy.deepcopy(start)
        model.isr_range = trained_range
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        for _ in range(25):
            losses = model.loss(images, samples)
            optimizer.zero_grad()
            sum(value for name, value in losses.items() if 'loss' in name).backward()
            optimizer.step()
        full = model._forward(images)
        with torch.no_grad(), isr(model, '4422-444'):
            distances.append(float(consistency(model._forward(images), full)))
    plain, ranged = distances
    assert ranged < plain / 3


@pytest.mark.parametrize(('isr_range', 'error', 'message'), [
    (dict(isr_ratios=()), ConfigError, 'list of at least one ratio'),
    (dict(isr_ratios='2'), ConfigError, 'list of at least one ratio'),
    (dict(ratios=(2,)), ConfigError, 'it takes isr_ratios, a list, and weight'),
    (dict(isr_ratios=(2,), weight=-1), ConfigError, 'must not be negative'),
    (dict(isr_ratios=('22x',)), RatioError, 'cannot parse'),
    (dict(isr_ratios=('221-222',)), RatioError, 'which has 4 stages'),
])
def test_wrong_settings(isr_range, error, message):
    with pytest.raises(error, match=message):
        MODELS.build(dict(segmentor_config(), type='StreamedEncoderDecoder',
                          train_cfg=dict(isr_range=isr_range)))


def test_heads_without_plain_logits():
    head = dict(type='DAHead', in_channels=64, in_index=2, channels=16, pam_channels=8,
                num_classes=8, norm_cfg=dict(type='BN'))
    with pytest.raises(ConfigError, match='logits per pixel, not DAHead'):
        build(decode_head=head)


def test_names_mean_what_they_do_elsewhere():
    assert RatioRange(('optimal',)).isr_ratios == [ISRRatio.parse('2211-222')]
