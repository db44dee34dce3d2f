"""The page: what is behind it, and the page itself in a browser."""
import http.client
import json
import os
import re
import runpy
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from html.parser import HTMLParser
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmseg.apis import init_model
from PIL import Image

from mmseg_edaformer import report_isr
from mmseg_edaformer.data import drawing as synthetic
from mmseg_edaformer.errors import ConfigError, DataError, RatioError
from mmseg_edaformer.isr import ISRRatio
from mmseg_edaformer.predict import comparison, page as demo
from mmseg_edaformer.predict.segmenter import Segmentation, Segmenter
from tests.conftest import ROOT, seeing_model, write_config
from tests.processes import finish, in_child

RATIO = ISRRatio.parse('4111-111')


@pytest.fixture(scope='module')
def work(scenes, tmp_path_factory):
    """A work dir with weights by which many classes are seen and distant keys matter."""
    folder = tmp_path_factory.mktemp('work')
    config = write_config(folder, scenes)
    model = seeing_model(config, scenes)
    torch.save(dict(state_dict=model.state_dict(), meta=dict(dataset_meta=dict(
        classes=synthetic.CLASSES, palette=synthetic.PALETTE))), folder / 'best_mIoU_iter_4.pth')
    return folder


@pytest.fixture(scope='module')
def segmenter(work):
    return Segmenter(work, device='cpu')


@pytest.fixture
def comparer(work):
    return comparison.Comparer(Segmenter(work, device='cpu'))


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    """Three drawn scenes, a turned one, one that is broken and one with too many bytes."""
    folder = tmp_path_factory.mktemp('pictures')
    rng = np.random.default_rng(3)
    for i in range(3):
        Image.fromarray(synthetic.draw_scene(rng, (128, 192))[0]).save(folder / f'{i}.png')
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(folder / '0.png').save(folder / 'turned.jpg', exif=exif, quality=95)
    (folder / 'broken.png').write_bytes((folder / '0.png').read_bytes()[:3000])
    Image.fromarray(rng.integers(0, 256, (400, 400, 3), np.uint8)).save(folder / 'heavy.png')
    return folder


def expected(segmenter, path, ratio):
    segmenter.isr_ratio = ratio
    return segmenter(path)


# Behind the page.

def test_a_comparison_is_what_segmenter_and_report_say(comparer, segmenter, pictures):
    path = str(pictures / '0.png')
    found = comparer.compare(path, RATIO)
    before, after = (expected(segmenter, path, ratio).labels for ratio in ('none', RATIO))
    assert (found.results[0].labels == before).all()
    assert (found.results[1].labels == after).all()
    assert found.changed == (before != after).mean() > 0
    assert found.gmacs == pytest.approx(
        [macs / 1e9 for macs in report_isr(segmenter.model, RATIO, (128, 192)).macs])
    assert found.gmacs[1] < found.gmacs[0]
    assert min(found.milliseconds) > 0
    assert 1 <= found.rounds <= 5
    assert comparer.compare(path, RATIO) is found
    same = comparer.compare(path, comparer.ratio([1] * 7))
    assert same.changed == 0
    assert same.gmacs[0] == same.gmacs[1] == found.gmacs[0]


def test_requests_at_once_do_not_mix_their_ratios(comparer, segmenter, pictures):
    ratios = [comparer.ratio([each, *[1] * 6]) for each in (2, 4, 6, 8)]
    found = {}
    threads = [threading.Thread(target=lambda ratio=ratio: found.update(
        {ratio: comparer.compare(str(pictures / '1.png'), ratio)})) for ratio in ratios]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ratio in ratios:
        wanted = expected(segmenter, pictures / '1.png', ratio).labels
        assert (found[ratio].results[1].labels == wanted).all()


def test_the_windows_of_a_sliding_model_are_all_counted(comparer, segmenter, pictures):
    comparer.segmenter.model.test_cfg = ConfigDict(
        mode='slide', crop_size=(64, 64), stride=(64, 64))
    found = comparer.compare(str(pictures / '0.png'), RATIO)
    one = report_isr(segmenter.model, RATIO, (64, 64)).macs
    assert found.gmacs == pytest.approx([6 * macs / 1e9 for macs in one])


def test_large_pictures_are_reduced_and_turned_ones_upright(work, pictures):
    comparer = comparison.Comparer(Segmenter(work, device='cpu'), 96)
    found = comparer.compare(str(pictures / 'turned.jpg'), RATIO)
    assert found.results[0].labels.shape == (96, 64)
    upright = np.array(Image.open(pictures / '0.png').rotate(-90, expand=True).resize((64, 96)))
    assert np.abs(found.results[0].image[..., ::-1].astype(int) - upright).mean() < 10
    with pytest.raises(ConfigError, match='--max-side 8: give 32 or more'):
        comparison.Comparer(comparer.segmenter, 8)


