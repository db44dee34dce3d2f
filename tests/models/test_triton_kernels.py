"""The Triton kernels against their plain versions: on a GPU, else in Triton's interpreter.

`make test-gpu` and `make test-kernels` run these; with neither a GPU nor the interpreter, or
without Triton, they are skipped.
"""
import importlib.util
import os

import pytest
import torch

from mmseg_edaformer.models import label_map as labels, layers, loss
from mmseg_edaformer.models.resize import Chain
from tests.conftest import run
from tests.models.test_label_map import check

DEVICE = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
RUNS = importlib.util.find_spec('triton') is not None and (
    DEVICE.type == 'cuda' or os.environ.get('TRITON_INTERPRET') == '1')
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(
    not RUNS, reason='needs Triton, and a GPU or TRITON_INTERPRET=1')]
LARGE = pytest.mark.skipif(DEVICE.type == 'cpu', reason='takes too long in the interpreter')
if RUNS:
    from mmseg_edaformer.models import triton_kernels as kernels


@pytest.fixture(autouse=True)
def _use(monkeypatch):
    """Take the way of GPUs on a CPU too."""
    monkeypatch.setattr(labels, 'gpu_kernels', lambda x: kernels)
    monkeypatch.setattr(loss, 'gpu_kernels', lambda x: kernels)


def large(*values):
    """Parameters of a case that only a GPU runs."""
    return pytest.param(*values, marks=LARGE)


def test_check():
    kernels.check(DEVICE)


@pytest.mark.parametrize('wrong', ['resize_argmax', 'resize_cross_entropy'])
def test_kernels_that_are_wrong_are_not_used(wrong, monkeypatch):
    kernel = getattr(kernels, wrong)

    def off(*args):
        out = kernel(*args)
        return out + 1 if wrong == 'resize_argmax' else (out[0], out[1], out[2] + 1)

    monkeypatch.setattr(kernels, wrong, off)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'this device')
    with pytest.warns(UserWarning, match='do not work on this device.*differ from those of plain'):
        assert layers._kernels.__wrapped__(DEVICE) is None


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from mmseg_edaformer.models import triton_kernels as kernels

def compile(kernel, capability, logits, **constants):
    types = dict(labels='*u8' if kernel is kernels._resize_argmax else '*i64', grad='*fp32',
                 logits=logits, loss='*fp32', correct='*i32')
    for axis in 'xy':
        types |= {f'{axis}_weight': '*fp32', f'{axis}_index': '*i32', f'{axis}_start': '*i32',
                  f'{axis}_length': '*i32'}
    signature = {name: 'constexpr' if name in constants else types.get(name, 'i32')
                 for name in kernel.arg_names}
    triton.compile(triton.compiler.ASTSource(kernel, signature, constants),
                   target=GPUTarget('cuda', capability, 32))

for capability in 80, 90:
    for logits in '*fp32', '*bf16':
        sizes = dict(classes=150, TY=3, TX=2, BY=4, BX=8, BC=kernels.CLASS_BLOCK)
        compile(kernels._resize_argmax, capability, logits, **sizes)
        for grad in False, True:
            compile(kernels._resize_cross_entropy, capability, logits, GRAD=grad, **sizes)
