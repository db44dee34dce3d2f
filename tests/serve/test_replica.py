"""A replica and the HTTP side in this process, without Ray."""
import asyncio
import io
import json
import time
from contextlib import contextmanager

import cv2
import httpx
import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip('ray.serve')
from starlette.testclient import TestClient

from mmseg_edaformer.errors import ConfigError
from mmseg_edaformer.predict.segmenter import Segmenter
from mmseg_edaformer.serve import front, replica as replicas
from mmseg_edaformer.serve.messages import Answer, Policy, Wish
from mmseg_edaformer.serve.replica import Replica

SETTINGS = dict(isr_ratio=['none', '2', '4', '2+q2'], deadline_ms=60_000.)


@pytest.fixture(scope='module')
def model(work):
    return dict(model=str(work), device='cpu', max_side=256)


@pytest.fixture(scope='module')
def segmenter(model):
    return Segmenter(**model)


@pytest.fixture(scope='module')
def body():
    """A drawn image as a PNG, and what predict.py reads of it."""
    from mmseg_edaformer.data.drawing import draw_scene
    image = draw_scene(np.random.default_rng(0), (96, 128))[0]
    return cv2.imencode('.png', image[..., ::-1])[1].tobytes()


@pytest.fixture
def started(model, monkeypatch):
    """Starts a replica in the running loop."""
    monkeypatch.setattr(replicas, '_SIDES', (64, 96))
    monkeypatch.setattr(torch, 'set_num_threads', lambda _: None)
    monkeypatch.setattr(cv2, 'setNumThreads', lambda _: None)

    async def start(**settings):
        replica = Replica(model, 1)
        await replica.reconfigure(SETTINGS | settings)
        return replica
    return start


def ask_for(replica, body, spent=0., figures=False, **wish):
    return replica.segment(body, Wish(**wish), figures, time.time() - spent)


def pixels(answer):
    assert answer.status == 200, answer
    return np.array(Image.open(io.BytesIO(answer.content)))


def test_masks_are_those_of_predict(started, segmenter, body, tmp_path):
    (tmp_path / 'a.png').write_bytes(body)

    async def ask():
        replica = await started(allow_overrides=True)
        return [await ask_for(replica, body, **wish) for wish in (
            {}, dict(isr_ratio='2'), dict(isr_ratio='2', query_ratio='2'), dict(max_side=64))]

    answers = asyncio.run(ask())
    assert [answer.isr_ratio for answer in answers] == ['none', '2', '2+q2', 'none']
    for answer, ratio in zip(answers[:3], ('none', '2', '2+q2')):
        segmenter.isr_ratio = ratio
        assert (pixels(answer) == segmenter(tmp_path / 'a.png').labels).all()
    segmenter.isr_ratio = 'none'
    small = segmenter.load(tmp_path / 'a.png', 64)
    wanted = next(segmenter.predict_loaded([(None, small)]))[1].labels
    assert (pixels(answers[3]) == wanted).all()
    assert wanted.shape == (96, 128)


def test_figures_and_runs(started, body):
    async def ask():
        replica = await started()
        return [await ask_for(replica, body, 0.5, figures, rle=figures)
                for figures in (False, True)]

    mask, answer = asyncio.run(ask())
    content, labels = answer.content, pixels(mask)
    assert content['isr_ratio'] == 'none'
    assert content['size'] == [96, 128]
    assert content['queue_ms'] > 500
    assert content['compute_ms'] > 0
    assert sum(content['classes'].values()) == pytest.approx(1, abs=1e-5)
    assert {mask['class'] for mask in content['masks']} == content['classes'].keys()
    total = np.zeros((96, 128), int)
    for each in content['masks']:
        name, runs = each['class'], each['counts']
        assert sum(runs) == 96 * 128
        mask = np.repeat(np.arange(len(runs)) % 2, runs).reshape(128, 96).T
        total += mask
        assert mask.mean() == pytest.approx(content['classes'][name], abs=1e-6)
        assert len(set(labels[mask == 1])) == 1
    assert (total == 1).all()


@pytest.mark.parametrize('values', [[0, 0], [1, 1], [0, 1, 1, 0], [1, 0, 1]])
def test_runs_begin_with_zeros(values):
    runs = replicas._runs(np.array([values], bool))
    assert np.repeat(np.arange(len(runs)) % 2, runs).tolist() == values


