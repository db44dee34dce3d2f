"""The page: what is behind it, and the page itself in a browser."""
import http.client
import json
import os
import re
import runpy
import signal
import socket
import sys
import tempfile
import time
import urllib.error
import urllib.request
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from PIL import Image

from mmseg_edaformer.errors import ConfigError
from mmseg_edaformer.isr import ISRRatio
from mmseg_edaformer.predict.comparison import Comparison
from mmseg_edaformer.predict.page import describe, serve
from mmseg_edaformer.predict.segmenter import Segmentation, Segmenter
from tests.conftest import ROOT, wait_for
from tests.predict.conftest import expected
from tests.processes import finish, in_child

RATIO = ISRRatio.parse('4111-111')


@pytest.fixture(scope='module')
def segmenter(whole):
    return Segmenter(*whole, device='cpu')


def test_names_of_classes_are_text():
    trained = np.zeros((50, 50), np.uint8)
    chosen = trained.copy()
    chosen[0, :2] = 1
    classes, palette = ('<script>alert(1)</script>', 'a&b'), ((255, 0, 0), (0, 1, 2))
    results = tuple(Segmentation(labels, np.zeros((50, 50, 3), np.uint8), classes, palette)
                    for labels in (trained, chosen))
    made = Comparison(RATIO, results, (10., 8.), 3, (2., 1.5))
    figures, text = describe(made)
    assert '<script' not in text
    assert 'rgb(255, 0, 0)' in text
    assert re.findall(r'>([^<\n]+)<', text) == [
        'class', 'trained', 'chosen', '&lt;script&gt;alert(1)&lt;/script&gt;', '100.0%', '99.9%',
        'a&amp;b', '0.0%', '0.1%']
    assert ' '.join(re.findall(r'>([^<\n]+)<', figures)) == (
        'pixels changed 0.08% of 50 x 50 GMACs 2 →  1.5 -25% milliseconds 10 →  8 '
        '-20%, median of 3 Ratio of the right side:  --isr-ratio 4111-111')


def test_without_gradio_it_says_what_to_install(segmenter, monkeypatch):
    monkeypatch.setitem(sys.modules, 'gradio', None)
    with pytest.raises(ConfigError, match=rf'pip install -e .*{ROOT}\[demo\]'):
        serve(segmenter)
    with pytest.raises(ConfigError, match='--max-upload 0: give a number of megabytes above 0'):
        serve(segmenter, max_upload=0)


# The page in a browser.

@pytest.fixture(scope='module')
def server(whole, tmp_path_factory):
    """The tool, serving in a child: its ``pid``, ``url``, temporary ``folder`` and ``log``."""
    pytest.importorskip('gradio')
    folder = tmp_path_factory.mktemp('server')
    log = folder / 'log'
    log.touch()

    def run_tool():
        os.chdir(ROOT)
        tempfile.tempdir = str(folder)
        sys.argv = ['tools/demo.py', '--model', str(whole[0]), '--checkpoint', str(whole[1]),
                    '--device', 'cpu', '--port', '0', '--max-upload', '0.4',
                    '--allow-host', 'Proxy.example']
        runpy.run_path('tools/demo.py', run_name='__main__')

    server = SimpleNamespace(folder=folder, log=log, pid=in_child(run_tool, log=log))
    try:
        for _ in range(1200):
            if line := re.search(r'http://127\.0\.0\.1:\d+', log.read_text()):
                break
            time.sleep(0.1)
        assert line, log.read_text()
        server.url = line[0]
        yield server
    finally:
        if server.pid is not None:
            os.kill(server.pid, signal.SIGKILL)
            finish(server.pid)


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


def upload(page, path):
    page.set_input_files('#eda-image input[type=file]', path)


def clear(page):
    page.click('#eda-image button[aria-label="Remove Image"]')
    wait_for(page, '#eda-message', 'Choose an image')


