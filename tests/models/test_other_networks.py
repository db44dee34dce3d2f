"""What the paper compares with: LVT, FeedFormer's decoder, backbones of timm and transformers."""
import sys

import pytest
import torch
import torch.nn.functional as F
from mmseg.registry import MODELS

from mmseg_edaformer import EDAFormerHead, apply_isr, isr
from mmseg_edaformer.errors import ConfigError, RatioError
from mmseg_edaformer.models import LVT, EmbeddedAttention, FeedFormerHead
from mmseg_edaformer.models.blocks import TOKEN_MIXERS
from mmseg_edaformer.models.comparison.lvt import RecursiveAtrousSelfAttention
from tests.conftest import segmentor_config

SMALL = {
    'lvt': dict(type='LVT', embed_dims=(16, 16, 32, 64), depths=(1, 1, 1, 1),
                num_heads=(1, 2, 4, 8)),
    'davit': dict(type='TimmMaps', model_name='davit_tiny', depths=(1, 1, 1, 1),
                  embed_dims=(16, 32, 64, 128), num_heads=(1, 2, 4, 8)),
    'mvitv2': dict(type='TimmMaps', model_name='mvitv2_tiny'),
    'pvtv2': dict(type='TimmMaps', model_name='pvt_v2_b0', depths=(1, 1, 1, 1)),
    'cvt': dict(type='TransformersMaps', model_type='cvt', embed_dim=(16, 48, 96),
                depth=(1, 2, 3)),
}


def build(name):
    """A backbone of `SMALL`, FeedFormer on our own encoder, or our decoder with a token mixer."""
    if name == 'feedformer':
        model = MODELS.build(dict(segmentor_config(), decode_head=dict(
            type='FeedFormerHead', in_channels=(16, 32, 64, 128), channels=32, num_heads=(2, 4, 8),
            num_classes=8)))
        model.init_weights()
        return model
    if name in TOKEN_MIXERS:
        return EDAFormerHead((16, 32, 64), 24, num_classes=5, token_mixer=name)
    config = dict(SMALL[name])
    if config['type'] != 'LVT':
        pytest.importorskip('timm' if config['type'] == 'TimmMaps' else 'transformers',
                            reason='the backbone comes from this library')
    return MODELS.build(config)


def outputs(model, image):
    """All maps of a backbone, a segmentor, or a decoder on drawn maps as a list."""
    if isinstance(model, EDAFormerHead):
        torch.manual_seed(1)
        image = [torch.randn(2, dim, 47 >> i, 65 >> i) for i, dim in enumerate((8, 16, 32, 64))]
    out = model(image)
    return [out] if isinstance(out, torch.Tensor) else list(out)


@pytest.mark.parametrize('name', [*SMALL, 'feedformer', *TOKEN_MIXERS])
def test_gradients_and_state_dicts(name):
    """Every parameter gets a gradient; a state dict gives the same model again."""
    model, other, image = build(name), build(name), torch.randn(2, 3, 128, 160)
    for parameter in model.parameters():  # initial norms and zero biases leave some gradients 0
        if name in TOKEN_MIXERS:
            torch.nn.init.normal_(parameter, std=0.3)
    maps = outputs(model.train(), image)
    sum(x.square().mean() * (x.detach() ** 2).mean() + (x * torch.randn_like(x)).mean()
        for x in maps).backward()
    assert [key for key, p in model.named_parameters() if p.requires_grad and (
        p.grad is None or (name in TOKEN_MIXERS and not p.grad.abs().sum() > 0))] == []
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for x, y in zip(outputs(model.eval(), image), outputs(other.eval(), image)):
            assert torch.equal(x, y)


@pytest.mark.parametrize('name', SMALL)
@pytest.mark.parametrize('size', [(64, 96), (101, 75)])
@torch.no_grad()
def test_maps_and_one_decoder_on_them(name, size):
    maps = build(name).eval()(torch.randn(2, 3, *size))
    for i, x in enumerate(maps):
        assert x.dim() == 4
        # CvT's first patches have less padding, others round up.
        assert all(abs(side - full / 2 ** (i + 2)) <= 1 for side, full in zip(x.shape[2:], size))
        assert x.is_contiguous(memory_format=torch.channels_last)
    index = range(len(maps) - 3, len(maps))
    head = EDAFormerHead([maps[i].shape[1] for i in index], 16, in_index=index, num_classes=4)
    assert head(maps).shape == (2, 4, *maps[index[0]].shape[2:])


