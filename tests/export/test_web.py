"""The page that runs a model in the browser: its pixels, its folder, and what people do with it."""
import base64
import functools
import hashlib
import http.server
import io
import json
import os
import re
import shutil
import statistics
import subprocess
import tarfile
import threading
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from mmcv.image.geometric import rescale_size
from PIL import Image

from mmseg_edaformer.data.drawing import draw_scene
from mmseg_edaformer.errors import ConfigError
from mmseg_edaformer.export import FORMATS, web
from mmseg_edaformer.export.graph import Deployed, describe, multipliers, quiet, trace
from mmseg_edaformer.export.runtimes import KEY
from mmseg_edaformer.export.web import export_page, halve_weights, write_page
from mmseg_edaformer.isr import ISRRatio
from mmseg_edaformer.predict.segmenter import Segmenter
from tests.conftest import ROOT, seeing_model, wait_for, write_config
from tests.processes import run_tool

TIE = 1e-3  # of logits whose largest are about 10
STAGES = [*(f'encoder {i}' for i in range(1, 5)), *(f'decoder {i}' for i in range(2, 5))]
RATIOS = {'as trained': [1] * 7, 'optimal': [2, 2, 1, 1, 2, 2, 2], 'all 4': [4] * 7}


def resized(logits, size):
    """The labels of logits, and where the best two classes are equal within rounding."""
    full = F.interpolate(torch.from_numpy(logits)[None].double(), size, None, 'bilinear')[0]
    best = full.topk(2, 0)
    return best.indices[0].numpy(), (best.values[0] - best.values[1] < TIE).numpy()


# The functions of pixels.js, in node.

