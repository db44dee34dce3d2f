"""The Triton kernels against their plain versions: on a GPU, else in Triton's interpreter.

`make test-kernels` runs these; without Triton they are skipped.
"""
import os

import pytest
import torch

from mmseg_edaformer.models import labels, loss
from mmseg_edaformer.models.resize import Chain

DEVICE = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
pytest.importorskip('triton')
if DEVICE.type == 'cpu' and os.environ.get('TRITON_INTERPRET') != '1':
    pytest.skip('needs a GPU or TRITON_INTERPRET=1', allow_module_level=True)
from mmseg_edaformer.models import kernels  # noqa: E402


@pytest.fixture(autouse=True)
def _use(monkeypatch):
    """Take the way of GPUs on a CPU too."""
    monkeypatch.setattr(labels, 'gpu_kernels', lambda x: kernels)
    monkeypatch.setattr(loss, 'gpu_kernels', lambda x: kernels)


def test_check():
    kernels.check(DEVICE)


@pytest.mark.parametrize('chain', [
    Chain((24, 40)), Chain((9, 7)), Chain((24, 40), ori_shape=(31, 17)),
    Chain((24, 40), (2, 1, 0, 3), 'horizontal', (50, 61)),
    Chain((24, 24), flip='vertical', ori_shape=(24, 24), align_corners=True)])
@pytest.mark.parametrize(('classes', 'kind'), [(5, 'random'), (40, 'random'), (5, 'ties'),
                                               (3, 'nan'), (300, 'random')])
def test_label_maps(classes, kind, chain):
    logits = torch.randn(2, classes, 3, 5)
    if kind == 'ties':
        logits = logits.round()
    if kind == 'nan':
        logits[1, 2, 1, 1] = torch.nan
    logits = logits.to(DEVICE)
    if chain.flip:
        logits = logits.to(memory_format=torch.channels_last)
    found = labels.label_maps(logits, [chain, chain])
    for i, got in enumerate(found):
        expected = chain.resize(logits[i:i + 1])[0].argmax(0)
        assert got.dtype == (torch.uint8 if classes <= 256 else torch.int16)
        assert torch.equal(got.long(), expected)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(('classes', 'low', 'full'), [(7, (5, 6), (33, 20)), (40, (4, 4), (4, 9)),
                                                      (3, (1, 2), (8, 8))])
def test_cross_entropy(classes, low, full, dtype, monkeypatch):
    logits = torch.randn(2, classes, *low).to(DEVICE, dtype).requires_grad_()
    target = torch.randint(classes, (2, *full), device=DEVICE)
    target[0, :2] = 255
    results = []
    for module in (kernels, None):
        monkeypatch.setattr(loss, 'gpu_kernels', lambda x, module=module: module)
        value, correct = loss.resize_cross_entropy(logits, target, ignore_index=255)
        results.append((value, correct, *torch.autograd.grad(value * 0.5, logits)))
    (value, correct, grad), (expected, expected_correct, expected_grad) = results
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4,
                               atol=1e-5)
    assert correct == expected_correct


def test_a_label_out_of_range_is_nan():
    target = torch.full((1, 4, 4), 3, device=DEVICE)
    value, _ = loss.resize_cross_entropy(torch.zeros(1, 3, 2, 2, device=DEVICE), target,
                                         ignore_index=255)
    assert value.isnan()