def shown(page):
    """The two images of the comparison as the server sent them, left and right."""
    urls = page.locator('#eda-result img').evaluate_all('all => all.map(each => each.src)')
    return [cv2.imdecode(np.frombuffer(page.request.get(url).body(), np.uint8), 1)
            for url in urls]


def difference(shown, wanted):
    """How far a picture is from what is wanted as a JPEG."""
    return np.abs(shown.astype(int) - cv2.imdecode(cv2.imencode('.jpg', wanted)[1], 1)).mean()


def test_upload_move_a_slider_and_read_the_result(page, server, segmenter, files):
    path = files / '0.png'
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
    before, after = wait_for(page, '.eda-gmacs', r'([\d.]+) → ([\d.]+)').groups()
    assert float(after) < float(before)
    wait_for(page, '.eda-ms', r'\d+ → \d+')
    rows = [row.split('\t') for row in page.inner_text('#eda-classes tbody').split('\n')]
    assert [(row[-3], row[-2]) for row in rows if row[-2] not in ('0.0%', '< 0.1%')] == [
        (name, f'{share:.1%}') for name, share in trained.shares.items() if share >= 0.0005]
    for drawn, wanted in zip(shown(page), (trained, chosen), strict=True):
        assert difference(drawn, wanted.draw()) < 0.5
    # Opacity changes the images alone, and a quick choice moves the sliders.
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


def test_the_images_of_all_uploads_are_seen(page, server, files):
    for stage in page.locator('.eda-stages .block').all():
        assert stage.evaluate('each => each.scrollWidth <= each.clientWidth')
    for width in range(64, 224, 32):
        path = files / f'upload{width}.png'
        Image.open(files / '0.png').resize((width, 64)).save(path)
        upload(page, path)
        wait_for(page, '.eda-changed', f'of {width} x 64')
        page.wait_for_function("""width => [...document.querySelectorAll('#eda-result img')].every(
            each => each.naturalWidth === width)""", arg=width, timeout=10_000)
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


def test_bad_files_give_a_message_and_the_next_one_works(page, server, files):
    upload(page, files / 'broken.png')
    wait_for(page, '#eda-message [role=alert]', r'image cannot be decoded: broken\.png')
    assert page.locator('.eda-gmacs').count() == 0
    clear(page)
    upload(page, files / 'heavy.png')
    wait_for(page, '.toast-body', r'exceed the maximum allowed size.*heavy\.png')
    upload(page, files / 'turned.jpg')
    wait_for(page, '.eda-changed', 'of 128 x 192')
    assert page.locator('#eda-message [role=alert]').count() == 0
    assert 'Traceback' not in server.log.read_text()


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


def test_what_a_page_would_not_send(server, files, work):
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + (
        files / 'heavy.png').read_bytes() + b'\r\n--x--\r\n'
    status, answer = post(f'{server.url}/gradio_api/upload', body,
                          'multipart/form-data; boundary=x')
    assert status == 413, answer
    uploads = next(server.folder.glob('mmseg_edaformer_demo_*')) / 'uploads'
    before = {*uploads.rglob('*')}
    with socket.create_server(('127.0.0.1', 0)) as listening:
        for path in (str(files / '0.png'), f'{uploads}/../scene1.png', 'setup.py',
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
    for index, value in (2, float('nan')), (2, '<b>'), (3, [2]):
        answer = ask(server, {0: file(str(known)), index: value})
        assert f'encoder {index - 1}: give a number' in answer['output']['data'][3]['value']
    for path, status in (known, 200), (work / 'mini.py', 403), (files / '0.png', 403):
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
    with pytest.raises(ConfigError, match=f'cannot listen on .* --port {port} .*in use'):
        serve(segmenter, port=port)
    assert [each.name for each in server.folder.glob('mmseg_edaformer_demo_*')]
    os.kill(server.pid, signal.SIGINT)
    code, server.pid = finish(server.pid), None
    assert code == 0
    assert not [*server.folder.glob('mmseg_edaformer_demo_*')]
    assert 'Traceback' not in server.log.read_text()
