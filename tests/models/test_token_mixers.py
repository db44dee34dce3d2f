"""What stands at the attention's place in the decoder, for tables 3(a) and 5(b)."""
import pytest
import torch
import torch.nn.functional as F

from mmseg_edaformer import EDAFormerHead, apply_isr, isr
from mmseg_edaformer.errors import ConfigError
from mmseg_edaformer.models import EmbeddedAttention


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


def head(token_mixer):
    return EDAFormerHead((16, 32, 64), 24, num_classes=5, token_mixer=token_mixer).eval()


def maps():
    return [torch.randn(2, dim, 47 >> i, 65 >> i) for i, dim in enumerate((8, 16, 32, 64))]


@torch.no_grad()
def test_isr_reduces_the_embedded_decoder():
    model, x = head('embedded'), maps()
    before = model(x)
    with isr(model, 2):
        assert not torch.equal(model(x), before)
    assert torch.equal(model(x), before)


def test_isr_says_that_convolutions_have_no_keys():
    with pytest.raises(ValueError, match='isr_ratio 2'):
        apply_isr(head('conv'), 2)


def test_an_unknown_mixer_is_named():
    with pytest.raises(ConfigError, match="no token_mixer 'mlp': use one of embedding_free, emb"):
        head('mlp')
