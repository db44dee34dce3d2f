"""`make bench-gpu` with small models: every part runs, and what it finds is on the page."""
import json
import re

import pytest
import torch
from mmengine.utils import ManagerMixin

from mmseg_edaformer.analysis import benchmark, gpu_benchmark, roofline, timing
from mmseg_edaformer.analysis.timing import Rates
from mmseg_edaformer.errors import ConfigError
from mmseg_edaformer.models.cpu_kernels import kernels_allowed
from tests.conftest import ROOT
from tests.processes import forget

CPU = torch.device('cpu')


@pytest.fixture
def suite(tmp_path, monkeypatch, cuda):
    config = tmp_path / 'mini.py'
    config.write_text(f"""
_base_ = ['{ROOT}/configs/edaformer_t_ade.py']
model = dict(backbone=dict(embed_dims=(16, 32, 64, 128), depths=(1, 1, 1, 1)),
             decode_head=dict(in_channels=(32, 64, 128), channels=32, depths=(1, 1, 1)))
""")
    # It takes minutes on a CPU, and tests/engine compiles there.
    if 'passes for a GPU' in torch.cuda.get_device_name():
        take_turns = timing.take_turns
        monkeypatch.setattr(timing, 'take_turns', lambda *args, warm_up, **kwargs: take_turns(
            *args, warm_up=0, **kwargs))
        monkeypatch.setattr(roofline, '_WORKING_SET', 1)
        monkeypatch.setattr(benchmark, 'compile_model', lambda *_, **__: None)
        monkeypatch.setattr(gpu_benchmark, 'measure_rates', lambda *_: Rates(1., 1.))
        monkeypatch.setattr(gpu_benchmark, '_DRAWN', 2)
    forget(ManagerMixin)  # a training that other tests left would get the log
    monkeypatch.setattr(gpu_benchmark, 'CONFIGS', dict.fromkeys(gpu_benchmark.CONFIGS, config))
    yield gpu_benchmark.Suite([(64, 64), (64, 96)], [1], 2, 1e4, 0, 1, 3, 256, tmp_path)
    forget(ManagerMixin)  # mmengine's visualizer of a training whose folder is gone


@pytest.mark.gpu
def test_all_parts(suite):
    said = []
    assert suite.run(said.append), said
    assert kernels_allowed()
    found = json.loads((suite.out / 'gpu.json').read_text())
    assert len(found['seconds']) == len(said) == len(suite.parts())
    assert found['failed'] == {}
    ways = {(row['config'], row['execution'], row['isr_ratio']) for row in found['rows']}
    assert ways >= {*(('EDAFormer-T', 'eager', ratio) for ratio in ('2211-222', '2', 'auto')),
                    ('EDAFormer-T, graphed', 'graphed', 'auto'), ('SegFormer-B0', 'eager', 'none'),
                    ('EDAFormer-B, compiled', 'compiled', 'none'),
                    ('EDAFormer-T, plain kernels', 'eager', 'none')}
    assert {row['dtype'] for row in found['rows']} == {'float32', 'bfloat16'}
    assert all(row['total_ms'] > 0 for row in found['rows'])
    assert 0 <= found['training']['share'] <= 1
    for roof in found['rooflines'].values():
        assert len(roof['rows']) == 5
        assert roof['rows'][0]['ms'] >= roof['rows'][4]['ms'] > 0
    text = (suite.out / 'gpu.md').read_text()
    for title in ('In short', 'Prediction', 'Training', 'operators of prediction', 'training step'):
        assert re.search(rf'^## .*{title}', text, re.M), title
    assert re.search(r'^\| training \| 64x64 \| 2 \| bfloat16 \| EDAFormer-T \| none \|  \| \d',
                     text, re.M)
    assert 'None' not in text
    assert 'nan' not in text


@pytest.mark.gpu
def test_what_fails_or_does_not_fit_is_named(suite, monkeypatch):
    def fail():
        raise RuntimeError('sizes differ\nmore of it')

    monkeypatch.setattr(suite, 'parts', lambda: [
        gpu_benchmark.Part('rates', 1, fail), gpu_benchmark.Part('long', 1e6, lambda: None)])
    said = []
    assert not suite.run(said.append)
    assert suite.content['left_out'] == ['long']
    page = gpu_benchmark.page(suite.content)
    assert '- rates: RuntimeError: sizes differ\n' in page
    assert 'did not fit into 10000 seconds: long.' in page


def test_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(ConfigError, match='no GPU is visible'):
        gpu_benchmark.Suite([], [], 2, 1e4, 0, 1, 3, 256, ROOT)


def test_work_of_operators():
    """Products, a convolution in groups with its gradients, a norm: counted by hand."""
    a, b = torch.randn(8, 16), torch.randn(16, 32)
    image = torch.randn(1, 4, 6, 6, requires_grad=True)
    conv, norm = torch.nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), torch.ones(16)
    with roofline.Recorder() as recorder:
        for _ in range(3):
            a @ b
        torch.nn.functional.layer_norm(a.t().t(), (16,), norm)
        conv(image).sum().backward()
    works = {name: (recorder.calls[name, shapes, told], work.flops, work.bytes)
             for (name, shapes, told), work in recorder.works.items()}
    assert works['mm'] == (3, 2 * 8 * 16 * 32, 4 * (8 * 16 + 16 * 32 + 8 * 32))
    assert works['convolution'] == (1, 2 * 4 * 36 * 9, 4 * (2 * 4 * 36 + 36))
    # Gradients of the input and of the weight; that of the output is one number, seen everywhere.
    assert works['convolution_backward'] == (
        1, 2 * 2 * 4 * 36 * 9, 4 * (1 + 4 * 36 + 36 + 4 * 36 + 36))
    assert works['native_layer_norm'][1:] == (0, 4 * (2 * 8 * 16 + 16 + 2 * 8))
    assert 't' not in works


def test_rooflines():
    a = torch.randn(64, 64)
    rates = Rates(gmacs_per_s=1e-3, gb_per_s=1e3)  # 1 million products a second
    rows, total = roofline.rooflines(lambda: (a @ a).relu(), rates, CPU, most=1, others=dict(
        rest=roofline.Work(lambda: lambda: sum(range(10 ** 6)), 10, 4000)))
    assert [row['name'] for row in rows] == ['rest']
    assert total > rows[0]['ms'] > 0
    [product], _ = roofline.rooflines(lambda: a @ a, rates, CPU)
    assert (product['name'], product['calls'], product['bound']) == ('mm', 1, 'compute')
    assert product['limit_ms'] == pytest.approx(64 ** 3 / 1e6 * 1e3)