def test_what_cannot_be_read_is_named_as_it_was_uploaded(comparer, pictures, tmp_path):
    with pytest.raises(DataError, match=r'image cannot be decoded: broken.png \(3000 bytes\)'):
        comparer.compare(str(pictures / 'broken.png'), RATIO)
    Image.new('1', (10000, 10000)).save(tmp_path / 'bomb.png')
    with pytest.raises(DataError, match=r'bomb.png .* it has 10000x10000 pixels, more than 67108'):
        comparer.compare(str(tmp_path / 'bomb.png'), RATIO)


def test_stages_are_those_of_the_model(comparer, tmp_path):
    assert comparer.stages == dict(encoder=(1, 2, 3, 4), decoder=(2, 3, 4))
    assert str(comparer.ratio([2, 2, 1, 1, 3, 2, 1])) == '2211-321'
    assert comparer.multipliers('optimal') == [2, 2, 1, 1, 2, 2, 2]
    config = ROOT / 'configs' / 'segformer_b0_synthetic.py'
    model = init_model(str(config), device='cpu')
    torch.save(dict(state_dict=model.state_dict(), meta={}), tmp_path / 'b0.pth')
    other = comparison.Comparer(Segmenter(config, tmp_path / 'b0.pth', device='cpu'))
    assert other.stages == dict(encoder=(1, 2, 3, 4))
    assert other.ratio([1, 1, 1, 1]) == ISRRatio.parse('none')
    assert str(other.ratio([2, 2, 1, 1])) == '2211-1'
    assert other.multipliers('optimal') == [2, 2, 1, 1]
    assert other.multipliers('211-1') is None
    other.segmenter.model.backbone = torch.nn.Identity()
    with pytest.raises(RatioError, match='holds no attention that ISR can reduce'):
        comparison.Comparer(other.segmenter)


class Cells(HTMLParser):
    """The texts of a piece of HTML, and the tags in it."""

    def __init__(self, text):
        super().__init__()
        self.texts, self.tags = [], []
        self.feed(text)

    def handle_data(self, data):
        self.texts.append(data)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)


def test_names_of_classes_are_text():
    labels = np.zeros((50, 50), np.uint8)
    other = labels.copy()
    other[0, 0] = other[0, 1] = 1
    classes, palette = ('<script>alert(1)</script>', 'a&b'), ((255, 0, 0), (0, 1, 2))
    found = tuple(Segmentation(each, np.zeros((50, 50, 3), np.uint8), classes, palette)
                  for each in (labels, other))
    made = comparison.Comparison(RATIO, found, (10., 8.), 3, (2., 1.5))
    cells = Cells(demo.describe_classes(made))
    assert 'script' not in cells.tags
    assert cells.texts == ['class', 'trained', 'chosen', classes[0], '100.0%', '99.9%',
                           classes[1], '0.0%', '0.1%']
    assert 'rgb(255, 0, 0)' in demo.describe_classes(made)
    assert ' '.join(Cells(demo.describe_figures(made)).texts) == (
        'pixels changed 0.08% of 50 x 50 GMACs 2 →  1.5 -25% milliseconds 10 →  8 '
        '-20%, median of 3 Ratio of the right side:  --isr-ratio 4111-111')


def test_without_gradio_it_says_what_to_install(segmenter, monkeypatch):
    monkeypatch.setitem(sys.modules, 'gradio', None)
    with pytest.raises(ConfigError, match=rf'pip install -e .*{ROOT}\[demo\]'):
        demo.serve(segmenter)
    with pytest.raises(ConfigError, match='--max-upload 0: give a number of megabytes above 0'):
        demo.serve(segmenter, max_upload=0)


# The page in a browser.