def test_a_queue_turns_the_dial_and_its_end_turns_it_back(started, body):
    async def ask():
        replica = await started()
        replica.queue.controller = replicas.Controller(('none', '2', '4'), reserve=0., calm=0.)
        replica.queue.costs = replicas.Costs()
        for ratio, seconds in ('none', 1.), ('2', 0.5), ('4', 0.3):
            for _ in range(60):
                replica.queue.costs.add(ratio, 96 * 128, seconds)
        replica.queue.costs.add = lambda *_: None
        answers = await asyncio.gather(*(ask_for(replica, body, 57.8) for _ in range(9)))
        return answers, await ask_for(replica, body)

    answers, after = asyncio.run(ask())
    assert after.isr_ratio == 'none'
    assert {answer.isr_ratio for answer in answers} & {'2', '4'}
    refused = [answer for answer in answers if answer.status == 503]
    assert refused
    assert all(answer.wait >= 1 for answer in refused)
    assert 'ask again later' in refused[0].content


@pytest.mark.parametrize('coarser', [['2'], []])
def test_what_was_too_slow_is_tried_again(started, body, coarser, monkeypatch):
    monkeypatch.setattr(replicas, '_TRYING', 0.)

    async def ask():
        replica = await started(deadline_ms=5000., isr_ratio=['none', *coarser])
        for _ in range(60):  # a slow machine
            replica.queue.costs.add('none', 96 * 128, 6.)
        answers = [await ask_for(replica, body)]
        while answers[-1].isr_ratio != 'none' and len(answers) < 100:
            await asyncio.sleep(0.05)
            answers.append(await ask_for(replica, body))
        return answers

    first, *_, last = asyncio.run(ask())
    assert (first.status, first.isr_ratio) == ((200, '2') if coarser else (503, ''))
    assert (last.status, last.isr_ratio) == (200, 'none')


def test_refused_at_once(started, body):
    async def ask():
        replica = await started(allow_overrides=True)
        start = time.monotonic()
        late = await ask_for(replica, body, deadline_ms=0.01)
        return late, time.monotonic() - start, replica

    late, took, replica = asyncio.run(ask())
    assert late.status == 503
    assert 'cannot be predicted within the deadline' in late.content
    assert late.wait is None
    assert took < 5
    assert replica.queue.waiting == []


def test_no_new_request_makes_another_one_late(started, body):
    async def ask():
        replica = await started(allow_overrides=True)
        replica.queue.costs = replicas.Costs()
        for ratio in SETTINGS['isr_ratio']:
            replica.queue.costs.add(ratio, 96 * 128, 10.)
        replica.queue.costs.add = lambda *_: None
        first = asyncio.create_task(ask_for(replica, body, deadline_ms=12_000.))
        others = [asyncio.create_task(ask_for(replica, body, deadline_ms=ms))
                  for ms in (21_000., 11_000., 60_000.)]
        return await asyncio.gather(first, *others)

    # What comes second would be in time, the third one too, but only before the first or second.
    assert [answer.status for answer in asyncio.run(ask())].count(503) >= 1


