"""Files for other runtimes predict what PyTorch predicts; others are not written."""
import dataclasses
import importlib.util
import itertools
import json
import re
import resource
import signal
import warnings
from argparse import Namespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmseg.registry import MODELS
from PIL import Image

from mmseg_edaformer import export as package
from mmseg_edaformer.engine.single_file import pack_file
from mmseg_edaformer.errors import ConfigError, RatioError, UserError
from mmseg_edaformer.export import FORMATS, Exported, export, parity, runtimes
from mmseg_edaformer.export.graph import Deployed
from mmseg_edaformer.export.runtimes import placing
from mmseg_edaformer.isr import ISRRatio, isr
from mmseg_edaformer.models import StreamedEncoderDecoder
from mmseg_edaformer.predict.segmenter import Segmenter
from tests.conftest import ROOT, run, seeing_model, write_config
from tests.processes import done, finish, in_child, run_tool

NEEDS = {'onnx': ('onnxscript', 'onnxruntime'), 'openvino': ('onnxscript', 'openvino'), 'pt2': ()}
RATIO = '2211-222'


@pytest.fixture(scope='module')
def work(scenes, tmp_path_factory):
    """A work dir: a config, and weights that predict several classes."""
    folder = tmp_path_factory.mktemp('work')
    config = write_config(folder, scenes)
    # Tracing takes a second for each block.
    config.write_text(config.read_text() + """
model['backbone']['depths'] = (1, 1, 1, 1)
""")
    model = seeing_model(config, scenes, init=True)
    torch.save(dict(state_dict=model.state_dict(), meta=dict()), folder / 'best_mIoU_iter_4.pth')
    return folder


@pytest.fixture(scope='module')
def quick_export(work):
    """`export` of the work dir that traces each graph once, because that takes seconds."""
    trace, traces = package.trace, {}

    def call(out, kind='pt2', isr_ratio='none', labels=True, size=(64, 96), **options):
        def trace_once(deployed, size):
            if deployed.dials:  # whose graph torch.onnx can decompose once
                return trace(deployed, size)
            key = 'none' if 'runtime' in isr_ratio else isr_ratio, labels, size
            if key not in traces:
                traces[key] = trace(deployed, size)
            return traces[key]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(package, 'trace', trace_once)
            patch.setattr(package, '_TWINS', min(1, package._TWINS))
            return export(work, out, format=kind, isr_ratio=isr_ratio, labels=labels, size=size,
                          **options)
    return call


@pytest.fixture(scope='module')
def files(quick_export, tmp_path_factory):
    """Loaded files and their reports, each made once: by format, ratio, and labels or not."""
    folder, made = tmp_path_factory.mktemp('files'), {}

    def get(kind, ratio, labels):
        for name in NEEDS[kind]:
            pytest.importorskip(name)
        if (kind, ratio, labels) not in made:
            path = folder / f'{ratio}-{labels}{FORMATS[kind].suffix}'
            report = quick_export(path, kind, ratio, labels, None)
            made[kind, ratio, labels] = Exported(path), report
        return made[kind, ratio, labels]
    return get


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch):
    take_turns = package.take_turns
    monkeypatch.setattr(package, 'take_turns', lambda calls, device, **_: take_turns(
        calls, device, repeats=5))


@pytest.fixture
def untraced(monkeypatch):
    """Fail where a trace begins: the checks come before it."""
    monkeypatch.setattr(package, 'trace', None)


def draw(scenes, size, count):
    """Drawn images, N x H x W x 3, RGB."""
    paths = sorted((scenes / 'images' / 'training').iterdir())[:count]
    return np.stack([np.array(Image.open(path).resize(size[::-1])) for path in paths])


def predict(segmenter, images):
    """The segmenter's labels of images, which see several classes."""
    labels = np.stack([segmenter(image[..., ::-1].copy()).labels for image in images])
    assert len(np.unique(labels)) > 2
    return labels


