"""tools/benchmark.py and what it stands on. No time is asserted, only what is timed and how."""
import csv
import re
import runpy
from functools import partial

import pytest
import torch
from mmengine.config import Config
from mmseg.registry import MODELS
from PIL import Image
from torch import nn

from mmseg_edaformer.analysis import benchmark, benchmark_report as report, timing
from mmseg_edaformer.analysis.loading import NONE, set_ratio
from mmseg_edaformer.analysis.pipeline import measure_pipeline
from mmseg_edaformer.analysis.timing import (
    count_activations,
    environment,
    milliseconds,
    peak_bytes,
    relative,
    take_turns,
)
from mmseg_edaformer.cost import count_macs, windows
from mmseg_edaformer.errors import ConfigError, RatioError
from mmseg_edaformer.isr import ISRRatio, apply_isr
from tests import plain
from tests.conftest import MINI, ROOT, run
from tests.processes import run_tool

CPU = torch.device('cpu')
MODELS_OF = dict(
    mini=f'''_base_ = ['{ROOT}/configs/edaformer_t_synthetic.py']
model = dict(backbone={MINI}, decode_head=dict(in_channels=(32, 64, 128), channels=32))
''',
    resnet=f'''_base_ = ['{ROOT}/configs/segformer_b0_camvid.py']
model = dict(backbone=dict(_delete_=True, type='ResNet', depth=18, base_channels=8,
                           stem_channels=8),
             decode_head=dict(in_channels=[8, 16, 32, 64], channels=16))
''')
SLIDE = "model['test_cfg'] = dict(mode='slide', crop_size=(64, 64), stride=(48, 48))\n"


@pytest.fixture(scope='module')
def configs(tmp_path_factory):
    """Small configs: ours, one without attention, ours with a sliding window."""
    folder = tmp_path_factory.mktemp('configs')
    for name, text in dict(MODELS_OF, slide=MODELS_OF['mini'] + SLIDE).items():
        (folder / f'{name}.py').write_text(text)
    return folder


def load(configs, *names, **kwargs):
    first, *others = (str(configs / f'{name}.py') for name in names)
    return benchmark.load_contenders(first, compare=others, **kwargs)


def measure(contenders, **plan):
    plan = dict(dict(sizes=[(64, 64)], repeats=1), **plan)
    return list(benchmark.run(contenders, benchmark.Plan(**plan)))


def test_the_tool_writes_tables_and_a_chart(configs, tmp_path):
    out = tmp_path / 'out'
    told = run(  # a fork would wait for ever for the threads of its parent's OpenCV
        'tools/benchmark.py', configs / 'mini.py', '--compare', configs / 'resnet.py',
        '--isr-ratio', 'none', 'optimal', '--size', '64', '64,96', '--mode', 'eval', 'train',
        '--device', 'cpu', '--threads', '1', '--repeats', '1', '--out', out).stdout
    assert 'resnet holds no attention that ISR can reduce' in told
    rows = list(csv.DictReader((out / 'benchmark.csv').open()))
    for mode, variants in (('eval', [('mini', 'none'), ('mini', '2211-222'), ('resnet', 'none')]),
                           ('train', [('mini', 'none'), ('resnet', 'none')])):
        assert [(row['config'], row['isr_ratio'])
                for row in rows if row['mode'] == mode] == 2 * variants
    for row in rows:
        assert (row['status'], row['threads'], row['freed_memory']) == ('ok', '1', 'kept')
        assert row['torch'] == torch.__version__
        for name in ('pipeline_ms', 'total_ms', 'images_per_s', 'peak_mib', 'gmacs'):
            assert float(row[name]) > 0, name
        if row['mode'] == 'eval':
            assert float(row['post_ms']) == pytest.approx(
                float(row['total_ms']) - float(row['network_ms']), rel=0.01, abs=0.01)
    page = (out / 'benchmark.md').read_text()
    assert '## eval, float32, 64x96, batch 1' in page
    assert re.search(r'\| mini +\| 2211-222 +\| .* \| \d\.\d\dx as (fast|slow) \|', page)
    assert page.count('\n## ') == told.count(', batch 1\n') == 4
    with Image.open(out / 'benchmark.png') as image:
        assert min(image.size) > 300


