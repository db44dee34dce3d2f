"""Label maps from low-resolution logits are mmseg's, but for ties within rounding."""
import random
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmseg_edaformer.models.label_map import ROUNDING, label_map, label_maps
from mmseg_edaformer.models.resize import Chain, axis_taps

CHAINS = [
    Chain((48, 64)),
    Chain((48, 64), ori_shape=(48, 64)),
    Chain((48, 64), ori_shape=(71, 150)),
    Chain((48, 64), ori_shape=(31, 40), align_corners=True),
    Chain((48, 64), (3, 5, 0, 7), 'horizontal', (90, 120)),
    Chain((48, 64), (0, 0, 4, 4), 'vertical', (90, 33), True),
    Chain((12, 16), ori_shape=(200, 300)),
    Chain((5, 7), (1, 0, 0, 1), None, (3, 4)),
    Chain((160, 200), ori_shape=(1, 1)),
    Chain((12, 16)),
    Chain((12, 16), ori_shape=(15, 17)),
    Chain((12, 16), ori_shape=(15, 17), first=False),
    Chain((12, 16), ori_shape=(71, 80), align_corners=True, first=False),
    Chain((12, 16), (1, 2, 3, 4), 'horizontal', (5, 13)),
]


def make(kind, classes, size=(12, 16), batch=2):
    """Logits of one sort."""
    if kind == 'smooth':
        return F.interpolate(torch.randn(batch, classes, 3, 4), size, mode='bicubic') * 4
    logits = torch.randn(batch, classes, *size)
    return {'random': logits, 'zero': logits * 0, 'integer': logits.round(),
            'quantised': logits.mul(8).round() / 8, 'wide': logits * 1e4,
            'rare': torch.where(logits.abs() < 3, 0., logits)}[kind]


def resized(logits, chain, i):
    """The logits of one image as mmseg resizes them: the batch, then each image."""
    left, right, top, bottom = chain.padding
    height, width = chain.input_size
    x = F.interpolate(logits, chain.input_size, mode='bilinear',
                      align_corners=chain.align_corners) if chain.first else logits
    x = x[i:i + 1, :, top:height - bottom, left:width - right]
    if chain.flip:
        x = x.flip(dims=(3 if chain.flip == 'horizontal' else 2,))
    if chain.ori_shape:
        x = F.interpolate(x, chain.ori_shape, mode='bilinear', align_corners=chain.align_corners)
    return x.squeeze(0)


def check(logits, chain, scale=None, kernels=False, **kwargs):
    """Compare with mmseg; with ``kernels`` also what a GPU does to a whole batch.

    Where mmseg's logits of the two classes differ by no more than ROUNDING times the largest logit,
    or ``scale``, either class is right.
    """
    found = [label_map(logits[i:i + 1], chain, **kwargs) for i in range(len(logits))]
    batches = [found, label_maps(logits, [chain] * len(logits))] if kernels else [found]
    for i in range(len(logits)):
        values = resized(logits.float(), chain, i)
        best = values.argmax(0)
        largest = values.gather(0, best[None])[0]
        for batch in batches:
            got = batch[i]
            assert got.dtype == (torch.uint8 if logits.shape[1] <= 256 else torch.int16)
            lost = largest - values.gather(0, got.long()[None])[0]
            near = lost <= ROUNDING * (logits[i].float().abs().max() if scale is None else scale)
            assert (near | (got == best)).all()


@pytest.mark.parametrize('chain', CHAINS, ids=str)
@pytest.mark.parametrize('classes', [2, pytest.param(19, marks=pytest.mark.gpu), 150, 300])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_equal_to_mmseg(chain, classes, memory_format, device):
    for kind in ('smooth', 'random', 'zero', 'integer', 'quantised', 'wide', 'rare'):
        check(make(kind, classes).to(device, memory_format=memory_format), chain, kernels=True)


@pytest.mark.gpu
def test_equal_whatever_the_sizes(device):
    draw = random.Random(0)
    for _ in range(150):
        size = draw.choice([(1, 1), (1, 5), (7, 1), (4, 6), (17, 9)])
        inner = (draw.randint(4, 90), draw.randint(4, 90))
        chain = Chain(inner, tuple(draw.choice([0, 1]) for _ in range(4)),
                      draw.choice([None, 'horizontal', 'vertical']),
                      draw.choice([None, inner, (draw.randint(1, 140), draw.randint(1, 140))]),
                      draw.random() < 0.5)
        logits = make(draw.choice(['smooth', 'random', 'integer']), draw.choice([2, 5, 21]), size)
        if draw.random() < 0.5:
            logits = logits.contiguous(memory_format=torch.channels_last)
        check(logits.to(device), chain, memory=draw.choice([1 << 14, 1 << 28]))


@pytest.mark.gpu
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_not_finite(memory_format, device):
    for value in (torch.nan, torch.inf, -torch.inf, 3e38):
        logits = make('random', 37).to(device, memory_format=memory_format)
        logits[:, 20, 5, 6] = value
        for number, chain in enumerate(CHAINS):
            check(logits, chain, scale=6, kernels=number % 4 == 0)


@pytest.mark.gpu
@pytest.mark.parametrize('precision', ['high', 'medium'])
def test_reduced_precision_of_products_changes_nothing(precision, device):
    torch.set_float32_matmul_precision(precision)
    try:
        with torch.autocast(device.type):
            check(make('random', 19).to(device), CHAINS[2], kernels=True)
    finally:
        torch.set_float32_matmul_precision('highest')


@pytest.mark.gpu
def test_taps_of_long_axes_are_exact(device):
    """Where compilers fuse the source position, naive weights are off by many roundings."""
    for low, out in ((128, 4000), (192, 6000), (64, 683)):
        units = torch.eye(low).to(device)[None, :, :, None]
        indices, weights = axis_taps(low, out, (0, 0), False, None, False, str(units.device))
        dense = weights.new_zeros(out, low).scatter_add_(1, indices.long(), weights)
        wanted = F.interpolate(units, (out, 1), mode='bilinear')[0, :, :, 0].t()
        torch.testing.assert_close(dense, wanted, rtol=0, atol=2e-7)


class LiveBytes(TorchDispatchMode):
    """The largest sum of what the tensors made inside hold at once."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs))
                  if isinstance(leaf, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                key = storage._cdata
                if key not in self.seen and key not in before:
                    self.seen.add(key)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._drop, key, storage.nbytes())
        return out

    def _drop(self, key, size):
        if key in self.seen:
            self.seen.discard(key)
            self.now -= size


@pytest.mark.parametrize('kind', ['smooth', 'random'])
def test_memory_is_bounded(kind):
    logits = make(kind, 150, (64, 96), 1)
    chain = Chain((256, 384), ori_shape=(1000, 1500))  # 900 MB of logits
    label_map(logits, chain)  # fills the caches of the axes
    for memory in (32 << 20, 128 << 20):
        with LiveBytes() as live:
            label_map(logits, chain, memory)
        assert live.peak < memory + logits.nbytes + 16 * 1000 * 1500