@pytest.mark.parametrize(('kind', 'ratio', 'labels'), [
    pytest.param(kind, ratio, labels, marks=[pytest.mark.slow] * (kind != 'pt2'))
    for kind, ratio, labels in (
        ('pt2', 'none', True), ('pt2', RATIO, False), ('pt2', '2+q2', False),
        ('onnx', 'none', True), ('onnx', RATIO, False), ('onnx', '2+q2', False),
        ('openvino', RATIO, False))])
def test_a_file_predicts_as_the_model_at_any_size_and_number(work, scenes, files, kind, ratio,
                                                             labels):
    file, report = files(kind, ratio, labels)
    segmenter = Segmenter(work, device='cpu', isr_ratio=ratio)
    mean, std = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
    for size, count in (((128, 160), 1), ((187, 129), 2)):
        images = draw(scenes, size, count)
        output, wanted = file(images), predict(segmenter, images)
        if labels:
            assert (output.dtype, output.shape) == (np.uint8, (count, *size))
        else:
            normalised = torch.tensor(((images - mean) / std).transpose(0, 3, 1, 2)).float()
            with torch.no_grad():
                logits = segmenter.model.decode_head(segmenter.model.backbone(normalised)).numpy()
            assert np.abs(logits).max() > 1
            np.testing.assert_allclose(output, logits, atol=2e-4)
            output = torch.nn.functional.interpolate(
                torch.tensor(output), size, mode='bilinear').argmax(1).numpy()
        assert (output == wanted).mean() > 0.9995
    near = report.rows[-1].parity
    assert near.equal > 0.9995
    assert near.relative < 1e-3
    assert len({shape[0] for shape in near.inputs}) == len({shape[1] for shape in near.inputs}) == 2
    assert report.rows[0].relative == 1
    assert f'ISR {ratio}' in str(report)
    assert ('Smaller images were enlarged.' in report.notes) == (ratio != 'none')


OPEN_RATIOS = 'none', RATIO, '2', '4', '3521-432'


@pytest.mark.parametrize('kind', [
    'pt2', *(pytest.param(kind, marks=pytest.mark.slow) for kind in ('onnx', 'openvino'))])
def test_a_file_takes_its_ratio_as_an_input(work, scenes, files, kind):
    file, report = files(kind, 'runtime', False)
    deployed = Deployed(Segmenter(work, device='cpu').model, labels=False)
    outputs = {}
    # First where cells shrink to one key, for which some runtimes prepare code.
    for size, count in ((40, 33), 1), ((128, 160), 2), ((187, 129), 1):
        images = draw(scenes, size, count)
        for ratio in OPEN_RATIOS:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter('ignore')  # that cells shrink
                with isr(deployed.model, ratio):
                    wanted = deployed(torch.from_numpy(images)).numpy()
            outputs[size, ratio] = file(images, isr_ratio=ratio)
            np.testing.assert_allclose(outputs[size, ratio], wanted, atol=1e-4 * wanted.max())
        assert (file(images) == outputs[size, 'none']).all()
    assert all(np.abs(outputs[(187, 129), one] - outputs[(187, 129), other]).max() > 1e-2
               for one, other in itertools.combinations(OPEN_RATIOS, 2))
    metadata = file.metadata
    assert (metadata['isr_ratio'], metadata['dials']) == ('runtime', ['isr_ratio'])
    assert metadata['isr_stages'] == [*(f'encoder {i}' for i in range(1, 5)),
                                      *(f'decoder {i}' for i in range(2, 5))]
    assert metadata['minimum'] == [33, 33]
    rows = [row for row in report.rows if row.name.startswith(kind)]
    assert [row.name for row in rows] == [f'{kind}, {ratio}' for ratio in (
        'none', RATIO, '2', '4', '3523-352')]
    assert rows[0].to_fixed is not None
    assert 'to fixed' in str(report)
    for ratios, message in (
            (dict(isr_ratio='auto'), 'a file cannot follow the size'),
            (dict(isr_ratio='22-222'), '2 multipliers for the encoder, which has 4 stages'),
            (dict(isr_ratio='2+q2'), 'query_ratio 2 cannot be set.*--query-ratio runtime'),
            (dict(query_ratio=1), 'query_ratio none cannot be set')):
        with pytest.raises(UserError, match=message):
            file(images, **ratios)


