"""A real server: two replicas under Ray Serve, a burst, a kill, new settings, the end."""
import io
import json
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter

import cv2
import numpy as np
import psutil
import pytest
import yaml
from PIL import Image

from mmseg_edaformer.data.drawing import draw_scene
from mmseg_edaformer.predict.segmenter import Segmenter
from tests.conftest import ROOT
from tests.processes import free_port, run_tool

pytest.importorskip('ray.serve')

RATIOS = 'none', '2', '4+q4'


def body_of(seed, size=(640, 640)):
    image = draw_scene(np.random.default_rng(seed), size)[0]
    return cv2.imencode('.png', image[..., ::-1])[1].tobytes()


class Server:
    """tools/serve.py in a process of its own."""

    def __init__(self, whole, folder, *flags):
        self.port, self.log = free_port(), folder / 'log'
        self.command = [sys.executable, 'tools/serve.py', '--model', str(whole[0]), '--checkpoint',
                        str(whole[1]), '--device', 'cpu', '--port', str(self.port),
                        '--allow-overrides', '--isr-ratio', *RATIOS]
        with self.log.open('w') as log:
            self.process = subprocess.Popen(
                [*self.command, *flags], cwd=ROOT, stdout=log, stderr=log,
                env=os.environ | dict(OMP_NUM_THREADS='1'))

    def ask(self, path, body=None, **headers):
        """Return status, headers and content."""
        request = urllib.request.Request(f'http://127.0.0.1:{self.port}{path}', body, headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, response.headers, response.read()
        except urllib.error.HTTPError as error:
            return error.code, error.headers, error.read()

    def wait(self, seconds=120):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log.read_text()
            try:
                if self.ask('/readyz')[0] == 200:
                    return
            except OSError:
                pass
            time.sleep(0.2)
        raise AssertionError(self.log.read_text())

    def replicas(self):
        """Return the processes that hold a model."""
        return [process for process in psutil.Process(self.process.pid).children(recursive=True)
                if 'Replica:edaformer:Replica' in ' '.join(process.cmdline())]

    def burst(self, bodies, gap=0., path='/segment'):
        """Send requests at once, or after a gap each, from a thread each; returns the answers."""
        answers = [None] * len(bodies)

        def ask(index):
            answers[index] = self.ask(path, bodies[index])
        threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(bodies))]
        for thread in threads:
            thread.start()
            time.sleep(gap)
        for thread in threads:
            thread.join()
        return answers


@pytest.fixture(scope='module')
def server(whole, tmp_path_factory):
    server = Server(whole, tmp_path_factory.mktemp('server'), '--replicas', '2', '--deadline-ms',
                    '60000')
    try:
        server.wait()
        yield server
    finally:
        server.process.terminate()
        server.process.wait(60)


def test_the_mask_is_that_of_predict(server, whole, tmp_path):
    (tmp_path / 'a.png').write_bytes(body_of(0))
    for ratio in RATIOS:
        status, headers, content = server.ask(f'/segment?isr_ratio={ratio}'.replace('+', '%2B'),
                                              body_of(0))
        assert (status, headers['ISR-Ratio']) == (200, ratio)
        wanted = Segmenter(*whole, device='cpu', isr_ratio=ratio)(tmp_path / 'a.png').labels
        assert (np.array(Image.open(io.BytesIO(content))) == wanted).all()
    status, _, content = server.ask('/segment', body_of(0), Accept='application/json')
    assert status == 200
    assert json.loads(content)['isr_ratio'] == 'none'
    assert json.loads(server.ask('/model')[2])['classes'][0] == 'sky'