@pytest.fixture(scope='module')
def server(work, tmp_path_factory):
    """The tool, serving in a child: its ``pid``, ``url``, temporary ``folder`` and ``log``."""
    pytest.importorskip('gradio')
    found = SimpleNamespace(folder=tmp_path_factory.mktemp('server'))
    found.log = found.folder / 'log'

    def serve():
        os.chdir(ROOT)
        tempfile.tempdir = str(found.folder)
        sys.argv = ['tools/demo.py', '--model', str(work), '--device', 'cpu', '--port', '0',
                    '--max-upload', '0.4', '--allow-host', 'Proxy.example']
        runpy.run_path('tools/demo.py', run_name='__main__')

    found.pid = in_child(serve, log=found.log)
    try:
        for _ in range(1200):
            if found.log.exists() and (line := re.search(r'http://127\.0\.0\.1:\d+',
                                                         found.log.read_text())):
                found.url = line[0]
                break
            time.sleep(0.1)
        else:
            raise AssertionError(found.log.read_text())
        yield found
    finally:
        if found.pid is not None:
            os.kill(found.pid, signal.SIGKILL)
            finish(found.pid)


@pytest.fixture(scope='module')
def browser():
    """Chromium with a camera that shows a drawing."""
    api = pytest.importorskip('playwright.sync_api')
    path = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))),
                None)
    if path is None:
        pytest.skip('no Chromium is installed')
    with api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path, args=[
            '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
            '--disable-background-networking', '--disable-component-update', '--disable-sync',
            '--use-fake-device-for-media-stream', '--use-fake-ui-for-media-stream'])
        yield found
        found.close()


@pytest.fixture
def page(server, browser):  # in this order: a child cannot run a loop within a loop
    """The page, loaded; what went wrong is in ``wrong``, addresses asked for in ``asked``."""
    tab = browser.new_page(viewport=dict(width=1366, height=900))
    tab.wrong, tab.asked = [], []
    tab.on('console', lambda said: said.type == 'error' and tab.wrong.append(said.text))
    tab.on('pageerror', lambda error: tab.wrong.append(str(error)))
    tab.on('request', lambda request: tab.asked.append(request.url))
    tab.goto(server.url)
    tab.wait_for_selector('.eda-gmacs', timeout=60_000)
    tab.wait_for_load_state('networkidle')
    yield tab
    tab.close()


def wait_for(page, selector, pattern):
    """Wait until the text matches; returns the match."""
    text = ''
    for _ in range(300):
        text = ' '.join(page.locator(selector).all_inner_texts())
        if found := re.search(pattern, text):
            return found
        page.wait_for_timeout(100)
    raise AssertionError(f'{selector} shows {text!r} and not {pattern}')


def upload(page, path):
    page.set_input_files('#eda-image input[type=file]', path)


def clear(page):
    page.click('#eda-image button[aria-label="Remove Image"]')
    wait_for(page, '#eda-message', 'Choose an image')


def shown(page):
    """The two pictures of the comparison as the server sent them, left and right."""
    urls = page.locator('#eda-result img').evaluate_all('all => all.map(each => each.src)')
    return [cv2.imdecode(np.frombuffer(page.request.get(url).body(), np.uint8), 1)
            for url in urls]


def difference(shown, wanted):
    """How far a picture is from what is wanted as a JPEG."""
    return np.abs(shown.astype(int) - cv2.imdecode(cv2.imencode('.jpg', wanted)[1], 1)).mean()


def test_upload_move_a_slider_and_read_the_result(page, server, segmenter, pictures):
    path = pictures / '0.png'
    trained, chosen = (expected(segmenter, path, ratio) for ratio in ('none', RATIO))
    wait_for(page, '#eda-figures', '--isr-ratio 2211-222')
    upload(page, path)
    wait_for(page, '.eda-changed', 'of 192 x 128')
    page.click('#eda-none')
    wait_for(page, '#eda-figures', '--isr-ratio none')
    assert page.inner_text('.eda-changed .eda-value') == '0.00%'
    slider = page.locator('#eda-encoder-1 input[type=range]')
    slider.focus()
    for _ in range(3):
        page.keyboard.press('ArrowRight')
    wait_for(page, '#eda-figures', '--isr-ratio 4111-111')
    changed = (trained.labels != chosen.labels).mean()
    wait_for(page, '.eda-changed', re.escape(f'{changed:.2%}'))
    macs = [each / 1e9 for each in report_isr(segmenter.model, RATIO, (128, 192)).macs]
    before, after = wait_for(page, '.eda-gmacs', r'([\d.]+) → ([\d.]+)').groups()
    assert [before, after] == [f'{each:.3g}' for each in macs]
    assert float(after) < float(before)
    assert all(float(each) >= 0 for each in wait_for(page, '.eda-ms', r'(\d+) → (\d+)').groups())
    rows = [row.split('\t') for row in page.inner_text('#eda-classes tbody').split('\n')]
    assert [(row[-3], row[-2]) for row in rows if row[-2] not in ('0.0%', '< 0.1%')] == [
        (name, f'{share:.1%}') for name, share in trained.shares.items() if share >= 0.0005]
    for drawn, wanted in zip(shown(page), (trained, chosen), strict=True):
        assert difference(drawn, wanted.draw()) < 0.5
    # Opacity changes the pictures alone, and a quick choice moves the sliders.
    page.locator('#eda-opacity input[type=range]').focus()
    page.keyboard.press('Home')
    for _ in range(50):
        if difference(shown(page)[1], cv2.imread(str(path))) < 0.5:
            break
        page.wait_for_timeout(100)
    else:
        raise AssertionError('the opacity has no effect')
    page.click('#eda-optimal')
    wait_for(page, '#eda-figures', '--isr-ratio 2211-222')
    assert slider.input_value() == '2'
    for typed, ratio in ('100', '8211-222'), ('', '1211-222'):
        page.fill('#eda-encoder-1 input[type=number]', typed)
        page.keyboard.press('Tab')
        wait_for(page, '#eda-figures', f'--isr-ratio {ratio}')
    assert page.wrong == []
    assert {url.split('/')[2] for url in page.asked if url.startswith(('http', 'ws'))} == {
        server.url.removeprefix('http://')}