def test_the_tool_times_training_pipelines(configs, monkeypatch, capsys):
    monkeypatch.setattr('sys.argv', [
        'benchmark.py', str(configs / 'mini.py'), '--compare', str(configs / 'resnet.py'),
        '--mode', 'data', '--size', '64,96', '--repeats', '2'])
    tool = runpy.run_path(str(ROOT / 'tools' / 'benchmark.py'))
    tool['_time_pipelines'](tool['parse_args']())
    told = capsys.readouterr().out
    for name in ('LoadSegLabels', 'RandomSegCrop', 'collate'):
        assert len(re.findall(rf'\| {name} +\| +\d+\.\d+ \| +\d+% \|', told)) == 2
    assert told.count('cores for every 1,000 images/s') == 2
    with pytest.raises(ConfigError, match=r'no train_dataloader\.dataset\.pipeline that loads'):
        measure_pipeline(Config(dict(model=None)))


@pytest.mark.parametrize(('arguments', 'told'), [
    (['--threads', '0'], '--threads must be 1 or more'),
    (['--mode', 'data', '--out', 'x'], '--mode data only prints its table'),
    (['--compare', 'gone'], 'config not found: gone'),
    (['--size', '64', '8,64', '--device', 'cpu'], '--size 8,64: use 32 pixels or more'),
    (['--batch-size', '0', '--device', 'cpu'], '--batch-size and --repeats must be 1 or more'),
])
def test_mistakes_on_the_command_line(arguments, told):
    code, output = run_tool('tools/benchmark.py', 'edaformer_t_ade', *arguments)
    assert code in (1, 2)
    assert told in output


def test_what_cannot_be_measured(configs, monkeypatch):
    with pytest.raises(RatioError, match='holds no attention'):
        load(configs, 'resnet', isr_ratios=['2'])
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(ConfigError, match='no GPU is visible'):
        benchmark.Plan(device='cuda')


def test_costs_alone_are_those_of_cost_py(configs):
    """All windows of a config that slides are counted; mmseg makes as many, of that size."""
    ratios = ['none', 'optimal']
    contenders = load(configs, 'slide', 'slide', isr_ratios=ratios)
    [small, large] = measure(contenders, sizes=[(64, 64), (64, 160)], device='meta')
    model = MODELS.build(Config.fromfile(configs / 'slide.py').model).eval()
    params = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert [row.config for row in small] == ['slide', 'slide', 'slide #2', 'slide #2']
    for row, wide, ratio in zip(small, large, ratios):
        apply_isr(model, ratio)
        assert row.gmacs == count_macs(model, (64, 64)) / 1e9
        assert wide.gmacs == pytest.approx(3 * row.gmacs)
        assert row.params_m == params
        assert row.total_ms is None
    assert small[1].gmacs < small[0].gmacs
    assert 'x 1.00' in report.table(small)
    page = report.markdown([small, large], environment('meta'))
    assert 'slides its window: 3 windows on 64x160' in page
    seen = []
    model.backbone.register_forward_pre_hook(lambda _, args: seen.extend(args[0].split(1)))
    for size in ((64, 64), (64, 160), (150, 64), (40, 200)):
        with torch.no_grad():
            model(torch.randn(1, 3, *size), benchmark.data_samples(size, 1), mode='predict')
        assert windows(model, size) == [tuple(window.shape[2:]) for window in seen]
        seen.clear()


def test_calls_take_turns():
    log = []

    def prepare(name):
        log.append(f'ready {name}')
        return lambda: log.append(name)

    times = take_turns({name: lambda name=name: prepare(name) for name in 'ab'}, CPU,
                       repeats=3, warm_up=1)
    assert log == 4 * ['ready a', 'a', 'ready b', 'b']
    assert {name: len(seconds) for name, seconds in times.items()} == dict(a=3, b=3)
    assert milliseconds([0.1, 0.2, 0.3], 0.25) == pytest.approx(150)
    assert relative([1., 4., 9.], [1., 2., 3.]) == 2  # round by round, not of the medians

    def broken():
        raise RuntimeError('shapes differ')
    with pytest.raises(RuntimeError, match='shapes differ'):
        take_turns(dict(a=lambda: broken), CPU)
    for repeats, seconds, rounds in ((50, 0., 5), (3, 0., 3), (8, 60., 8)):
        assert len(take_turns(dict(a=lambda: lambda: None), CPU, repeats=repeats,
                              seconds=seconds)['a']) == rounds


def test_ratios_are_set_for_every_call(configs, monkeypatch):
    contenders = load(configs, 'mini', isr_ratios=['none', '3'])
    backbone = type(contenders[0].model.backbone)
    seen, forward = [], backbone.forward

    def spy(backbone, x):
        if x.device.type != 'meta':  # costs are counted there
            seen.append(backbone.stages[0].blocks[0].attn.isr_ratio)
        return forward(backbone, x)

    monkeypatch.setattr(backbone, 'forward', spy)
    measure(contenders)
    assert seen == [*3 * [1, 1, 3, 3], 1, 3]  # the last two measure memory


