"""EFT and EDAFormerHead in everything a user does with a network."""
import copy
import pickle
import warnings

import pytest
import torch
from mmseg.registry import MODELS

from mmseg_edaformer import EFT, EDAFormerHead, apply_isr
from mmseg_edaformer.errors import ConfigError
from mmseg_edaformer.models import EmbeddingFreeAttention
from tests.conftest import MINI, segmentor_config


@pytest.fixture
def image():
    return torch.randn(2, 3, 64, 96)


@pytest.mark.gpu
@pytest.mark.parametrize(('batch', 'size'), [(1, (33, 47)), (3, (101, 35)), (2, (16, 200))])
def test_any_size(segmentor, size, batch, device):
    logits = segmentor.to(device)(torch.randn(batch, 3, *size).to(device))
    stride8 = tuple(-(-side // 8) for side in size)
    assert logits.shape == (batch, 8, *stride8)
    assert logits.isfinite().all()


@pytest.mark.gpu
def test_every_parameter_gets_a_gradient(segmentor, image, device):
    segmentor.to(device).train()
    segmentor(image.to(device)).square().mean().backward()
    lacking = [name for name, parameter in segmentor.named_parameters()
               if parameter.grad is None or not parameter.grad.abs().sum() > 0]
    # A bias that a norm over batch and space, or a softmax, takes away again has gradient 0.
    assert lacking == []


def test_one_memory_layout(segmentor, image, set_threads):
    """Every map of the network is channels-last, and none is a copy made to get there."""
    set_threads(2)  # a single one runs small convolutions by a kernel that wants N C H W memory
    strays = []

    def check(module, args, output):
        for x in (*args, *(output if isinstance(output, tuple) else (output,))):
            if isinstance(x, torch.Tensor) and x.dim() == 4 and not x.is_contiguous(
                    memory_format=torch.channels_last):
                strays.append(module)

    for module in segmentor.backbone.modules():
        if module is not segmentor.backbone:
            module.register_forward_hook(check)
    segmentor.decode_head.register_forward_hook(check)
    image = image.contiguous(memory_format=torch.channels_last)
    with torch.profiler.profile(record_shapes=True) as profile, torch.no_grad():
        segmentor(image)
    assert strays == []
    copies = [event.input_shapes[0] for event in profile.events()
              if event.name in ('aten::clone', 'aten::copy_') and not within(
                  event, 'mmseg_edaformer::attend_by_rows')]
    # The columns of the fuse weight are gathered, and keys within the attention; no map is.
    assert {shape[0] for shape in copies if shape} == {segmentor.decode_head.channels}, copies


def within(event, name):
    while event is not None and event.name != name:
        event = event.cpu_parent
    return event is not None


@pytest.mark.gpu
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast(segmentor, image, dtype, device):
    segmentor, image = segmentor.to(device), image.to(device)
    with torch.no_grad():
        expected = segmentor(image)
        with torch.autocast(device.type, dtype=dtype):
            logits = segmentor(image)
    assert logits.dtype == dtype
    assert (logits.float() - expected).abs().max() < 0.1 * expected.std()
    if dtype == torch.bfloat16:
        with torch.autocast(device.type, dtype=dtype):
            loss = segmentor.train()(image).float().square().mean()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in segmentor.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize('ratio', ['optimal', 'auto'])
def test_copies_keep_the_ratio_and_state_dicts_any_layout(segmentor, image, ratio, device):
    apply_isr(segmentor.to(device), ratio)
    image = image.to(device)
    other = MODELS.build(segmentor_config()).to(device).eval()
    other.load_state_dict({name: tensor.contiguous()
                           for name, tensor in segmentor.state_dict().items()})
    apply_isr(other, ratio)
    with torch.no_grad():
        expected = segmentor(image)
        for clone in (copy.deepcopy(segmentor), other,
                      pickle.loads(pickle.dumps(segmentor)).to(device)):
            assert torch.equal(clone(image), expected)


@pytest.mark.parametrize(('depths', 'index'), [
    ((2, 2, 2), (1, 2, 3)), ((1, 2, 3), (1, 2, 3)), ((1, 4, 1), (1, 2, 3)),
    ((1, 2), (2, 3)), ((1, 1, 2, 3), (0, 1, 2, 3))])
def test_decoder_structures_are_configs(depths, index):
    dims = MINI['embed_dims']
    levels = len(index)
    head = EDAFormerHead([dims[i] for i in index], 24, in_index=index, depths=depths,
                         num_heads=[2 ** i for i in index], num_classes=5,
                         pool_ratios=[2 ** (levels - 1 - i) for i in range(levels)],
                         ffn_ratios=[1.5] * levels)
    logits = head(EFT(MINI)(torch.randn(2, 3, 64, 64)))
    assert logits.shape == (2, 5, 64 >> (index[0] + 2), 64 >> (index[0] + 2))
    assert [len(level) for level in head.levels] == list(depths)


def test_encoder_and_decoder_apart():
    config = segmentor_config()
    resnet = dict(type='ResNetV1c', depth=18, num_stages=4, out_indices=(0, 1, 2, 3),
                  strides=(1, 2, 2, 2), norm_cfg=dict(type='BN'))
    head = dict(config['decode_head'], in_channels=(128, 256, 512))
    segformer = dict(type='SegformerHead', in_channels=[16, 32, 64, 128], in_index=[0, 1, 2, 3],
                     channels=32, num_classes=8)
    image = torch.randn(2, 3, 64, 64)
    assert MODELS.build(config | dict(backbone=resnet, decode_head=head))(image).shape == (
        2, 8, 8, 8)
    assert MODELS.build(config | dict(decode_head=segformer))(image).shape == (2, 8, 16, 16)


def test_initialisation():
    model = MODELS.build(dict(segmentor_config(), backbone=dict(type='EFT', arch='tiny'),
                              decode_head=dict(type='EDAFormerHead', in_channels=(64, 128, 256),
                                               channels=128, num_classes=150)))
    model.init_weights()
    model.requires_grad_(False)
    block = model.backbone.stages[2].blocks[0]
    assert block.ffn.fc1.weight.std() == pytest.approx(0.02, rel=0.05)
    assert block.attn.kv.weight.std() == pytest.approx((2 / 128) ** 0.5, rel=0.05)
    assert block.ffn.dwconv.weight.std() == pytest.approx((2 / 9) ** 0.5, rel=0.05)
    assert model.decode_head.fuse.weight.std() == pytest.approx((2 / 128) ** 0.5, rel=0.05)
    assert model.decode_head.conv_seg.weight.std() == pytest.approx(0.01, rel=0.05)
    for name, parameter in model.named_parameters():
        if name.endswith('bias'):
            assert not parameter.any(), name
        elif 'norm' in name:
            assert (parameter == 1).all(), name


def test_sizes():
    """Drop path grows linearly; sizes by name replace those of the architecture."""
    rates = [getattr(block.drop_path, 'drop_prob', 0.) for stage in EFT('tiny').stages
             for block in stage.blocks]
    assert rates == pytest.approx([0.2 * i / 15 for i in range(16)])
    model = EFT('tiny', pool_ratios=(16, 8, 4, 2), depths=(1, 1, 1, 1))
    assert [stage.blocks[0].attn.pool_ratio for stage in model.stages] == [16, 8, 4, 2]
    assert [len(stage.blocks) for stage in model.stages] == [1] * 4


@pytest.mark.parametrize(('build', 'message'), [
    (lambda: EFT('huge'), "no arch 'huge': use one of tiny, base"),
    (lambda: EFT(dict(embed_dim=(8, 16))), 'no size embed_dim: the sizes are embed_dims'),
    (lambda: EFT('tiny', depths=(1, 1)), '2 depths'),
    (lambda: EFT('tiny', num_heads=(3, 3, 3, 3)), 'num_heads=3 does not divide dim=32'),
    (lambda: EFT('tiny', pool_ratios=(0, 1, 1, 1)), 'pool_ratio=0'),
    (lambda: EFT('tiny', out_indices=(0, 4)), 'must lie within 0 to 3'),
    (lambda: EDAFormerHead((8, 16), 8, num_classes=3), '3 in_index'),
    (lambda: EDAFormerHead((32, 64, 128), 32, num_classes=3, chanels=3), 'chanels'),
    (lambda: EFT('tiny', depth=3), 'depth'),
])
def test_wrong_sizes_are_named(build, message):
    with pytest.raises((ConfigError, TypeError), match=message):
        build()


def test_the_pool_shrinks_to_a_small_map_with_one_warning():
    layer = EmbeddingFreeAttention(8, 2, pool_ratio=4)
    assert [layer.num_keys(*size) for size in ((8, 12), (9, 15), (2, 12))] == [6, 6, 3]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('default')
        for size in ((2, 12), (3, 3), (1, 9)):
            assert layer(torch.randn(1, 8, *size)).shape == (1, 8, *size)
    assert ['smaller than the pool' in str(warning.message) for warning in caught] == [True]