@pytest.mark.parametrize('kind', [
    'pt2', *(pytest.param(kind, marks=pytest.mark.slow) for kind in ('onnx', 'openvino'))])
def test_an_input_that_is_no_ratio(files, scenes, kind):
    """The runtime without `Exported`: below 1 is 1, and another length or type is an error."""
    report = files(kind, 'runtime', False)[1]
    run, images = FORMATS[kind].load(report.path, 1)[0], draw(scenes, (64, 96), 1)
    if kind == 'openvino':
        assert run(images).size == 0
        run(images, isr_ratio=np.full(8, 2))  # takes the first seven
    for wrong in {}, 6, 8, 1, (1, 7):
        if kind != 'openvino' or wrong not in ({}, 8):
            with pytest.raises(Exception, match=r'(?i)isr_ratio|shape|input|dimension'):
                run(images, **({} if wrong == {} else dict(isr_ratio=np.full(wrong, 2))))
    trained = run(images, isr_ratio=np.ones(7, np.int64))
    for ratio in np.zeros(7, np.int64), np.array([1, -3, 0, 1, -2 ** 31 + 1, 1, 1]):
        assert (run(images, isr_ratio=ratio) == trained).all()
    one_cell, more = (run(images, isr_ratio=np.full(7, value)) for value in (100, 10 ** 6 + 1))
    assert (one_cell == more).all()
    assert np.abs(one_cell - trained).max() > 1e-2


def test_queries_as_an_input_too(work, scenes, files):
    file, report = files('pt2', 'runtime+qruntime', True)
    segmenter = Segmenter(work, device='cpu')
    assert file.metadata['dials'] == ['isr_ratio', 'query_ratio']
    assert f'pt2, {RATIO}+q2' in {row.name for row in report.rows}
    images = draw(scenes, (187, 129), 2)
    for ratio in 'none', f'{RATIO}+q2', '1+q3', '2+q3212-321':
        segmenter.isr_ratio = ratio
        assert (file(images, isr_ratio=ratio) == predict(segmenter, images)).mean() > 0.9995


def test_an_input_and_another_method(work):
    model = Segmenter(work, device='cpu').model
    deployed, images = Deployed(model, True, ('isr_ratio',)), torch.zeros(1, 64, 96, 3).byte()
    with isr(model, 2, method='max'), pytest.raises(
            RatioError, match=r'isr_method max .*: give one in place of runtime, or .* average'):
        deployed(images, torch.full((7,), 2))
    assert deployed(images, torch.full((7,), 2)).shape == (1, 64, 96)


def test_a_ratio_that_cannot_be_fixed_is_noted(quick_export, tmp_path, monkeypatch):
    def write(program, path, metadata):
        if path.name == 'fixed.pt2':
            raise RuntimeError('no such operator')
        FORMATS['pt2'].write(program, path, metadata)

    trial_ratios = package.trial_ratios
    monkeypatch.setattr(package, 'trial_ratios', lambda *args: trial_ratios(*args)[:1])
    monkeypatch.setattr(package, 'FORMATS', {
        **FORMATS, 'pt2': dataclasses.replace(FORMATS['pt2'], write=write)})
    report = quick_export(tmp_path / 'model.pt2', 'pt2', 'runtime', False, None)
    assert 'No time with this ratio fixed (none): no such operator' in str(report)
    assert [row.name for row in report.rows] == ['PyTorch, none', 'pt2, none']


