"""Compiled networks: the same answers, for sizes and ratios that come later too."""
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from mmseg_edaformer import apply_isr
from mmseg_edaformer.compat import compiled_resize
from mmseg_edaformer.engine.compile import compile_model


@pytest.fixture
def images():
    torch.compiler.reset()  # or the sizes that other tests compiled would count
    torch.manual_seed(0)
    yield [torch.randn(1, 3, *size) for size in ((64, 96), (96, 64), (128, 160), (70, 101))]
    torch.compiler.reset()


@pytest.mark.slow
def test_sizes_and_ratios(segmentor, images):
    names = list(segmentor.state_dict())
    with torch.no_grad():
        expected = [segmentor(image) for image in images]
        apply_isr(segmentor, 2)
        reduced = segmentor(images[0])
        apply_isr(segmentor, 1)
        compile_model(segmentor)
        for image, output in zip(images[:3], expected):
            torch.testing.assert_close(segmentor(image), output, rtol=1e-4, atol=1e-5)
        with torch.compiler.set_stance('fail_on_recompile'):  # now there is code for every size
            torch.testing.assert_close(segmentor(images[3]), expected[3], rtol=1e-4, atol=1e-5)
        apply_isr(segmentor, 2)
        torch.testing.assert_close(segmentor(images[0]), reduced, rtol=1e-4, atol=1e-5)
    assert list(segmentor.state_dict()) == names


@pytest.mark.slow
def test_frozen(segmentor, images):
    with torch.no_grad():
        expected = segmentor(images[0])
        compile_model(segmentor, fixed_size=True, frozen=True)
        torch.testing.assert_close(segmentor(images[0]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_trains(segmentor, images):
    segmentor.train()
    for module in segmentor.modules():
        if hasattr(module, 'drop_prob'):
            module.drop_prob = 0.
    segmentor.decode_head.dropout = None
    segmentor(images[0]).square().mean().backward()
    expected = {name: p.grad.clone() for name, p in segmentor.named_parameters()}
    segmentor.zero_grad()
    compile_model(segmentor, fixed_size=True)
    segmentor(images[0]).square().mean().backward()
    for name, p in segmentor.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-2, atol=1e-5, msg=name)


@pytest.mark.skipif(sys.platform != 'linux', reason='glibc only')
def test_freed_memory_is_kept():
    """A large tensor that is freed and made again costs no page faults any more."""
    script = '''
import resource, torch
from mmseg_edaformer.engine.allocator import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(1 << 24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
before = faults()
keep_freed_memory()
faults()
print(before, faults())
'''
    before, after = map(int, subprocess.run([sys.executable, '-c', script], check=True, text=True,
                                            capture_output=True).stdout.split()[-2:])
    assert before > 100
    assert after < before / 10


@pytest.mark.parametrize('align_corners', [False, True])
def test_compiled_resize(align_corners):
    x = torch.randn(2, 5, 7, 4, requires_grad=True)
    expected = F.interpolate(x, (19, 9), None, 'bilinear', align_corners)
    found = compiled_resize(x, (19, 9), align_corners)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(expected)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, grad)[0] for y in (found, expected)),
                               rtol=1e-5, atol=1e-5)