def test_out_of_memory_is_one_cell_only(configs, monkeypatch):
    contenders = load(configs, 'mini', 'resnet')
    predict = type(contenders[0].model).predict

    def fail(model, inputs, data_samples=None):
        if len(inputs) == 2 and type(model.backbone).__name__ == 'EFT':
            raise torch.cuda.OutOfMemoryError('CUDA out of memory')
        return predict(model, inputs, data_samples)

    monkeypatch.setattr(type(contenders[0].model), 'predict', fail)
    one, two = measure(contenders, batch_sizes=[1, 2])
    assert [row.status for row in one] == ['ok', 'ok']
    assert [row.status for row in two] == ['OOM', 'ok']
    assert two[0].total_ms is None
    assert two[0].network_ms > 0
    assert two[1].time_vs_first is None
    assert 'OOM' in report.table(two)
    assert report.draw([one, two], environment('cpu')).startswith(b'\x89PNG')


def test_bfloat16_and_limits(configs, monkeypatch):
    monkeypatch.setattr(timing, 'measure_rates', partial(timing.measure_rates, side=128))
    [contender] = load(configs, 'mini')
    before = {name: value.clone() for name, value in contender.model.state_dict().items()}
    [row], [trained] = measure([contender], dtypes=['bfloat16'], modes=['eval', 'train'],
                               limits=True)
    assert row.dtype == trained.dtype == 'bfloat16'
    assert row.total_share == pytest.approx(row.compute_limit_ms / row.total_ms)
    assert trained.compute_limit_ms == pytest.approx(3 * row.compute_limit_ms)
    assert row.memory_limit_ms > 0
    assert 'multiply-adds' in report.table([row])
    assert all(torch.equal(value, before[name])
               for name, value in contender.model.state_dict().items())


def test_training_steps_change_the_weights(configs):
    [contender] = load(configs, 'mini')
    subject = benchmark.Subject(contender, 'train', 'float32', CPU)
    subject.calls(NONE, torch.randn(2, 3, 64, 64))['total']()()
    assert any(not torch.equal(own, trained) for own, trained in zip(
        contender.model.parameters(), subject.model.parameters()))


def test_peak_of_live_tensors():
    weight, x = torch.ones(1000), torch.ones(1000)

    def call():
        y = x * weight      # 4000 bytes
        z = (y + 1).relu_()  # 4000 more, then in place
        del y
        return (z.view(10, 100) * 2).sum()  # 4000 more in place of y, then 4

    assert peak_bytes(call, [weight, weight, x], CPU) == 8000 + 8004


def test_activations_of_the_innermost_modules():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Identity(), nn.ReLU(inplace=True),
                          nn.Sequential(nn.Conv2d(4, 2, 2, 2), nn.ReLU()))
    assert count_activations(model, (8, 8)) == 4 * 64 + 2 * 16 + 2 * 16


@torch.no_grad()
def test_the_plain_segmentor_is_the_plain_network():
    cfg = Config.fromfile(ROOT / 'tests' / 'configs' / 'plain_t_cityscapes.py')
    model = MODELS.build(cfg.model).eval()
    oracle = plain.build('tiny', 19).eval()
    oracle.load_state_dict(model.state_dict())
    image = torch.randn(1, 3, 64, 64)
    for ratio, levels in ((NONE, [(1,) * 4, (1,) * 3]),
                          (ISRRatio.parse('optimal'), [(2, 2, 1, 1), (2, 2, 2)])):
        set_ratio(model, ratio)
        oracle.set_isr(*levels)
        assert torch.equal(model(image), oracle(image))
    [sample] = model(image, benchmark.data_samples((64, 64), 1), mode='predict')
    assert sample.pred_sem_seg.data.shape == (1, 64, 64)


@pytest.mark.parametrize('size', 'tb')
def test_the_plain_configs_say_what_ours_say(size):
    own, ours = (Config.fromfile(ROOT / path) for path in (
        f'tests/configs/plain_{size}_ade.py', f'configs/edaformer_{size}_ade.py'))
    assert own.optim_wrapper == ours.optim_wrapper
    assert own.test_dataloader == ours.test_dataloader
    counts = {sum(parameter.numel() for parameter in MODELS.build(cfg.model).parameters())
              for cfg in (own, ours)}
    assert len(counts) == 1