@pytest.mark.gpu
@pytest.mark.slow
def test_a_file_moves_to_the_device(work, scenes, files, request):
    from torch.export.passes import move_to_device_pass
    program = torch.export.load(files('pt2', 'none', True)[1].path)
    device = request.getfixturevalue('device')  # what is exported before knows nothing of a fake
    program = move_to_device_pass(program, str(device)).module(check_guards=False)
    images, segmenter = draw(scenes, (131, 157), 3), Segmenter(work, device=str(device))
    with torch.no_grad():
        labels = program(torch.from_numpy(images).to(device))
    assert labels.device.type == device.type
    assert (labels.cpu().numpy() == predict(segmenter, images)).mean() > 0.9995


def test_the_metadata_and_what_a_file_refuses(work, files, scenes, tmp_path):
    file = files('pt2', RATIO, False)[0]
    metadata = file.metadata
    assert metadata['classes'] == list(Segmenter(work, device='cpu').classes)
    assert len(metadata['palette']) == 8
    assert (metadata['isr_ratio'], metadata['output'], metadata['int8']) == (RATIO, 'logits', False)
    assert metadata['checkpoint'] == 'best_mIoU_iter_4.pth'
    assert re.fullmatch('[0-9a-f]{64}', metadata['sha256'])
    assert metadata['std'] == pytest.approx([58.395, 57.12, 57.375])
    assert (metadata['size'], metadata['minimum']) == (None, [125, 125])
    with pytest.raises(ConfigError, match=r'100x160 pixels, the file is for 125x125 and more'):
        file(draw(scenes, (100, 160), 1))
    with pytest.raises(ConfigError, match='isr_ratio 2 cannot be set, because the file keeps ISR '
                       f'{RATIO}: export it with --isr-ratio runtime'):
        file(draw(scenes, (128, 160), 1), isr_ratio=2)
    with pytest.raises(ConfigError, match=r'float32 of .* are not images'):
        file(np.zeros((1, 128, 128, 3), np.float32))
    with pytest.raises(ConfigError, match=r'is not a file that ends in \.onnx, \.xml, \.pt2'):
        Exported(tmp_path / 'none.onnx')


@pytest.mark.parametrize('kind', [
    'pt2', *(pytest.param(kind, marks=pytest.mark.slow) for kind in ('onnx', 'openvino'))])
def test_a_file_alone_refuses_smaller_images(files, scenes, kind):
    """The runtime without `Exported`, as the page of the documentation shows it."""
    run = FORMATS[kind].load(files(kind, RATIO, False)[1].path, 1)[0]
    for size in (124, 160), (160, 124):
        with pytest.raises(Exception, match='125'):  # each runtime has its own
            run(draw(scenes, size, 1))
    assert run(draw(scenes, (125, 125), 1)).shape[0] == 1


def test_useless_times_are_named(files):
    report = files('pt2', RATIO, False)[1]
    assert report.rows[1].spread[0] <= report.rows[1].relative <= report.rows[1].spread[1]
    for spread, steady in ((0.9, 1.1), True), ((0.01, 0.02), False):
        rows = report.rows[0], dataclasses.replace(report.rows[1], relative=0.95, spread=spread)
        text = str(dataclasses.replace(report, rows=rows))
        assert f'x 0.95 ({spread[0]} to {spread[1]})' in text
        assert ('The times of pt2 are useless, ' in text) != steady


@pytest.mark.slow
def test_the_examples_of_the_page_run(files, scenes, tmp_path, monkeypatch):
    """Each by its runtime alone, on the same image, with the same labels."""
    blocks = re.findall(r'```python\n(.*?)```', (ROOT / 'docs' / 'export.md').read_text(), re.S)
    Image.fromarray(draw(scenes, (131, 157), 1)[0]).save(tmp_path / 'photo.png')
    monkeypatch.chdir(tmp_path)
    results = []
    for kind, needs in NEEDS.items():
        block = next(block for block in blocks if f'model{FORMATS[kind].suffix}' in block)
        assert not re.search('(import|from) mmseg_edaformer', block)
        if all(importlib.util.find_spec(name) for name in needs):
            (file, report), names = files(kind, 'none', True), {}
            exec(block.replace('model' + FORMATS[kind].suffix, str(report.path)), names)
            assert names['labels'].shape == (131, 157)
            assert names['classes'] == file.metadata['classes']
            results.append(names['labels'])
    assert all((labels == results[0]).mean() > 0.9995 for labels in results)


