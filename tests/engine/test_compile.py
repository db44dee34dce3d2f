"""Compiled networks: the same answers, for sizes and ratios that come later too.

A C++ compiler takes about 3 s for each of some 40 kernels of a small network, so on CPUs
`make soak` runs what generates code.
"""
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from mmseg.registry import MODELS

from mmseg_edaformer import apply_isr
from mmseg_edaformer.compat import compiled_resize
from mmseg_edaformer.engine.compile import compile_model, cuda_graphs
from tests.conftest import segmentor_config


@pytest.fixture
def images(device):
    torch.compiler.reset()  # or the sizes that other tests compiled would count
    torch.manual_seed(0)
    yield [torch.randn(1, 3, *size).to(device)
           for size in ((64, 96), (96, 64), (128, 160), (70, 101))]
    torch.compiler.reset()


def assert_near(found, expected):
    """Equal up to the rounding of float32, which is coarser where a GPU's kernels differ."""
    tolerance = dict(rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    torch.testing.assert_close(found, expected, **(
        tolerance if expected.is_cuda else dict(rtol=1e-4, atol=1e-5)))


@pytest.fixture
def tiny():
    """An EDAFormer of three blocks."""
    sizes = dict(embed_dims=(16, 32), depths=(1, 1), num_heads=(1, 2), pool_ratios=(2, 1))
    config = segmentor_config(depths=(1,), num_heads=(2,), pool_ratios=(1,), in_index=(1,))
    config['backbone'] = dict(type='EFT', arch=dict(sizes, ffn_ratios=(2, 2)), out_indices=(0, 1))
    config['decode_head']['in_channels'] = (32,)
    torch.manual_seed(0)
    return MODELS.build(config).eval()


@pytest.mark.gpu
@pytest.mark.soak
def test_sizes_and_ratios(tiny, images, device):
    segmentor = tiny
    names = list(segmentor.state_dict())
    segmentor.to(device)
    with torch.no_grad():
        expected = [segmentor(image) for image in images]
        apply_isr(segmentor, '2+q2')
        reduced = segmentor(images[0])
        apply_isr(segmentor, 1)
        compile_model(segmentor)
        for image, output in zip(images[:3], expected):
            assert_near(segmentor(image), output)
        if torch.__version__ >= (2, 13):  # 2.11 compiles again where a pool divides its map
            with torch.compiler.set_stance('fail_on_recompile'):  # there is code for every size
                assert_near(segmentor(images[3]), expected[3])
        apply_isr(segmentor, '2+q2')
        assert_near(segmentor(images[0]), reduced)
    assert list(segmentor.state_dict()) == names


@pytest.mark.gpu
@pytest.mark.parametrize('settings', [dict(graphs=True), dict(fixed_size=True)], ids=str)
def test_graphs_for_each_size_and_ratio(segmentor, images, device, settings):
    """On a GPU the first call of each warms up, the second records, and later ones replay."""
    if device.type == 'cpu' and not settings.get('graphs'):
        pytest.skip('takes minutes on a CPU, and makes no graphs there')
    segmentor.to(device)
    for level in segmentor.decode_head.levels:
        del level[1:]  # tracing takes time
    # For the larger image auto reduces the keys.
    cases = {'none': images[0], '2+q2': images[0], 'auto': images[2]}
    expected = {}
    with torch.no_grad():
        for ratio, image in cases.items():
            apply_isr(segmentor, ratio)
            expected[ratio] = [segmentor(image * scale) for scale in (1, 2, 3)]
        compile_model(segmentor, **settings)
        for ratio, image in [*cases.items()] * 2:
            apply_isr(segmentor, ratio)
            found = [segmentor(image * scale) for scale in (1, 2, 3)]  # none overwrites another
            for output, wanted in zip(found, expected[ratio]):
                assert_near(output, wanted)


@pytest.mark.gpu
def test_graphs_read_weights_where_they_lie(cuda):
    layer = torch.nn.Linear(8, 8).to(cuda)

    def network(x, weight, bias):
        return (F.linear(x, weight, bias).relu_(),)

    assert cuda_graphs(network, None) is network  # gradients are not recorded
    with torch.no_grad():
        run = cuda_graphs(network, None)
        results = []
        for change in range(6):
            if change in (2, 3):
                layer.weight.mul_(-1)
            elif change > 3:
                layer.weight.data = torch.randn_like(layer.weight)
            x = torch.randn(4, 8, device=cuda)
            results.append((run(x, layer.weight, layer.bias)[0], layer(x).relu()))
    for found, expected in results:  # and no replay overwrites what an earlier one gave
        torch.testing.assert_close(found, expected)


@pytest.mark.soak
def test_frozen(segmentor, images):
    with torch.no_grad():
        expected = segmentor(images[0])
        compile_model(segmentor, fixed_size=True, frozen=True)
        assert_near(segmentor(images[0]), expected)


@pytest.mark.gpu
@pytest.mark.soak
def test_trains(segmentor, images, device):
    segmentor.to(device).train()
    for module in segmentor.modules():
        if hasattr(module, 'drop_prob'):
            module.drop_prob = 0.
    segmentor.decode_head.dropout = None
    segmentor(images[0]).square().mean().backward()
    expected = {name: p.grad.clone() for name, p in segmentor.named_parameters()}
    compile_model(segmentor, fixed_size=True)
    for _ in range(3):  # on a GPU the third replays what the second recorded
        segmentor.zero_grad()
        segmentor(images[0]).square().mean().backward()
        for name, p in segmentor.named_parameters():
            atol = max(1e-5, 1e-3 * expected[name].abs().max().item()) if p.is_cuda else 1e-5
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-2, atol=atol, msg=name)


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