@pytest.mark.parametrize(('content', 'wish', 'message'), [
    (b'', {}, 'it is empty'),
    (b'no image at all', {}, 'format is unknown'),
    ('half', {}, 'the body'),
    ('large', {}, 'has 96x4000 pixels, more than 100000'),
    (None, dict(isr_ratio='banana'), 'cannot parse isr_ratio'),
    (None, dict(isr_ratio=''), 'cannot parse isr_ratio'),
    (None, dict(isr_ratio='3'), 'this server predicts at none, 2, 4, 2+q2, not at 3'),
    (None, dict(max_side=512), 'give at most 256'),
])
def test_what_cannot_be_answered(started, body, content, wish, message):
    if content == 'half':
        content = body[:len(body) // 2]
    elif content == 'large':
        content = cv2.imencode('.png', np.zeros((4000, 96, 3), np.uint8))[1].tobytes()

    async def ask():
        replica = await started(allow_overrides=True, megapixels=0.1)
        return [await ask_for(replica, body if content is None else content, **wish),
                await ask_for(replica, body)]

    answer, next_one = asyncio.run(ask())
    assert answer.status == 422
    assert message in answer.content
    assert '/tmp' not in answer.content
    assert next_one.status == 200


def test_overrides_are_for_those_who_may(started, body):
    async def ask():
        replica = await started()
        return {name: await ask_for(replica, body, **{name: value}) for name, value in (
            ('isr_ratio', '2'), ('isr_ratio', ''), ('query_ratio', '2'), ('max_side', 64),
            ('deadline_ms', 5.))}

    for name, answer in asyncio.run(ask()).items():
        assert answer.status == 422
        assert answer.content.endswith(f'leave out {name}')


def test_a_client_that_leaves_costs_nothing(started, body):
    async def ask():
        replica, gate, predicted = await started(), asyncio.Event(), []
        predict = replica._predict

        async def gated(ratio, loaded):
            await gate.wait()
            predicted.append(loaded)
            return await predict(ratio, loaded)
        replica._predict = gated
        tasks = [asyncio.create_task(ask_for(replica, body)) for _ in range(6)]
        while len(replica.queue.waiting) < 5:  # the first one is at the gate
            await asyncio.sleep(0.01)
        for task in tasks[3:]:
            task.cancel()
        gate.set()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        return done, await ask_for(replica, body), predicted

    done, after, predicted = asyncio.run(ask())
    assert {answer.status for answer in (*done[:3], after)} == {200}
    assert all(isinstance(error, asyncio.CancelledError) for error in done[3:])
    assert len(predicted) == 4


def test_images_of_a_size_go_together(started, body):
    async def ask():
        replica = await started()
        replica.segmenter.batch_size, batches = 3, []
        predict = replica._predict

        async def spy(ratio, loaded, learn=True):
            batches.append([item[0].shape[:2] for item in loaded])
            return await predict(ratio, loaded, learn)
        replica._predict = spy
        other = cv2.imencode('.png', np.zeros((64, 64, 3), np.uint8))[1].tobytes()
        sent = [body, other, body, body, body, other]
        answers = await asyncio.gather(*(ask_for(replica, each) for each in sent))
        return [pixels(answer) for answer in answers], batches

    masks, batches = asyncio.run(ask())
    assert [mask.shape for mask in masks] == [(96, 128), (64, 64), (96, 128), (96, 128), (96, 128),
                                              (64, 64)]
    assert all((mask == masks[0]).all() for mask in masks if mask.shape == (96, 128))
    assert sum(map(len, batches)) == 6
    assert max(map(len, batches)) > 1
    assert all(len(set(batch)) == 1 for batch in batches)


@pytest.mark.parametrize('lasting', [False, True])
def test_a_defect_is_told_and_a_lasting_one_ends_the_process(started, body, lasting, monkeypatch):
    ended = []
    monkeypatch.setattr(replicas.os, '_exit', ended.append)

    async def ask():
        replica = await started()
        predict, calls = replica.segmenter.predict_loaded, []

        def fail(window):
            calls.append(window)
            if lasting or len(calls) == 1:
                raise RuntimeError('CUDA error')
            return predict(window)
        replica.segmenter.predict_loaded = fail
        with pytest.raises(RuntimeError, match='CUDA error'):
            await ask_for(replica, body)
        await replica.check_health()
        if not lasting:
            assert (await ask_for(replica, body)).status == 200

    asyncio.run(ask())
    assert ended == [1] * lasting


def test_one_that_works_no_more_is_not_healthy(started, body):
    async def ask():
        replica = await started()
        replica.queue.controller = None
        with pytest.raises(asyncio.TimeoutError):
            async with asyncio.timeout(2.):
                await ask_for(replica, body)
        with pytest.raises(AttributeError):
            await replica.check_health()

    with pytest.raises(AttributeError):  # in segment itself
        asyncio.run(ask())


def test_ratios_change_while_it_runs(started, body):
    async def ask():
        replica = await started()
        first = await replica.describe()
        await replica.reconfigure(dict(isr_ratio=['2'], deadline_ms=5000., miou={'2': 40.}))
        second, answer = await replica.describe(), await ask_for(replica, body)
        for wrong in (dict(isr_ratio=['banana']), dict(isr_ratio=['1234-12']), dict(isr_ratio=2),
                      dict(deadline_ms=0.), dict(deadline_ms='long'), dict(unknown=1)):
            await replica.reconfigure(SETTINGS | wrong)
            now = await replica.describe()
            assert now['deadline_ms'] == 5000.
            assert [entry['isr_ratio'] for entry in now['ratios']] == ['2']
        return first, second, answer

    first, second, answer = asyncio.run(ask())
    assert [entry['isr_ratio'] for entry in first['ratios']] == SETTINGS['isr_ratio']
    assert all(entry['ms'] and min(entry['ms'].values()) > 0 for entry in first['ratios'])
    assert second['deadline_ms'] == 5000.
    assert answer.isr_ratio == '2'
    assert second['ratios'][0]['miou'] == 40.


@pytest.mark.parametrize('settings', [dict(isr_ratio=[]), dict(deadline_ms=0.), dict(megapixels=0)])
def test_a_policy_that_makes_no_sense(settings):
    with pytest.raises(ConfigError, match='above 0'):
        Policy(**SETTINGS | settings)


MASK = Answer(200, b'mask', '2', 0.1, 0.2)


class Handle:
    """What a handle of Ray Serve is to the HTTP side."""

    def __init__(self, answer):
        self.segment = self.describe = self
        self.answer, self.asked = answer, []

    async def remote(self, *arguments):
        self.asked.append(arguments)
        answer = self.answer(len(self.asked)) if callable(self.answer) else self.answer
        if isinstance(answer, Exception):
            raise answer
        return answer


@contextmanager
def client_of(answer=MASK, hosts=('testserver',), **settings):
    handle = Handle(answer)
    app = front.Front(handle)
    app.reconfigure(dict(dict(hosts=hosts, token_file=None, max_upload=20, in_flight=64),
                         **settings))
    with TestClient(app.__serve_build_asgi_app__(), raise_server_exceptions=False) as client:
        client.app_of = app
        yield client, handle


def error_of(response, status):
    assert response.status_code == status
    content = response.json()
    assert content.keys() == {'error'}
    assert content['error'].keys() == {'status', 'message'}
    assert content['error']['status'] == status
    return content['error']['message']


def test_a_mask_and_its_headers():
    with client_of() as (client, handle):
        response = client.post('/segment?isr_ratio=2&deadline_ms=50', content=b'image')
        form = client.post('/segment', files={'image': ('a.png', b'image of a form')})
        text = client.get('/metrics').text
    assert response.content == b'mask'
    assert response.headers['content-type'] == 'image/png'
    assert response.headers['isr-ratio'] == '2'
    assert response.headers['server-timing'].startswith('queue;dur=100.0, compute;dur=200.0, total')
    body, wish, figures, since = handle.asked[0]
    assert (body, wish, figures) == (b'image', Wish(isr_ratio='2', deadline_ms=50.), False)
    assert 0 <= time.time() - since < 5
    assert form.status_code == 200
    assert handle.asked[1][0] == b'image of a form'
    assert 'edaformer_requests_total{isr_ratio="2",status="200"} 2.0' in text
    assert 'edaformer_seconds_sum{part="compute"} 0.4' in text


def test_json():
    with client_of(Answer(200, dict(classes=dict(sky=1.)), '2')) as (client, handle):
        response = client.post('/segment?rle=1', content=b'image',
                               headers={'Accept': 'application/json'})
        assert response.json() == dict(classes=dict(sky=1.))
        assert handle.asked[0][1:3] == (Wish(rle=True), True)
        error_of(client.post('/segment?rle=1', content=b'image'), 406)


def test_errors_have_one_shape():
    with client_of(Answer(503, 'late', wait=1.2)) as (client, _):
        response = client.post('/segment', content=b'image')
        assert error_of(response, 503) == 'late'
        assert response.headers['retry-after'] == '2'
        assert 'max_side' in error_of(client.post('/segment?max_side=x', content=b'i'), 422)
        assert 'deadline_ms' in error_of(client.post('/segment?deadline_ms=-1', content=b'i'), 422)
        assert 'ratio' in error_of(client.post('/segment?ratio=2', content=b'i'), 422)
        error_of(client.get('/nothing'), 404)
        error_of(client.get('/segment'), 405)
        form = {'Content-Type': 'multipart/form-data; boundary=x'}
        field = b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\nb\r\n--x--\r\n'
        assert 'no file' in error_of(client.post('/segment', content=field, headers=form), 400)
        assert 'boundary' in error_of(client.post('/segment', content=b'--y', headers={
            'Content-Type': 'multipart/form-data'}), 400)
        two = [('image', ('a.png', b'a')), ('image', ('b.png', b'b'))]
        assert 'Too many files' in error_of(client.post('/segment', files=two), 400)
        assert 'edaformer_requests_total{isr_ratio="",status="422"} 3.0' in (
            client.get('/metrics').text)
    with client_of(ValueError('/secret/path')) as (client, _):
        response = client.post('/segment', content=b'image')
        assert 'secret' not in error_of(response, 500)
        assert 'edaformer_requests_total{isr_ratio="",status="500"} 1.0' in (
            client.get('/metrics').text)


def test_a_body_that_is_too_large_is_not_read():
    with client_of(max_upload=0.001) as (client, handle):
        sent = []

        def chunks():
            for index in range(1000):
                sent.append(index)
                yield b'x' * 500
        assert '0.001 MB' in error_of(client.post('/segment', content=chunks()), 413)
        error_of(client.post('/segment', files={'image': b'x' * 5000}), 413)
        assert handle.asked == []


def test_a_slow_request_and_too_many(monkeypatch):
    monkeypatch.setattr(front, '_RECEIVING', 0.2)

    async def slowly():
        yield b'x'
        await asyncio.sleep(5.)

    async def ask(app):
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url='http://testserver') as client:
            return await client.post('/segment', content=slowly())

    with client_of() as (client, handle):
        assert '0.2 s to come in' in error_of(asyncio.run(ask(client.app)), 408)
    with client_of(in_flight=0) as (client, _):
        assert 'too many' in error_of(client.post('/segment', content=b'image'), 503)
    assert handle.asked == []