@pytest.mark.slow
def test_a_burst_a_kill_and_new_settings(server):
    idle = time.monotonic()
    assert server.ask('/segment', body_of(1))[0] == 200
    idle = time.monotonic() - idle
    bodies = [body_of(index % 4) for index in range(24)]
    answers = server.burst(bodies, path=f'/segment?deadline_ms={3e3 * idle:.0f}')
    statuses = Counter(status for status, *_ in answers)
    assert statuses.keys() == {200, 503}
    assert all(int(headers['Retry-After']) >= 1 for status, headers, _ in answers if status == 503)
    ratios = {headers['ISR-Ratio'] for status, headers, _ in answers if status == 200}
    assert len(ratios) > 1
    assert server.ask('/segment', body_of(1))[1]['ISR-Ratio'] == 'none'

    first, second = server.replicas()
    threading.Timer(0.3, first.kill).start()
    answers = server.burst(bodies[:16], gap=0.05)
    assert {status for status, *_ in answers} == {200}
    end = time.monotonic() + 60
    while len(server.replicas()) < 2 and time.monotonic() < end:
        time.sleep(0.2)
    assert len(server.replicas()) == 2
    assert second in server.replicas()

    before = {process.pid for process in server.replicas()}
    code, log = run_tool(*server.command[1:], '--replicas', '2', '--deadline-ms', '5000',
                         '--address', 'auto')
    assert code == 0, log
    end = time.monotonic() + 30
    while json.loads(server.ask('/model')[2])['deadline_ms'] != 5000 and time.monotonic() < end:
        time.sleep(0.2)
    assert json.loads(server.ask('/model')[2])['deadline_ms'] == 5000
    assert {process.pid for process in server.replicas()} == before


def test_what_waits_is_answered_at_the_end(server):  # which is the last test of this server
    threading.Timer(0.4, server.process.terminate).start()
    answers = server.burst([body_of(0)] * 6, gap=0.01)
    assert {status for status, *_ in answers} == {200}
    assert server.process.wait(60) == 0
    log = server.log.read_text()
    first, *others = log.splitlines()
    assert first == f'http://127.0.0.1:{server.port}/docs   (Ctrl-C ends it)'
    assert all('A worker died or was killed' in line for line in others), log  # the one above


def test_wrong_command_lines(work, tmp_path):
    for flags, message in (
            (['--isr-ratio', 'banana'], "cannot parse isr_ratio 'banana'"),
            (['--deadline-ms', '0'], '--deadline-ms 0.0: give a number above 0'),
            (['--sweep', ROOT / 'setup.py'], 'is no sweep.json'),
            (['--host', '203.0.113.1'], 'cannot listen on --host 203.0.113.1'),
            (['--token-file', tmp_path / 'none'], 'none')):
        code, log = run_tool('tools/serve.py', '--model', work, *flags)
        assert code == 1
        assert message in log, log
        assert 'Traceback' not in log


def test_a_file_for_serve_deploy(work):
    code, log = run_tool('tools/serve.py', '--model', work, '--replicas', '1-4', '--yaml')
    assert code == 0
    app, = yaml.safe_load(log)['applications']
    assert app['import_path'] == 'mmseg_edaformer.serve:application'
    assert app['deployments'][0]['autoscaling_config']['max_replicas'] == 4
    from ray.serve.schema import ServeDeploySchema
    ServeDeploySchema.model_validate(yaml.safe_load(log))


@pytest.mark.soak
def test_two_thousand_requests(whole, tmp_path):
    """1 % of garbage, a replica killed twice, new settings in between: nothing accepted is lost."""
    server = Server(whole, tmp_path, '--replicas', '2', '--deadline-ms', '60000')
    server.wait()
    try:
        bodies = [body_of(index, (256, 256)) for index in range(8)]
        memory, statuses = [], Counter()
        for turn in range(20):
            sent = [b'garbage' if index == turn else bodies[index % 8] for index in range(100)]
            if turn in (2, 5):
                threading.Timer(0.5, server.replicas()[0].kill).start()
            if turn == 9:
                code, log = run_tool(*server.command[1:], '--replicas', '2', '--deadline-ms',
                                     '50000', '--address', 'auto')
                assert code == 0, log
            answers = server.burst(sent, gap=0.02)
            statuses.update(status for status, *_ in answers)
            assert answers[turn][0] == 422
            if turn in (8, 13, 19):  # of the same processes
                memory.append({process.pid: process.memory_info().rss / 2 ** 20
                               for process in server.replicas()})
        print(statuses, memory)
        assert statuses == {200: 1980, 422: 20}
        assert len(memory[0]) == 2
        for pid, first in memory[0].items():
            assert memory[-1][pid] < 1.1 * first
    finally:
        server.process.terminate()
        server.process.wait(60)