@pytest.mark.slow
def test_the_example_of_ratios_runs(files, scenes, tmp_path, monkeypatch, capsys):
    text = (ROOT / 'docs' / 'export.md').read_text()
    block = re.search(r'```python\n([^`]*dial\.onnx.*?)```', text, re.S)[1]
    Image.fromarray(draw(scenes, (131, 157), 1)[0]).save(tmp_path / 'photo.png')
    monkeypatch.chdir(tmp_path)
    exec(block.replace('dial.onnx', str(files('onnx', 'runtime', False)[1].path)), {})
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ['1', '2', '4']


def test_one_size_and_the_ratio_that_follows_it(quick_export, scenes, tmp_path):
    path = tmp_path / 'new' / 'model.pt2'
    report = quick_export(path, isr_ratio='auto', size=(131, 157), images=scenes / 'images')
    file = Exported(path)
    assert file.metadata['size'] == [131, 157]
    assert file(draw(scenes, (131, 157), 3)).shape[0] == 3
    assert {shape[1:] for shape in report.rows[1].parity.inputs} == {(131, 157)}
    with pytest.raises(ConfigError, match='96x96 pixels, the file is for 131x157: resize'):
        file(draw(scenes, (96, 96), 1))


@pytest.mark.slow
@pytest.mark.parametrize('ratio', ['21+q2', 'runtime'])
def test_another_model_and_padding(scenes, tmp_path, monkeypatch, ratio):
    """SegFormer, trained on BGR and with padded images; ISR meets its attention from outside."""
    config = tmp_path / 'segformer.py'
    config.write_text(f'''
_base_ = ['{ROOT}/configs/segformer_b0_synthetic.py']
model = dict(backbone=dict(embed_dims=8, num_stages=2, num_layers=(1, 1), num_heads=(1, 2),
                           strides=(4, 2), patch_sizes=(7, 3), sr_ratios=(8, 4),
                           out_indices=(0, 1)),
             decode_head=dict(in_channels=[8, 16], in_index=[0, 1], channels=16),
             data_preprocessor=dict(bgr_to_rgb=False, test_cfg=dict(size_divisor=32)))
test_dataloader = dict(dataset=dict(data_root='{scenes}'))
''')
    torch.manual_seed(0)
    model = MODELS.build(Config.fromfile(config).model)
    model.init_weights()
    torch.nn.init.normal_(model.decode_head.conv_seg.weight)
    weights, path = tmp_path / 'weights.pth', tmp_path / 'model.pt2'
    torch.save(dict(state_dict=model.state_dict(), meta=dict()), weights)
    with pytest.raises(ConfigError, match=r'padded to a multiple of 32: export labels.*--labels'):
        export(config, path, format='pt2', checkpoint=weights)
    monkeypatch.setattr(package, '_TWINS', 0)
    export(config, path, format='pt2', checkpoint=weights, isr_ratio=ratio, labels=True)
    file, segmenter = Exported(path), Segmenter(config, weights, device='cpu')
    for size, count in (((128, 256), 2), ((187, 129), 1)):
        images = draw(scenes, size, count)
        for setting in ('21-1', '35-1', '8', 'none') if ratio == 'runtime' else (ratio,):
            segmenter.isr_ratio = setting
            labels = file(images, **dict(isr_ratio=setting) if ratio == 'runtime' else {})
            assert (labels == predict(segmenter, images)).mean() > 0.9995


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['onnx', 'openvino'])
def test_int8_is_near_and_says_what_it_costs(work, scenes, tmp_path, kind, quick_export):
    for name in (*NEEDS[kind], *(['nncf'] if kind == 'openvino' else ())):
        pytest.importorskip(name)
    path = tmp_path / f'model{FORMATS[kind].suffix}'
    report = quick_export(path, kind, int8=True, calibrate=scenes / 'images' / 'training')
    assert Exported(path).metadata['int8']
    assert [row.name for row in report.rows] == ['PyTorch', f'{kind} float32', f'{kind} int8']
    assert report.rows[1].parity.equal > 0.9995
    assert 0.9 < report.rows[2].parity.equal < 1
    assert report.rows[1].miou == pytest.approx(report.rows[0].miou, abs=0.05)
    assert 'mIoU of 4 labelled images' in str(report)
    assert {file.stem for file in tmp_path.iterdir()} == {'model'}
    deployed = Deployed(Segmenter(work, device='cpu').model, labels=True)
    with pytest.raises(ConfigError, match=r'in int8 it gives 9.* Calibrate on more images'):
        parity.check(path, path, deployed, [draw(scenes, (64, 96), 4)[i:i + 1] for i in range(4)],
                     ISRRatio.parse('none'), int8=True, least=1., load=Exported)
    if kind == 'onnx':  # mmseg's own evaluation of the same images
        done('tools/test.py', work / 'mini.py', work / 'best_mIoU_iter_4.pth', '--work-dir',
             tmp_path, '--json', tmp_path / 'json')
        assert report.rows[0].miou == pytest.approx(
            json.loads((tmp_path / 'json').read_text())['metrics']['mIoU'], abs=0.01)