print('compiled')
"""


@pytest.mark.skipif(DEVICE.type == 'cuda', reason='the other tests compile them')
def test_they_compile_without_a_gpu(monkeypatch, tmp_path):
    monkeypatch.delenv('TRITON_INTERPRET')
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    assert run('-c', COMPILE).stdout == 'compiled\n'


CHAINS = [
    Chain((9, 7)), Chain((24, 40)), Chain((24, 40), ori_shape=(31, 17)),
    Chain((12, 12), (2, 1, 0, 3), 'horizontal', (40, 12)),
    Chain((24, 24), flip='vertical', ori_shape=(24, 24), align_corners=True)]
KINDS = [(5, 'random'), (300, 'random'), (5, 'ties'), (3, 'nan'), (40, 'random')]


@pytest.mark.parametrize(('classes', 'kind', 'chain'), [
    pytest.param(*kind, chain, marks=() if kind in (KINDS[0], own) else LARGE)
    for chain, own in zip(CHAINS, KINDS) for kind in KINDS], ids=str)
def test_label_maps(classes, kind, chain):
    logits = torch.randn(2, classes, 3, 5)
    if kind == 'ties':
        logits = logits.round()
    if kind == 'nan':
        logits[1, 2, 1, 1] = torch.nan
    logits = logits.to(DEVICE)
    if chain.flip:
        logits = logits.to(memory_format=torch.channels_last)
    check(logits, chain, kernels=True)


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(('batch', 'classes', 'low', 'chain'), [
    (1, 19, (3, 4), Chain((13, 22), (1, 0, 2, 1), 'vertical', (11, 17))),
    large(2, 150, (64, 64), Chain((512, 512))),
    large(2, 150, (64, 64), Chain((512, 512), (0, 60, 12, 100), 'horizontal', (683, 772))),
    large(1, 19, (128, 128), Chain((1024, 1024))),
    large(1, 19, (128, 128), Chain((1024, 1024), ori_shape=(300, 401))),
    large(2, 171, (73, 97), Chain((577, 769))),
    large(1, 171, (73, 97), Chain((577, 769), (5, 2, 0, 1), 'vertical', (1200, 901), True)),
    large(8, 150, (64, 64), Chain((512, 512), ori_shape=(600, 450)))], ids=str)
def test_label_maps_of_all_sizes(batch, classes, low, chain, dtype, layout):
    logits = torch.randn(batch, classes, *low).to(DEVICE, dtype, memory_format=layout)
    check(logits, chain, kernels=True)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('layout', [torch.contiguous_format, large(torch.channels_last)], ids=str)
@pytest.mark.parametrize(('batch', 'classes', 'low', 'full'), [
    (2, 7, (5, 6), (33, 20)), (2, 40, (4, 4), (4, 9)), (2, 3, (1, 2), (8, 8)),
    large(8, 150, (64, 64), (512, 512)), large(2, 19, (128, 128), (1024, 1024)),
    large(2, 171, (73, 97), (577, 769)), large(2, 150, (64, 64), (300, 200))], ids=str)
def test_cross_entropy(batch, classes, low, full, layout, dtype, monkeypatch):
    logits = torch.randn(batch, classes, *low).to(DEVICE, dtype, memory_format=layout)
    logits.requires_grad_()
    target = torch.randint(classes, (batch, *full)).to(DEVICE)
    target[0, :2] = 255
    results = []
    for module in (kernels, None):
        monkeypatch.setattr(loss, 'gpu_kernels', lambda x, module=module: module)
        value, correct = loss.resize_cross_entropy(logits, target, ignore_index=255)
        results.append((value, correct, *torch.autograd.grad(value * 0.5, logits)))
    (value, correct, grad), (expected, expected_correct, expected_grad) = results
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4,
                               atol=1e-5 if target.numel() < 10_000 else 1e-4)
    # Where two classes are equal but for rounding, either is right.
    assert abs(int(correct) - int(expected_correct)) <= target.numel() // 50_000


@pytest.mark.parametrize('ignored', ['all', 'none'])
def test_cross_entropy_where_nothing_or_all_counts(ignored):
    logits = torch.randn(1, 5, 3, 4, device=DEVICE, requires_grad=True)
    target = torch.full((1, 12, 16), 255 if ignored == 'all' else 4, device=DEVICE)
    value, correct = loss.resize_cross_entropy(logits, target, ignore_index=255)
    grad, = torch.autograd.grad(value, logits)
    if ignored == 'all':
        assert value == correct == 0
        assert not grad.any()
    else:
        # Softmax minus one-hot adds up to zero over the classes.
        torch.testing.assert_close(grad.sum(1), torch.zeros_like(grad[:, 0]), rtol=0, atol=1e-4)


def test_a_label_out_of_range_is_nan():
    target = torch.full((1, 4, 4), 3, device=DEVICE)
    value, _ = loss.resize_cross_entropy(torch.zeros(1, 3, 2, 2, device=DEVICE), target,
                                         ignore_index=255)
    assert value.isnan()
