"""Attention on a CPU by rows, and the padding that GPUs want, against their plain versions."""
import functools
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmseg_edaformer.models import MixFFN, attention, blocks
from mmseg_edaformer.models.layers import gelu


def sdpa(x, kv, num_heads):
    n, c, height, width = x.shape
    q, k = (t.flatten(2).unflatten(1, (num_heads, -1)).transpose(2, 3) for t in (x, kv))
    out = F.scaled_dot_product_attention(q, k, k)
    return out.transpose(2, 3).reshape(n, c, height, width)


@pytest.mark.parametrize('rows', [1, 3, 100, 'native'])
@pytest.mark.parametrize(('heads', 'dim', 'size', 'keys'), [
    (1, 32, (16, 12), (4, 3)), (4, 32, (7, 9), (7, 9)), (8, 8, (5, 5), (1, 1)),
    (2, 16, (1, 1), (1, 1)), (3, 12, (13, 31), (9, 15))])
@pytest.mark.parametrize('threads', [1, 2])
def test_by_rows(heads, dim, size, keys, rows, threads, monkeypatch, set_threads):
    set_threads(threads)
    if rows != 'native':
        monkeypatch.setattr(attention.cpu_kernels, '_library', lambda: None)
        monkeypatch.setattr(attention, 'SCORE_BYTES',
                            rows * size[1] * heads * keys[0] * keys[1] * 4)
    x, kv = (torch.randn(2, heads * dim, *shape).to(memory_format=torch.channels_last)
             for shape in (size, keys))
    with torch.no_grad():
        found = attention.attend_by_rows(x, kv, heads)
    torch.testing.assert_close(found, sdpa(x, kv, heads), rtol=1e-5, atol=1e-5)
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.fixture(params=[True, False], ids=['compiled', 'plain'])
def _kernels(request, monkeypatch):
    """With the compiled operators, and without."""
    if not request.param:
        monkeypatch.setattr(attention.cpu_kernels, '_library', lambda: None)


@pytest.mark.usefixtures('_kernels')
@torch.no_grad()
def test_by_rows_in_bfloat16_and_with_large_scores():
    x, kv = torch.randn(1, 64, 12, 12), torch.randn(1, 64, 6, 6)
    out = attention.attend_by_rows(x.bfloat16(), kv.bfloat16(), 2)
    assert (out.float() - sdpa(x, kv, 2)).abs().max() < 0.03
    x = torch.randn(1, 32, 6, 6) * 300
    torch.testing.assert_close(attention.attend_by_rows(x, x, 1), sdpa(x, x, 1), rtol=1e-5,
                               atol=1e-3)


@pytest.mark.gpu
def test_gradients_take_the_differentiable_way(device):
    layer = attention.EmbeddingFreeAttention(32, 2, 2).to(device)
    x = torch.randn(1, 32, 8, 8).to(device)
    trained = layer(x)
    trained.sum().backward()
    assert layer.kv.weight.grad is not None
    with torch.no_grad():
        torch.testing.assert_close(layer(x), trained, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize('relu', [True, False])
def test_padding_changes_nothing(relu, device, monkeypatch):
    ffn = MixFFN(16, 3.8, relu=relu).to(device)
    x = torch.randn(2, 16, 6, 5).to(device, memory_format=torch.channels_last)
    expected = ffn(x)
    expected.square().sum().backward()
    grads = [p.grad.clone() for p in ffn.parameters()]
    ffn.zero_grad()
    monkeypatch.setattr(blocks, '_padding', lambda x, hidden: -hidden % 8)
    found = ffn(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    found.square().sum().backward()
    for p, grad in zip(ffn.parameters(), grads):
        torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_gpus_pad_only_to_predict(segmentor, dtype, cuda, monkeypatch):
    """With maps that are large enough, here all; the outputs stay."""
    segmentor = segmentor.to(cuda, dtype)
    ffn = MixFFN(16, 3.8, relu=True).to(cuda, dtype)
    image = torch.randn(2, 3, 64, 96).to(cuda, dtype)
    x = torch.randn(2, 16, 6, 5).to(cuda, dtype, memory_format=torch.channels_last)
    with torch.no_grad():
        expected = segmentor(image), ffn(x)
        monkeypatch.setattr(blocks, 'ALIGN_FROM', 1)
        assert blocks._padding(x, 60) == 4
        for found, before in zip((segmentor(image), ffn(x)), expected):
            error = (found.float() - before.float()).abs().max() / before.float().std()
            assert error < (0.05 if dtype == torch.bfloat16 else 1e-4)
    assert blocks._padding(x, 60) == 0


@pytest.mark.skipif(shutil.which('g++') is None, reason='needs g++')
def test_native_is_built_once_and_used(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.setattr(attention.cpu_kernels, '_library',
                        functools.cache(attention.cpu_kernels._library.__wrapped__))
    x = torch.randn(1, 32, 4, 4)
    found = attention.cpu_kernels.attend(x, x, 1)
    torch.testing.assert_close(found, sdpa(x, x, 1), rtol=1e-5, atol=1e-5)
    library, = (tmp_path / 'mmseg_edaformer').iterdir()
    built = library.stat().st_mtime_ns
    attention.cpu_kernels._library.cache_clear()
    attention.cpu_kernels.attend(x, x, 1)
    assert library.stat().st_mtime_ns == built
    content = library.read_bytes()

    def compile_again(command, **options):
        Path(command[command.index('-o') + 1]).write_bytes(content)

    monkeypatch.setattr(subprocess, 'run', compile_again)
    for damaged in (content[:len(content) // 2], content[:-1], b'', content[:-1] + b'x'):
        library.unlink()  # this process uses it
        library.write_bytes(damaged)
        attention.cpu_kernels._library.cache_clear()
        torch.testing.assert_close(attention.cpu_kernels.attend(x, x, 1), found)
        assert library.read_bytes() == content


def test_a_broken_compiler_is_named_and_done_without(tmp_path, monkeypatch):
    compiler = tmp_path / 'broken'
    compiler.write_text('#!/bin/sh\necho no such option >&2\nexit 1\n')
    compiler.chmod(0o755)
    monkeypatch.setenv('CXX', str(compiler))
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    with pytest.warns(UserWarning, match='no such option'):
        assert attention.cpu_kernels._library.__wrapped__() is None


@pytest.mark.usefixtures('_kernels')
@pytest.mark.parametrize('shape', [(1, 16, 1, 1), (2, 121, 9, 35), (1, 3, 2, 2), (1, 64, 40, 41)])
@torch.no_grad()
def test_gelu(shape):
    x = (torch.randn(shape) * 4).to(memory_format=torch.channels_last)
    expected, half = F.gelu(x), x.bfloat16()
    torch.testing.assert_close(gelu(x.clone()), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gelu(half.clone()), F.gelu(half), rtol=8e-3, atol=1e-6)


@pytest.mark.gpu
def test_a_fused_kernel_takes_it(device):
    """PyTorch raises where none of the allowed kernels takes these shapes and types."""
    layer = attention.EmbeddingFreeAttention(64, 2, 4).to(device, torch.bfloat16)
    x = torch.randn(2, 64, 32, 32).to(device, torch.bfloat16)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]):
        layer(x.to(memory_format=torch.channels_last)).sum().backward()