@pytest.mark.slow
def test_int8_at_each_ratio(scenes, tmp_path, quick_export, monkeypatch):
    for name in NEEDS['onnx']:
        pytest.importorskip(name)
    trial_ratios = package.trial_ratios
    monkeypatch.setattr(package, '_TWINS', 0)
    monkeypatch.setattr(package, 'trial_ratios', lambda *args: trial_ratios(*args)[:2])
    path = tmp_path / 'model.onnx'
    report = quick_export(path, 'onnx', 'runtime', int8=True,
                          calibrate=scenes / 'images' / 'training')
    assert [row.name for row in report.rows] == [
        f'{name}, {ratio}' for ratio in ('none', RATIO)
        for name in ('PyTorch', 'onnx float32', 'onnx int8')]
    for own, plain, int8 in report.rows[:3], report.rows[3:]:
        assert plain.parity.equal > 0.9995
        assert 0.5 < int8.parity.equal < 1
        assert (f'{100 * int8.parity.equal:.2f} % of PyTorch' in str(report)) == (
            int8.parity.equal < 0.9)
        assert plain.miou == pytest.approx(own.miou, abs=0.05)
        assert re.search(rf'{re.escape(int8.name)} .*{int8.miou:.2f} \|\n', str(report))
    file, images = Exported(path), draw(scenes, (64, 96), 1)
    assert (file(images) != file(images, isr_ratio=RATIO)).any()


def test_the_telemetry_of_the_runtimes_is_disabled():
    for name in ('openvino', 'nncf'):
        pytest.importorskip(name)
    assert run('-c', """
from mmseg_edaformer.export import runtimes
runtimes._openvino()
from openvino.tools.ovc import telemetry_utils
from nncf.telemetry.wrapper import NNCFTelemetry, telemetry
print(telemetry_utils.tm.__name__, isinstance(telemetry, NNCFTelemetry))
""").stdout.split() == ['openvino.tools.ovc.telemetry_stub', 'False']


def spoil(program, path, metadata):
    [name] = (name for name in program.state_dict if name.endswith('conv_seg.bias'))
    bias = program.state_dict[name]
    program.state_dict[name] = torch.nn.Parameter(bias + torch.tensor([3., *[0] * 7]))
    FORMATS['pt2'].write(program, path, metadata)
    program.state_dict[name] = bias


def truncate(program, path, metadata):
    FORMATS['pt2'].write(program, path, metadata)
    path.write_bytes(path.read_bytes()[:10000])


