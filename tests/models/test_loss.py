"""The loss at full size, against mmseg's own and against plain PyTorch."""
import pytest
import torch
import torch.nn.functional as F
from mmengine.structures import PixelData
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.structures import SegDataSample

from mmseg_edaformer.models import loss


@pytest.mark.gpu
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize(('classes', 'low', 'full', 'rows'), [
    (7, (5, 6), (33, 41), 4), (19, (8, 8), (64, 64), 64), (3, (9, 9), (9, 9), 2),
    (150, (1, 3), (8, 8), 3), (5, (16, 12), (10, 30), 7)])
def test_equals_plain(classes, low, full, rows, align_corners, dtype, device, monkeypatch):
    monkeypatch.setattr(loss, 'BAND_BYTES', rows * classes * full[1] * 4)
    torch.manual_seed(0)
    layout = torch.channels_last if align_corners else torch.contiguous_format
    logits = torch.randn(2, classes, *low).to(device, dtype, memory_format=layout).requires_grad_()
    labels = torch.randint(classes, (2, *full)).to(device)
    labels[0, :2] = 255
    resized = F.interpolate(logits.float(), full, None, 'bilinear', align_corners)
    expected = F.cross_entropy(resized, labels, ignore_index=255, reduction='sum')
    expected_grad, = torch.autograd.grad(expected * 0.3, logits)
    for kernels in {loss.gpu_kernels(logits), None}:
        monkeypatch.setattr(loss, 'gpu_kernels', lambda x, kernels=kernels: kernels)
        found, correct = loss.resize_cross_entropy(logits, labels, ignore_index=255,
                                                   align_corners=align_corners)
        grad, = torch.autograd.grad(found * 0.3, logits)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
        assert grad.dtype == dtype
        torch.testing.assert_close(grad, expected_grad,
                                   rtol=1e-4 if dtype == torch.float32 else 2e-2, atol=1e-5)
        assert correct == (resized.argmax(1) == labels).sum()


def test_label_out_of_range_stops():
    """On a CPU; a GPU gives NaN, which `test_triton_kernels` tests."""
    with pytest.raises(RuntimeError):
        loss.resize_cross_entropy(torch.zeros(1, 3, 2, 2), torch.full((1, 4, 4), 3),
                                  ignore_index=255)


def samples(labels):
    return [SegDataSample(gt_sem_seg=PixelData(data=label[None])) for label in labels]


@pytest.mark.gpu
@pytest.mark.parametrize('avg_non_ignore', [False, True])
@pytest.mark.parametrize('ignored', [0, 20, 64 * 64])
def test_head_gives_the_losses_of_mmseg(segmentor, avg_non_ignore, ignored, device):
    head = segmentor.to(device).decode_head
    head.loss_decode.avg_non_ignore = avg_non_ignore
    torch.manual_seed(0)
    logits = torch.randn(2, head.num_classes, 8, 8).to(device).requires_grad_()
    labels = torch.randint(head.num_classes, (2, 64, 64)).to(device)
    labels.view(2, -1)[:, :ignored] = 255
    expected = BaseDecodeHead.loss_by_feat(head, logits, samples(labels))
    found = head.loss_by_feat(logits, samples(labels))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    grads = [torch.autograd.grad(losses['loss_ce'], logits)[0] for losses in (found, expected)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-8)


def test_other_losses_are_left_to_mmseg(segmentor):
    head = segmentor.decode_head
    logits = torch.randn(1, head.num_classes, 8, 8)
    labels = torch.randint(head.num_classes, (1, 32, 32))
    head.loss_decode.class_weight = torch.rand(head.num_classes).tolist()
    expected = BaseDecodeHead.loss_by_feat(head, logits, samples(labels))
    assert head.loss_by_feat(logits, samples(labels)) == expected