def test_the_pictures_of_ten_uploads_are_seen(page, server, pictures):
    page.set_viewport_size(dict(width=1280, height=900))
    for stage in page.locator('.eda-stages .block').all():
        assert stage.evaluate('each => each.scrollWidth <= each.clientWidth')
        assert stage.locator('label').bounding_box()['height'] < 35  # one line
    sizes = [f'of {64 + 32 * i} x 64' for i in range(10)]
    for i, size in enumerate(sizes):
        path = pictures / f'upload{i}.png'
        Image.open(pictures / '0.png').resize((64 + 32 * i, 64)).save(path)
        upload(page, path)
        wait_for(page, '.eda-changed', size)
        page.wait_for_function("""width => [...document.querySelectorAll('#eda-result img')].every(
            each => each.naturalWidth === width)""", arg=64 + 32 * i, timeout=10_000)
        for picture in page.locator('#eda-result img').all():
            assert picture.bounding_box()['height'] > 40
    assert page.wrong == []
    assert 'Traceback' not in server.log.read_text()


def test_quick_moves_end_at_the_last_one(page, server):
    slider = page.locator('#eda-encoder-1 input[type=range]')
    slider.focus()
    for key, ratio in (('ArrowRight', '6211-222'), ('ArrowLeft', '2211-222')) * 4:
        for _ in range(4):
            page.keyboard.press(key)
        wait_for(page, '#eda-figures', f'--isr-ratio {ratio}')
        page.wait_for_load_state('networkidle')
        wait_for(page, '#eda-figures', f'--isr-ratio {ratio}')
    assert page.wrong == []


def test_bad_files_give_a_message_and_the_next_one_works(page, server, pictures):
    upload(page, pictures / 'broken.png')
    wait_for(page, '#eda-message [role=alert]', r'image cannot be decoded: broken\.png')
    assert page.locator('.eda-gmacs').count() == 0
    clear(page)
    upload(page, pictures / 'heavy.png')
    wait_for(page, '.toast-body', r'exceed the maximum allowed size.*heavy\.png')
    upload(page, pictures / 'turned.jpg')
    wait_for(page, '.eda-changed', 'of 128 x 192')
    assert page.locator('#eda-message [role=alert]').count() == 0
    assert 'Traceback' not in server.log.read_text()


def test_a_webcam_frame(page, pictures):
    clear(page)
    page.click('#eda-image button[aria-label="Capture from camera"]')
    page.click('text=Click to Access Webcam')
    page.wait_for_function('document.querySelector("#eda-image video")?.readyState === 4')
    page.click('#eda-image button[aria-label="capture photo"]')
    wait_for(page, '.eda-changed', r'of \d+ x \d+')
    assert page.wrong == []


def post(url, content, kind):
    """Post, or get if there is no content, without a browser; returns the status and the answer."""
    request = urllib.request.Request(url, content, {'Content-Type': kind})
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, answer.read().decode(errors='replace')
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def file(path, **more):
    """A picture's file, as a page names it."""
    return dict(path=path, meta=dict(_type='gradio.FileData'), **more)