@pytest.mark.parametrize(('write', 'message'), [
    (spoil, r"it gives \d.* of PyTorch's labels"), (truncate, 'its runtime cannot run it')])
def test_a_file_that_predicts_otherwise_is_not_written(quick_export, tmp_path, monkeypatch, write,
                                                       message):
    path = tmp_path / 'model.pt2'
    path.write_bytes(b'the old one')
    monkeypatch.setattr(package, 'FORMATS', {
        **FORMATS, 'pt2': dataclasses.replace(FORMATS['pt2'], write=write)})
    with pytest.raises(ConfigError, match=f'is not written: {message}'):
        quick_export(path)
    assert [*tmp_path.iterdir()] == [path]
    assert path.read_bytes() == b'the old one'


@pytest.mark.parametrize(('change', 'equal'), [([0, 0], 1), ([0, 2.5], 0.5)])
def test_differences_are_measured(monkeypatch, change, equal):
    """Against a model of two classes whose logits are known, by a file that is known to differ."""
    logits = np.array([[[1, 2], [3, 4]], [[0, 0], [0, 0]]], np.float32)[None]
    monkeypatch.setattr(parity, 'reference', lambda *_: logits)
    result = parity.compare(
        lambda images: logits + np.array(change, np.float32)[None, :, None, None],
        Namespace(labels=False), [np.zeros((1, 2, 2, 3), np.uint8)])
    assert (result.equal, result.difference) == (equal, max(change))
    assert result.relative == pytest.approx(max(change) / 4)


def test_a_full_disk(quick_export, tmp_path):
    """Simulated by a limit on the size of files, in a process of its own."""
    pytest.importorskip('openvino')
    out = tmp_path / 'out'

    def write():
        openvino = runtimes._openvino()
        ops = openvino.opset13
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200000, 200000))
        with pytest.raises(OSError, match='File too large'):
            quick_export(out / 'model.pt2')
        large = ops.result(ops.constant(np.zeros(100000, np.float32)))
        with (pytest.raises(ConfigError, match=r'OpenVINO cannot write to .*free some space'),
              placing(out / 'model.xml') as partial):
            runtimes._save_openvino(openvino.Model([large], []), partial, '{}')

    assert finish(in_child(write, log=tmp_path / 'log')) == 0, (tmp_path / 'log').read_text()
    assert not list(out.iterdir())


def test_weights_never_stand_beside_the_graph_of_another(tmp_path):
    def write(text, fail=False):
        with placing(tmp_path / 'model.xml') as partial:
            partial.write_text(text)
            partial.with_suffix('.bin').write_text(text)
            if fail:
                raise KeyboardInterrupt

    def content():
        return {path.name: path.read_text() for path in tmp_path.iterdir()}

    write('old')
    with pytest.raises(KeyboardInterrupt):
        write('new', fail=True)
    assert content() == {'model.xml': 'old', 'model.bin': 'old'}
    write('new')
    assert content() == {'model.xml': 'new', 'model.bin': 'new'}


def test_a_test_set_that_cannot_be_read_is_noted(work, tmp_path):
    config = tmp_path / 'config.py'
    config.write_text((work / 'mini.py').read_text() + """
test_dataloader['dataset']['metainfo'] = dict(
    classes=('a', 'b'), palette=[[0, 0, 0], [1, 1, 1]])
""")
    images = parity.TestImages(Segmenter(work, device='cpu'), config, None, 4)
    assert images.dataset is None
    assert "config.py cannot be read: new classes ('a', 'b')" in images.notes[0]
    assert len(images.images) == 4


def test_a_missing_package_is_named(work, tmp_path, monkeypatch, untraced):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name, *rest: None if name in (
        'openvino', 'onnx', 'onnxscript') else find(name, *rest))
    with pytest.raises(ConfigError, match=r'onnx, onnxscript, openvino is missing .*\[export\]'):
        export(work, tmp_path / 'm.xml', format='openvino')