def test_host_names_and_tokens(tmp_path):
    (tmp_path / 'token').write_text('secret\n')
    (tmp_path / 'empty').write_text('\n')
    with client_of(hosts=('testserver', 'Name'), token_file=tmp_path / 'token') as (client, handle):
        for headers in {}, {'Authorization': 'Bearer no'}, {'Authorization': 'Basic secret'}:
            assert 'needs a token' in error_of(client.get('/model', headers=headers), 401)
        right = {'Authorization': 'Bearer secret'}
        assert client.post('/segment', content=b'i', headers=right).status_code == 200
        assert client.get('/healthz').status_code == 200
        assert client.get('/healthz', headers={'Host': 'name:80'}).status_code == 200
        for headers, message in (({'Host': 'evil.org'}, '--allow-host'), (
                {'Origin': 'http://evil.org'}, 'pages of other sites')):
            assert message in error_of(client.get('/healthz', headers=headers), 421)
        own = {'Origin': 'http://testserver'}
        assert client.get('/healthz', headers=own).status_code == 200
        settings = dict(hosts=['new'], max_upload=20, in_flight=64)
        for name in 'empty', 'missing':  # a running server keeps what it has
            client.app_of.reconfigure(settings | dict(token_file=tmp_path / name))
            assert client.get('/model', headers=right).status_code == 200
        client.app_of.reconfigure(settings | dict(token_file=None))
        assert client.get('/model', headers={'Host': 'new'}).status_code == 200
    with pytest.raises(ConfigError, match='is empty'):
        front.Front(handle).reconfigure(settings | dict(token_file=tmp_path / 'empty'))


def test_a_replica_that_dies_is_asked_again_elsewhere():
    from ray.exceptions import RayActorError
    with client_of(lambda count: RayActorError() if count == 1 else Answer(200, b'mask')
                   ) as (client, handle):
        assert client.post('/segment', content=b'image').content == b'mask'
        assert len(handle.asked) == 2
        assert 'edaformer_retries_total 1.0' in client.get('/metrics').text
    with client_of(RayActorError()) as (client, handle):
        response = client.post('/segment', content=b'image')
        assert 'no replica answers' in error_of(response, 503)
        assert response.headers['retry-after'] == '1'
        assert len(handle.asked) == 2
        error_of(client.get('/readyz'), 503)


def test_the_api_is_described():
    with client_of() as (client, _):
        paths = client.get('/openapi.json').json()['paths']
        assert paths.keys() == {'/segment', '/healthz', '/readyz', '/model', '/metrics'}
        parameters = {each['name'] for each in paths['/segment']['post']['parameters']}
        assert parameters == {'isr_ratio', 'query_ratio', 'max_side', 'deadline_ms', 'rle'}
        assert '/openapi.json' in client.get('/docs').text
        assert json.loads(client.get('/readyz').text) == dict(status='ok')