def test_parameters_of_the_papers():
    """LVT's encoder has 3.4 M, FeedFormer-B0 4.5 M."""
    assert sum(p.numel() for p in LVT().parameters()) == pytest.approx(3.4e6, rel=0.015)
    head = FeedFormerHead((32, 64, 160, 256), 256, num_classes=150)
    mit = MODELS.build(dict(type='MixVisionTransformer', embed_dims=32, num_layers=(2, 2, 2, 2),
                            num_heads=(1, 2, 5, 8), qkv_bias=True))
    parameters = sum(p.numel() for model in (head, mit) for p in model.parameters())
    assert round(parameters / 1e6, 1) == 4.5


@torch.no_grad()
def test_the_recursion_is_what_it_says():
    layer = RecursiveAtrousSelfAttention(16, 2, 2)
    torch.nn.init.normal_(layer.recursion)
    x = torch.randn(2, 16, 9, 7)
    given, state = layer.recursion[0][:, :, None, None]
    torch.testing.assert_close(layer(x), layer.attend(given * x + state * layer.attend(x)))


@pytest.mark.parametrize(('build', 'message'), [
    (lambda: LVT(depths=(1, 1)), '2 depths'),
    (lambda: LVT(num_heads=(3, 2, 5, 8)), 'num_heads=3 does not divide embed_dims=64'),
    (lambda: FeedFormerHead((8, 16), 8, num_classes=3), '3 in_index'),
    (lambda: FeedFormerHead((8, 15), 8, in_index=(0, 1), num_heads=(2,), pool_ratios=(8,),
                            num_classes=3), 'num_heads=2 does not divide in_channels=15'),
])
def test_wrong_sizes_are_named(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


def test_what_a_library_lacks_is_named(monkeypatch):
    pytest.importorskip('timm', reason='the backbone comes from timm')
    with pytest.raises(ConfigError, match="has no model 'pvt_v3'"):
        MODELS.build(dict(type='TimmMaps', model_name='pvt_v3'))
    for name, library in ('pvtv2', 'timm'), ('cvt', 'transformers'):
        monkeypatch.setitem(sys.modules, library, None)
        with pytest.raises(ConfigError, match=f'python -m pip install {library}'):
            MODELS.build(dict(SMALL[name]))


# What stands at the attention's place in the decoder, for tables 3(a) and 5(b).

def plain(layer, x, kernel):
    """Attention with Q, K, V as it is written down, the scores in full."""
    n, c, height, width = x.shape
    pooled = layer.kv(F.avg_pool2d(x, kernel)).flatten(2).transpose(1, 2)  # N M C
    if layer.kv_norm is not None:
        pooled = F.gelu(F.layer_norm(pooled, (c,), layer.kv_norm.weight, layer.kv_norm.bias))
    q, k, v = (F.linear(t, part.weight, part.bias).unflatten(2, (layer.num_heads, -1)) for t, part
               in ((x.flatten(2).transpose(1, 2), layer.query), (pooled, layer.key),
                   (pooled, layer.value)))
    scores = torch.einsum('nqhd,nkhd->nhqk', q, k) / (c // layer.num_heads) ** 0.5
    out = torch.einsum('nhqk,nkhd->nqhd', scores.softmax(-1), v).flatten(2)
    out = F.linear(out, layer.proj.weight, layer.proj.bias)
    return out.transpose(1, 2).reshape(n, c, height, width)


@pytest.mark.parametrize('kv_norm', [True, False])
@pytest.mark.parametrize('isr_ratio', [1, 2])
@pytest.mark.parametrize('size', [(8, 12), (9, 13), (17, 7)])
def test_embedded_attention(size, isr_ratio, kv_norm):
    layer = EmbeddedAttention(24, 3, 2, kv_norm=kv_norm)
    x = torch.randn(2, 24, *size)
    layer.isr_ratio = isr_ratio
    kernel = 2 * isr_ratio
    assert layer.num_keys(*size) == (size[0] // kernel) * (size[1] // kernel)
    torch.testing.assert_close(layer(x), plain(layer, x, kernel), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_isr_on_token_mixers():
    model = build('embedded').eval()
    before, = outputs(model, None)
    with isr(model, 2):
        assert not torch.equal(outputs(model, None)[0], before)
    assert torch.equal(outputs(model, None)[0], before)
    with pytest.raises(RatioError, match='isr_ratio 2'):
        apply_isr(build('conv'), 2)
    with pytest.raises(ConfigError, match="no token_mixer 'mlp': use one of embedding_free, emb"):
        EDAFormerHead((16, 32, 64), 24, num_classes=5, token_mixer='mlp')