@pytest.mark.parametrize(('wrong', 'message'), [
    (dict(format='tflite'), "format 'tflite' does not exist: use onnx, openvino, pt2"),
    (dict(out='model.onnx'), 'a file of the format pt2 ends in .pt2'),
    (dict(out='file/model.pt2'), 'model.pt2 cannot be written to: .*give another --out'),
    (dict(int8=True, calibrate='.'), '--int8 does not work with --format pt2: use onnx or'),
    (dict(calibrate='.'), '--calibrate is for --int8: give both or none'),
    (dict(size=(16, 64)), r'--size 16,64: give height and width in pixels from 32 up'),
    (dict(threads=0), '--threads 0: give 1 or more'),
    (dict(format='onnx', out='model.onnx', int8=True), '--int8 needs --calibrate FOLDER'),
    (dict(format='openvino', out='model.xml', int8=True, calibrate='.', isr_ratio='runtime'),
     'openvino where a ratio is runtime, .*: use onnx'),
    (dict(isr_ratio='auto'), '--isr-ratio auto follows the size .* with --size H,W'),
    (dict(images='empty'), 'no image in the folder'),
])
def test_arguments_that_cannot_work(work, tmp_path, untraced, wrong, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'file').write_text('no folder')
    (tmp_path / 'empty').mkdir()
    with pytest.raises(UserError, match=message):
        export(work, **dict(dict(format='pt2', out='model.pt2'), **wrong))
    assert {path.name for path in tmp_path.iterdir()} == {'file', 'empty'}


@pytest.mark.parametrize(('more', 'message'), [
    ("model['test_cfg'] = dict(mode='slide', crop_size=(64, 96), stride=(64, 64))",
     'with a sliding window.*--size 64,96'),
    ("model['data_preprocessor']['test_cfg'] = dict(size=(64, 64))",
     'replace it by size_divisor')])
def test_models_that_cannot_work(work, tmp_path, untraced, more, message):
    config = tmp_path / 'config.py'
    config.write_text(f"{(work / 'mini.py').read_text()}\n{more}\n")
    with pytest.raises(ConfigError, match=message):
        export(config, tmp_path / 'model.pt2', format='pt2',
               checkpoint=work / 'best_mIoU_iter_4.pth')


def test_a_model_that_looks_at_values_cannot_be_traced(work, tmp_path, monkeypatch):
    extract = StreamedEncoderDecoder.extract_feat
    monkeypatch.setattr(StreamedEncoderDecoder, 'extract_feat', lambda self, images: extract(
        self, images * (2 if images.mean().item() > 0 else 1)))
    for size, message in ((None, 'give one size with --size H,W'),
                          ((64, 96), 'torch.export cannot trace this model')):
        with pytest.raises(ConfigError, match=message):
            export(work, tmp_path / 'model.pt2', format='pt2', size=size)


def test_the_command_line(work, tmp_path):
    single, out = tmp_path / 'model.safetensors', tmp_path / 'model.pt2'
    pack_file(work / 'best_mIoU_iter_4.pth', single, Config.fromfile(work / 'mini.py'))
    output = done('tools/export.py', '--model', single, '--format', 'pt2', '--out', out,
                  '--labels', '--size', '64,96', '--isr-ratio', '2', '--threads', '1')
    assert 'The compared images are drawn, so they tell little about real ones.' in output
    assert '8 classes, ISR 2, labels, images of 64x96, any number at once' in output
    assert 'Warning' not in output
    assert Exported(out).metadata['isr_ratio'] == '2'
    for wrong, expected, message in (
            (('--format', 'pt2', '--size', '64x96'), 2, "'64x96' is no image size"),
            (('--format', 'pt2', '--images', tmp_path / 'gone'), 1, 'gone does not exist')):
        code, output = run_tool('tools/export.py', '--model', work, '--out', out, *wrong)
        assert code == expected
        assert message in output
        assert 'Traceback' not in output