def cases():
    rng = np.random.default_rng(0)
    for shape, size in (((8, 12, 16), (48, 64)), ((150, 6, 9), (25, 31)), ((3, 16, 16), (7, 5)),
                        ((5, 1, 1), (3, 4)), ((4, 9, 2), (90, 3)), ((2, 5, 6), (5, 6))):
        logits = (4 * rng.standard_normal(shape)).astype(np.float32)
        labels, ties = resized(logits, size)
        assert ties.mean() < 0.01
        yield dict(name='labelsOf', args=[dict(float32=logits.ravel().tolist()), shape, size],
                   wanted=dict(labels=labels.ravel().tolist(), ties=ties.ravel().tolist()))
    for height, width in (480, 640), (3000, 4000), (333, 1777), (40, 30), (683, 512):
        for scale, multiple in ((2048, 512), 32), ((2048, 1024), 1):
            size = rescale_size((width, height), scale)
            if max(size) <= 1024:
                yield dict(name='networkSize', args=[
                    [height, width], 1024, dict(scale=scale, multiple=multiple), [61, 61]],
                    wanted=[-(-max(side, 61) // multiple) * multiple for side in size[::-1]])
    for size, wanted in (((3000, 4000), (768, 1024)), ((4000, 3000), (1024, 768)),
                         ((384, 512), (384, 512)), ((10, 400), (61, 400)), ((1, 1), (61, 61))):
        yield dict(name='networkSize', wanted=wanted,
                   args=[size, 1024, dict(scale=None, multiple=1), [61, 61]])
    rgba = rng.integers(0, 256, (5, 7, 4), np.uint8)
    yield dict(name='toRGB', args=[dict(uint8=rgba.ravel().tolist())],
               wanted=rgba[..., :3].ravel().tolist())
    palette = rng.integers(0, 256, (9, 3), np.uint8)
    one, other = rng.integers(0, 9, (2, 40), np.uint8)
    yield dict(name='paint', args=[one.tolist(), palette.tolist()], wanted=np.concatenate(
        [palette[one], np.full((40, 1), 255)], 1).ravel().tolist())
    yield dict(name='compare', args=[one.tolist(), other.tolist(), 9], wanted=dict(
        shares=[(np.bincount(labels, minlength=9) / 40).tolist() for labels in (one, other)],
        changed=float((one != other).mean())))
    for values in [5.], [3., 1., 2.], [9., 1., 4., 2.]:
        yield dict(name='median', args=[values], wanted=statistics.median(values))
    for text in 'none', '2', '2211-222', '4111-111':
        ratio = ISRRatio.parse(text)
        yield dict(name='ratioText', args=[
            multipliers(ratio, STAGES), STAGES], wanted=text)


def test_pixels(tmp_path):
    if shutil.which('node') is None:
        pytest.skip('Node.js is not installed')
    numbers = [*cases()]
    (tmp_path / 'numbers.json').write_text(json.dumps(numbers))
    done = subprocess.run(
        ['node', '--test', '--test-reporter=tap', f'{ROOT}/tests/export/pixels.test.mjs'],
        text=True, timeout=60, capture_output=True,
        env={**os.environ, 'NUMBERS': str(tmp_path / 'numbers.json')})
    assert done.returncode == 0, done.stdout
    assert f'# pass {len(numbers) + 1}' in done.stdout


# The folder.

@pytest.fixture(scope='module')
def graph(scenes, tmp_path_factory):
    """The ONNX file of a small model, with its ratio as an input."""
    pytest.importorskip('onnxscript')
    folder = tmp_path_factory.mktemp('graph')
    config = write_config(folder, scenes)
    config.write_text(config.read_text() + """
model['backbone']['depths'] = (1, 1, 1, 1)
model['decode_head']['depths'] = (1, 1, 1)
""")
    model = seeing_model(config, scenes, init=True)
    torch.save(dict(state_dict=model.state_dict()), folder / 'mini.pth')
    segmenter = Segmenter(config, folder / 'mini.pth', device='cpu')
    deployed = Deployed(segmenter.model, False, ('isr_ratio',))
    program, minimum = trace(deployed, None)
    with quiet():
        FORMATS['onnx'].write(program, folder / 'model.onnx',
                              json.dumps(describe(segmenter, deployed, None, minimum)))
    return folder / 'model.onnx'


@pytest.fixture(scope='module')
def package():
    """The package of npm."""
    try:
        return web.get_runtime()
    except ConfigError as error:
        if re.search('npm is not installed|ENOTFOUND|EAI_AGAIN|ECONN|ETIMEDOUT|ENETUNREACH',
                     str(error)):
            pytest.skip(str(error))
        raise


@pytest.fixture(scope='module')
def site(graph, package, tmp_path_factory):
    folder = tmp_path_factory.mktemp('web') / 'site'
    text = write_page(graph, folder, package)
    assert float(re.search(r'([\d.]+) % of the labels stay', text)[1]) > 99.9
    return folder


def test_the_folder_holds_what_the_page_needs_and_nothing_else(site, graph):
    names = {str(path.relative_to(site)) for path in site.rglob('*') if path.is_file()}
    assert names == {
        'index.html', 'app.js', 'pixels.js', 'worker.js', 'threads.js', 'page.css', 'web.css',
        'model.onnx', 'model.json', *(f'examples/scene{i}.jpg' for i in range(1, 5)),
        'ort/LICENSE', 'ort/ThirdPartyNotices.txt',
        *(f'ort/{name}' for names in web._FILES.values() for name in names)}
    assert 'Permission is hereby granted' in (site / 'ort/LICENSE').read_text()
    model = json.loads((site / 'model.json').read_text())
    assert [(position['name'], position['ratio']) for position in model['dial']][:2] == [
        *RATIOS.items()][:2]
    assert model['files']['cpu']['model.onnx'] == (site / 'model.onnx').stat().st_size
    assert (site / 'model.onnx').stat().st_size < 0.75 * graph.stat().st_size
    policy = re.search('Security-Policy" content="(.*?)"', (site / 'index.html').read_text())[1]
    assert policy == ''.join(re.findall('"(.*?)"', (site / 'threads.js').read_text()))
    for name in 'index.html', 'app.js', 'worker.js', 'pixels.js', 'threads.js', 'web.css':
        assert not re.findall('(?:https?:)?//[a-z0-9.-]+/', (site / name).read_text()), name


def test_weights_that_float16_cannot_hold_stay(graph):
    onnx = pytest.importorskip('onnx')
    model = onnx.load(graph)
    large = next(weight for weight in model.graph.initializer if np.prod(weight.dims) > 2000)
    values = onnx.numpy_helper.to_array(large).copy()
    values.flat[0] = 1e5
    large.CopyFrom(onnx.numpy_helper.from_array(values, large.name))
    kept = {weight.name: weight for weight in halve_weights(model).graph.initializer}
    assert (onnx.numpy_helper.to_array(kept[large.name]) == values).all()
    assert sum(name.endswith('_16') for name in kept) > 5


@pytest.mark.parametrize(('change', 'message'), [
    (dict(classes=['x'] * 257), 'has 257 classes, and the page can show 256'),
    (dict(align_corners=True), 'resizes its logits with align_corners=True'),
    (dict(pipeline=[dict(type='Rotate')]), 'cannot do what Rotate of the test pipeline does'),
    (dict(pipeline=[dict(size=[64, 64])]), 'cannot do what one step of the test pipeline does'),
    (dict(pipeline=[dict(type='Resize', keep_ratio=True)]), 'cannot do what Resize of'),
    (dict(pipeline=[dict(type='ResizeToMultiple')]), 'cannot do what ResizeToMultiple of')])
def test_models_that_the_page_cannot_run(graph, package, tmp_path, change, message):
    onnx = pytest.importorskip('onnx')
    model = onnx.load(graph)
    metadata = json.loads(model.metadata_props[0].value)
    onnx.helper.set_model_props(model, {KEY: json.dumps(metadata | change)})
    onnx.save_model(model, tmp_path / 'model.onnx')
    with pytest.raises(ConfigError, match=message):
        write_page(tmp_path / 'model.onnx', tmp_path / 'site', package)
    assert [path.name for path in tmp_path.iterdir()] == ['model.onnx']


def no_export(*_, **__):
    raise AssertionError('the export began')


def test_folders_and_packages_that_cannot_be_used(tmp_path, monkeypatch):
    monkeypatch.setattr(web, 'export', no_export)
    site, mine = tmp_path / 'site', tmp_path / 'mine'
    mine.mkdir()
    for name, content in (('thesis.txt', 'years of work'), ('model.json', '{"format": "layers"}'),
                          ('model.json', '{"dial": []}')):
        (mine / name).write_text(content)
        with pytest.raises(ConfigError, match='mine is not the folder of a page'):
            export_page('model.pth', mine, runtime=tmp_path)
    assert len([*mine.iterdir()]) == 2
    (mine / 'thesis.txt').unlink()
    (mine / 'model.json').write_text('{"dial": [], "examples": ["examples/scene1.jpg"]}')
    (mine / 'examples').mkdir()
    (mine / 'examples/scene1.jpg').touch()
    web._check_folder(mine)
    (mine / 'examples/holiday.jpg').touch()
    with pytest.raises(ConfigError, match='or it holds other files too'):
        web._check_folder(mine)
    monkeypatch.chdir(mine)
    for out in '.', '..', mine:
        with pytest.raises(ConfigError, match='would replace the folder that you are in'):
            export_page('model.pth', out, runtime=tmp_path)
    for model in 'org/model', torch.nn.ReLU():
        with pytest.raises(ConfigError, match=r'(org/model|ReLU) is none, so use --format onnx'):
            export_page(model, site, runtime=tmp_path)
    with pytest.raises(ConfigError, match=r'is not the unpacked package onnxruntime-web@[\d.]+ \('):
        export_page('model.pth', site, runtime=tmp_path)
    (tmp_path / 'package.json').write_text('{"name": "onnxruntime-web", "version": "1.0.0"}')
    (tmp_path / 'dist').mkdir()
    for names in web._FILES.values():
        for name in names:
            (tmp_path / 'dist' / name).touch()
    with pytest.raises(ConfigError, match=r'is onnxruntime-web@1\.0\.0: the page needs'):
        export_page('model.pth', site, runtime=tmp_path)
    assert not site.exists()


def test_errors_of_the_export_name_the_folder(tmp_path, package, monkeypatch):
    def export(model, out, **_):
        raise ConfigError(f'{out} is not written: too hard')

    monkeypatch.setattr(web, 'export', export)
    with pytest.raises(ConfigError) as caught:
        export_page('model.pth', tmp_path / 'site', runtime=package)
    assert str(caught.value) == (
        f'{tmp_path / "site"} is not written: the page needs an ONNX file that takes any size and '
        'ratio, and its export failed: too hard')


def test_the_old_page_stays_when_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    out = tmp_path / 'site'
    out.mkdir()
    (out / 'model.json').write_text('{"dial": [], "examples": []}')
    replace = Path.replace

    def fail(self, target):
        if self.name == 'new':
            raise PermissionError(13, 'not now')
        return replace(self, target)

    with monkeypatch.context() as context:
        context.setattr(Path, 'replace', fail)
        with pytest.raises(ConfigError, match='cannot be written to: not now'), (
                web._replacing_folder(out)):
            pass
    assert [path.name for path in out.iterdir()] == ['model.json']
    with web._replacing_folder(out) as folder:
        (folder / 'index.html').touch()
    assert [path.name for path in out.iterdir()] == ['index.html']
    assert [*tmp_path.iterdir()] == [out]


def test_options_that_the_page_does_not_have():
    code, output = run_tool('tools/export.py', '--model', 'model.pth', '--format', 'web', '--out',
                            'site', '--keep-ratio')
    assert code == 2
    assert '--keep-ratio does not work with --format web' in output


def test_npm(tmp_path, monkeypatch):
    shell_path = os.environ['PATH']
    cache = tmp_path / 'cache' / 'mmseg_edaformer'
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    monkeypatch.setenv('PATH', str(tmp_path))
    with pytest.raises(ConfigError, match='npm is not installed: install Node'):
        web.get_runtime()
    npm = tmp_path / 'npm'
    for script, message in (('echo ENOTFOUND >&2; exit 1', r'npm cannot get .*: ENOTFOUND\. Try'),
                            ('echo x > a.tgz', 'npm sent another archive')):
        npm.write_text(f'#!/bin/sh\n{script}\n')
        npm.chmod(0o755)
        with pytest.raises(ConfigError, match=message):
            web.get_runtime()
    assert not list(cache.iterdir())
    # Another process is faster.
    with tarfile.open(tmp_path / 'a.tgz', 'w:gz') as archive:
        archive.add(npm, 'package/package.json')
    digest = hashlib.sha512((tmp_path / 'a.tgz').read_bytes()).digest()
    monkeypatch.setattr(web, 'SHA512', base64.b64encode(digest).decode())
    monkeypatch.setenv('PATH', f'{tmp_path}:{shell_path}')
    folder = cache / web.PACKAGE
    npm.write_text(f'#!/bin/sh\ncp {tmp_path}/a.tgz . && mkdir -p {folder}/package/dist\n')
    assert web.get_runtime() == folder / 'package'
    assert [path.name for path in folder.rglob('*')] == ['package', 'dist']
    shutil.rmtree(cache)
    cache.touch()
    with pytest.raises(ConfigError, match=r'mmseg_edaformer cannot take .*--runtime FOLDER'):
        web.get_runtime()


# The page in a browser.

@pytest.fixture(scope='module')
def url(site):
    """The address of the folder, served as `python -m http.server` does."""
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(
            ('127.0.0.1', 0), functools.partial(Quiet, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}/'
        server.shutdown()


def watch(tab):
    """Collect what goes wrong on a page, and the addresses that it asks for."""
    tab.wrong, tab.asked = [], []
    tab.on('console', lambda said: said.type == 'error' and tab.wrong.append(said.text))
    tab.on('pageerror', lambda error: tab.wrong.append(str(error)))
    tab.on('request', lambda request: tab.asked.append(request.url))
    return tab


def visit(tab, url):
    """Open the page, which loads itself again to get threads, and wait for its prediction."""
    tab.goto(url)
    tab.wait_for_selector('#notes:has-text("scene1")', timeout=60_000)


@pytest.fixture(scope='module')
def opened(browser, url):
    """A page that stays open from test to test, for its model takes a while."""
    context = browser.new_context(viewport=dict(width=1280, height=900), accept_downloads=True)
    tab = watch(context.new_page())
    visit(tab, url)
    wait_for(tab, '#notes', r'scene1\.jpg: 512 x 384 pixels\. .*--isr-ratio 2211-222$')
    tab.click('summary')
    yield tab
    context.close()


@pytest.fixture
def page(opened, url):
    yield opened
    assert opened.wrong == []
    assert {address for address in opened.asked if not address.startswith((url, 'blob:'))} == set()


def picture(size, seed=0, kind='PNG'):
    """A file of a drawn scene, as a browser uploads it."""
    content = io.BytesIO()
    scene = Image.fromarray(draw_scene(np.random.default_rng(seed), (192, 256))[0])
    scene.resize(size).save(content, kind)
    return dict(name=f'{size[0]}x{size[1]}.{kind.lower()}', mimeType=f'image/{kind.lower()}',
                buffer=content.getvalue())


def upload(page, file):
    page.set_input_files('#file', file)
    return file['name']


def download(page, button):
    with page.expect_download() as waiting:
        page.click(button)
    return waiting.value.suggested_filename, np.array(
        Image.open(waiting.value.path()).convert('RGB'))


def move(page, selector, value):
    page.locator(selector).fill(str(value))


def test_labels_equal_onnx_runtime(page, site):
    model = json.loads((site / 'model.json').read_text())
    names = [position['name'] for position in model['dial']]
    palette = np.array(model['palette'])
    file = picture((250, 190))
    pixels = np.array(Image.open(io.BytesIO(file['buffer'])))
    upload(page, file)
    session = onnxruntime.InferenceSession(
        site / 'model.onnx', providers=['CPUExecutionProvider'])
    found, shares = {}, {}
    for name, ratio in RATIOS.items():
        move(page, '#dial', names.index(name))
        wait_for(page, '#notes', f'250 x 190.*--isr-ratio {["none", "2211-222", "4"][len(found)]}$')
        logits = session.run(None, dict(images=pixels[None], isr_ratio=np.array(ratio)))[0][0]
        wanted, ties = resized(logits, pixels.shape[:2])
        saved, mask = download(page, '#save-mask')
        assert saved == '250x190_mask.png'
        found[name] = (mask[:, :, None] == palette).all(3).argmax(2)
        assert (palette[found[name]] == mask).all()
        assert ties.mean() < 0.02
        assert ((found[name] == wanted) | ties).all()
        shares[name] = np.bincount(found[name].ravel(), minlength=8) / wanted.size
    assert len(np.unique(found['as trained'])) > 3
    changed = (found['all 4'] != found['as trained']).mean()
    assert changed > 0.001
    assert page.inner_text('#changed') == f'{100 * changed:.2f}%'
    rows = [row.split('\t') for row in page.inner_text('#classes').split('\n')]
    table = {row[-3]: row[-2:] for row in rows if '<' not in ''.join(row)}
    assert len(table) > 3
    assert table.items() <= {
        name: [f'{100 * shares[which][k]:.1f}%' for which in ('as trained', 'all 4')]
        for k, name in enumerate(model['classes'])}.items()
    before, after = wait_for(page, '#times', r'(\d+) → (\d+)').groups()
    assert int(before) > 0
    assert int(after) > 0
    move(page, '#opacity', 40)
    overlay = download(page, '#save-overlay')[1]
    assert np.abs(overlay - (0.6 * pixels + 0.4 * palette[found['all 4']])).max() <= 2
    # More ratios than the worker keeps, and back to one of the first.
    for name in 'optimal', 'all 2', 'all 3', 'optimal':
        move(page, '#dial', names.index(name))
        wait_for(page, '#notes', f'--isr-ratio {dict(optimal="2211-222").get(name, name[-1])}$')
    assert (download(page, '#save-mask')[1] == palette[found['optimal']]).all()
    assert page.inner_text('#problem') == ''
    move(page, '#dial', names.index('all 4'))
    # A stage of its own, and back to a position of the slider.
    page.get_by_role('slider', name='encoder 1').fill('8')
    wait_for(page, '#notes', '--isr-ratio 8444-444$')
    assert page.inner_text('#dial-text') == page.inner_text('#side') == '8444-444'
    page.focus('#dial')
    page.keyboard.press('Home')
    wait_for(page, '#notes', '--isr-ratio none$')
    assert page.locator('#dial').get_attribute('aria-valuetext') == 'as trained'
    assert page.inner_text('#changed') == '0.00%'


def test_pictures_of_all_sizes(page):
    page.locator('#longer').select_option('256')
    for index, size in enumerate([(64, 64), (61, 300), (20, 500), (1, 1), (333, 77), (640, 480),
                                  (480, 640), (1023, 767), (2500, 400), (4000, 3000)]):
        name = upload(page, picture(size, index, 'JPEG' if index % 2 else 'PNG'))
        note = wait_for(page, '#notes', rf'{name}: {size[0]} x {size[1]} pixels(.*)\.')[1]
        if size == (4000, 3000):
            assert note.startswith(', resized to 256 x 192 for the network')
            assert page.inner_text('#size') == 'of 2048 x 1536'
            assert download(page, '#save-mask')[1].shape == (3000, 4000, 3)
    page.locator('#longer').select_option('1024')


def test_files_that_are_no_pictures(page):
    for width, content in enumerate((b'', b'no image', picture((64, 64))['buffer'][:60]), 80):
        upload(page, dict(name='broken.png', mimeType='image/png', buffer=content))
        wait_for(page, '#problem', 'broken.png is no image that this browser')
        upload(page, picture((width, 64)))
        wait_for(page, '#notes', f'{width}x64.png')
        assert page.inner_text('#problem') == ''


def test_the_webcam(page):
    page.click('#webcam')
    wait_for(page, '#webcam', 'Take this image')
    page.click('#webcam')
    wait_for(page, '#notes', r'webcam\.png: \d+ x \d+ pixels')
    assert page.inner_text('#webcam') == 'Webcam'
    assert page.locator('#camera').is_hidden()


def test_everything_has_a_name_and_fits(page):
    for part in page.locator('main :is(input, button, select, canvas, progress)').all():
        assert part.evaluate("""part => part.ariaLabel || part.labels?.[0]?.textContent ||
            part.textContent"""), part.evaluate('part => part.outerHTML')
    for width in 390, 1280:
        page.set_viewport_size(dict(width=width, height=844))
        assert page.evaluate('document.documentElement.scrollWidth') == width


def test_two_tabs_and_one_thread(browser, url):
    with browser.new_context() as context, browser.new_context(service_workers='block') as single:
        tabs = [watch(own.new_page()) for own in (context, context, single)]
        tabs[2].add_init_script("""Object.defineProperty(window, 'sessionStorage', {
            get() { throw new DOMException('blocked'); } });""")
        for tab in tabs:
            visit(tab, url)
        for tab in tabs:
            assert tab.wrong == []
        assert tabs[2].inner_text('#threads') == '1 thread'
        assert tabs[2].evaluate('crossOriginIsolated') is False
        if os.cpu_count() > 1:
            assert tabs[0].inner_text('#threads') != '1 thread'


@pytest.mark.parametrize(('breaks', 'message'), [
    ('window', 'The page cannot work: WebAssembly is missing or off: use another'),
    ('worker.js', 'Too little memory for this size: choose a smaller longer side'),
    ('model.onnx', 'cannot run in this browser: model.onnx cannot be loaded: 404'),
    ('model.json', 'The page cannot work: .*Unexpected end of JSON'),
    ('ort/ort.jspi.min.mjs', 'The CPU computes, because the model cannot run on the GPU: ')])
def test_what_fails_is_said(browser, url, site, breaks, message):
    with browser.new_context(service_workers='block') as context:
        tab = context.new_page()
        if breaks == 'window':
            tab.add_init_script('delete window.WebAssembly')
        elif breaks == 'worker.js':
            context.route('**/worker.js', lambda route: route.fulfill(
                content_type='text/javascript', body=(site / 'worker.js').read_text() + """
WebAssembly.Memory = class { constructor() { throw new RangeError('cannot allocate memory'); } };
"""))
        else:
            context.route(f'**/{breaks}', lambda route: route.fulfill(status=404))
        if 'jspi' in breaks:
            tab.add_init_script("""Object.defineProperty(navigator, 'gpu', { value: {
                requestAdapter: async () => ({ info: { isFallbackAdapter: false } }) } });""")
        tab.goto(url)
        wait_for(tab, '#problem', message)
        assert tab.inner_text('#note') == ''
        assert tab.locator('#progress').is_hidden()


def renderers():
    """Resident megabytes of the renderers of this process' Chromium."""
    processes = {}
    for status in Path('/proc').glob('[0-9]*/status'):
        try:
            fields = dict(line.split(':', 1) for line in status.read_text().splitlines())
            command = status.with_name('cmdline').read_text()
        except FileNotFoundError:  # it has ended
            continue
        processes[int(fields['Pid'])] = (int(fields['PPid']), '--type=renderer' in command,
                                         int(fields.get('VmRSS', '0 kB').split()[0]) // 1024)

    def is_ours(pid):
        return pid == os.getpid() or (pid in processes and is_ours(processes[pid][0]))
    return sum(size for pid, (_, renders, size) in processes.items() if renders and is_ours(pid))


@pytest.mark.soak
def test_memory_stays_and_times(browser, url):
    """Fifty predictions; prints milliseconds by ratio and threads."""
    with browser.new_context() as context:
        tab = watch(context.new_page())
        visit(tab, url)
        resident = []
        for index in range(50):
            upload(tab, picture((512, 384 + index % 7), index))
            wait_for(tab, '#notes', f'512x{384 + index % 7}')
            if index % 10 == 9:
                resident.append(renderers())
        print('MB of Chromium after 10, 20, ... predictions:', resident)
        assert resident[-1] < 1.1 * resident[1]
        tab.click('summary')
        for threads in '2', '1':
            tab.locator('#backend').select_option(threads)
            for position in range(3):
                move(tab, '#dial', position)
                wait_for(tab, '#notes', ('none', '2211-222', '2')[position] + '$')
                wait_for(tab, '#rounds', 'median')
                tab.wait_for_timeout(5000)
                print(threads, 'threads', tab.inner_text('#dial-text'), tab.inner_text('#times'))
        assert tab.wrong == []