def ask(server, values):
    """What a request that no page makes is answered, for values by the index of their input."""
    with urllib.request.urlopen(f'{server.url}/config', timeout=20) as answer:
        config = json.load(answer)
    event = next(each for each in config['dependencies'] if len(each['inputs']) == 9)
    session = os.urandom(8).hex()
    data = {**dict(enumerate([None, 0.5, *[1] * 7])), **values}
    status, _ = post(f'{server.url}/gradio_api/queue/join', json.dumps(dict(
        data=list(data.values()), fn_index=event['id'], session_hash=session)).encode(),
                     'application/json')
    assert status == 200
    found = []
    with urllib.request.urlopen(f'{server.url}/gradio_api/queue/data?session_hash={session}',
                                timeout=30) as answer:
        for line in answer:
            found.append(line.decode())
            if 'process_completed' in found[-1]:
                break
    return json.loads(found[-1].removeprefix('data: '))


def test_what_a_page_would_not_send(server, pictures, work):
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + (
        pictures / 'heavy.png').read_bytes() + b'\r\n--x--\r\n'
    status, answer = post(f'{server.url}/gradio_api/upload', body,
                          'multipart/form-data; boundary=x')
    assert status == 413, answer
    uploads = next(server.folder.glob('mmseg_edaformer_demo_*')) / 'uploads'
    before = {*uploads.rglob('*')}
    with socket.create_server(('127.0.0.1', 0)) as listening:
        for path in (str(pictures / '0.png'), f'{uploads}/../scene1.png', 'setup.py',
                     f'http://127.0.0.1:{listening.getsockname()[1]}/x.png',
                     'https://192.0.2.1/x.png'):
            for values in {0: file(path)}, {1: file(path)}, {0: file(path, is_stream=True)}:
                answer = ask(server, values)
                assert answer['success'] is False, values
                assert 'data' not in answer['output']
        listening.settimeout(0.2)
        with pytest.raises(TimeoutError):
            listening.accept()
    assert {*uploads.rglob('*')} == before
    known = next(path for path in before if path.suffix == '.png')
    assert ask(server, {0: file(str(known))})['success'] is True
    for index, value, message in ((1, float('nan'), 'opacity of the mask: nan is not a number'),
                                  (2, '<b>', "encoder 1: '&lt;b&gt;' is not a number: give one "
                                   'from 1 to 8'), (3, [2], 'encoder 2: [2] is not a number')):
        answer = ask(server, {0: file(str(known)), index: value})
        assert message in answer['output']['data'][3]['value'].replace('&#x27;', "'")
    for path, status in (known, 200), (work / 'mini.py', 403), (pictures / '0.png', 403):
        assert post(f'{server.url}/gradio_api/file={path}', None, 'text/plain')[0] == status


def test_other_names_and_pages_of_other_sites_are_refused(server):
    port = int(server.url.rpartition(':')[2])

    def get(path, host, origin=None):
        connection = http.client.HTTPConnection('127.0.0.1', port, timeout=20)
        connection.request('GET', path, headers=dict(Host=host, **(
            {} if origin is None else dict(Origin=origin))))
        answer = connection.getresponse()
        found = answer.status, answer.headers['Access-Control-Allow-Origin'], answer.read()
        connection.close()
        return found

    own = f'127.0.0.1:{port}'
    for host in own, 'LOCALHOST', 'localhost:9000', '[::1]:80', 'proxy.example', 'Proxy.example:1':
        assert get('/config', host)[:2] == (200, None), host
    for host in 'evil.example', f'evil.example:{port}', '127.0.0.1.evil.example', '[', '192.0.2.1':
        status, origin, answer = get('/config', host)
        assert (status, origin) == (403, None), host
        assert b'--allow-host' in answer
    for host, origin in (own, f'http://{own}'), ('proxy.example', 'https://proxy.example'):
        assert get('/config', host, origin)[:2] == (200, origin)
    for host, origin in ((own, 'http://evil.example'), (own, 'null'), (own, 'http://localhost:1'),
                         ('proxy.example', 'https://evil.example')):
        assert get('/config', host, origin)[:2] == (403, None), origin
    for path in '/openapi.json', '/gradio_api/openapi.json', '/docs', '/redoc':
        assert get(path, own)[0] == 404, path


def test_it_ends_cleanly_and_leaves_nothing(server, segmenter):
    port = int(server.url.rpartition(':')[2])
    with pytest.raises(ConfigError, match=f'port {port} of 127.0.0.1 is taken: give another'):
        demo.serve(segmenter, port=port)
    assert [each.name for each in server.folder.glob('mmseg_edaformer_demo_*')]
    os.kill(server.pid, signal.SIGINT)
    code, server.pid = finish(server.pid), None
    assert code == 0
    assert not [*server.folder.glob('mmseg_edaformer_demo_*')]
    assert 'Traceback' not in server.log.read_text()
