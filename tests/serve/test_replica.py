"""A replica and the HTTP side in this process, without Ray."""
import asyncio
import io
import json
import time
from contextlib import contextmanager

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip('ray.serve')
from starlette.testclient import TestClient

from mmseg_edaformer.errors import ConfigError
from mmseg_edaformer.predict.segmenter import Segmenter
from mmseg_edaformer.serve import replica as replicas
from mmseg_edaformer.serve.front import Front
from mmseg_edaformer.serve.messages import Answer, Policy, Wish
from mmseg_edaformer.serve.replica import Replica

SETTINGS = dict(isr_ratio=['none', '2', '4'], deadline_ms=60_000.)


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
        replica.controller = replicas.Controller(tuple((SETTINGS | settings)['isr_ratio']))
        return replica
    return start


def pixels(answer):
    assert answer.status == 200, answer
    return np.array(Image.open(io.BytesIO(answer.content)))


def test_masks_are_those_of_predict(started, segmenter, body, tmp_path):
    (tmp_path / 'a.png').write_bytes(body)

    async def ask():
        replica = await started(overrides=True)
        return [await replica.segment(body, Wish(*wish), 0.) for wish in (
            (), ('2',), ('2', '2'), (None, None, 64))]

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
        return [await replica.segment(body, Wish(json=json, rle=json), 0.5)
                for json in (False, True)]

    mask, answer = asyncio.run(ask())
    content, labels = answer.content, pixels(mask)
    assert content['isr_ratio'] == 'none'
    assert content['size'] == [96, 128]
    assert content['queue_ms'] > 500
    assert content['compute_ms'] > 0
    assert sum(content['classes'].values()) == pytest.approx(1, abs=1e-5)
    assert content['masks'].keys() == content['classes'].keys()
    total = np.zeros((96, 128), int)
    for name, runs in ((name, mask['counts']) for name, mask in content['masks'].items()):
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
        for ratio, seconds in ('none', 1.), ('2', 0.5), ('4', 0.3):
            for _ in range(60):
                replica.costs.add(ratio, 96 * 128, seconds)
        replica.controller = replicas.Controller(('none', '2', '4'), reserve=0., calm=0.)
        replica.costs.add = lambda *_: None
        tasks = [asyncio.create_task(replica.segment(body, Wish(), spent))
                 for spent in (57.8, 57.8, 57.8, 57.8, 57.8, 57.8, 57.8, 57.8)]
        answers = await asyncio.gather(*tasks)
        return answers, await replica.segment(body, Wish(), 0.)

    answers, after = asyncio.run(ask())
    assert after.isr_ratio == 'none'
    assert '4' in {answer.isr_ratio for answer in answers}
    refused = [answer for answer in answers if answer.status == 503]
    assert refused
    assert all(answer.wait >= 1 for answer in refused)
    assert 'ask again later' in refused[0].content


def test_refused_at_once(started, body):
    async def ask():
        replica = await started(in_flight=2, overrides=True)
        start = time.monotonic()
        late = await replica.segment(body, Wish(deadline_ms=0.01), 0.)
        took = time.monotonic() - start
        many = await asyncio.gather(*(replica.segment(body, Wish(), 0.) for _ in range(5)))
        return late, took, [answer.status for answer in many], replica

    late, took, many, replica = asyncio.run(ask())
    assert late.status == 503
    assert 'within the deadline' in late.content
    assert took < 5
    assert sorted(many) == [200, 200, 503, 503, 503]
    assert replica.held == 0
    assert replica.waiting == []


@pytest.mark.parametrize(('content', 'wish', 'message'), [
    (b'', Wish(), 'it is empty'),
    (b'no image at all', Wish(), 'format is unknown'),
    ('half', Wish(), 'of the request'),
    ('large', Wish(), 'has 96x4000 pixels, more than 100000'),
    (None, Wish('banana'), 'cannot parse isr_ratio'),
    (None, Wish('1234-12'), 'has 2 multipliers for the decoder'),
    (None, Wish(max_side=512), 'give 32 to 256'),
])
def test_what_cannot_be_answered(started, body, content, wish, message):
    if content == 'half':
        content = body[:len(body) // 2]
    elif content == 'large':
        content = cv2.imencode('.png', np.zeros((4000, 96, 3), np.uint8))[1].tobytes()

    async def ask():
        replica = await started(overrides=True, megapixels=0.1)
        return [await replica.segment(*question, 0.) for question in (
            (body if content is None else content, wish), (body, Wish()))]

    answer, next_one = asyncio.run(ask())
    assert answer.status == 422
    assert message in answer.content
    assert '/tmp' not in answer.content
    assert next_one.status == 200


def test_overrides_are_for_who_is_allowed(started, body):
    async def ask():
        replica = await started()
        return [await replica.segment(body, wish, 0.) for wish in (
            Wish('2'), Wish(query_ratio='2'), Wish(max_side=64), Wish(deadline_ms=5.))]

    assert {(answer.status, 'chooses' in answer.content) for answer in asyncio.run(ask())} == {
        (422, True)}


def test_who_leaves_costs_nothing(started, body):
    async def ask():
        replica = await started()
        tasks = [asyncio.create_task(replica.segment(body, Wish(), 0.)) for _ in range(6)]
        await asyncio.sleep(0.05)
        for task in tasks[1:]:
            task.cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        return done, await replica.segment(body, Wish(), 0.), replica

    done, after, replica = asyncio.run(ask())
    assert done[0].status == after.status == 200
    assert all(isinstance(error, asyncio.CancelledError) for error in done[1:])
    assert replica.held == 0


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
        answers = await asyncio.gather(*(replica.segment(each, Wish(), 0.) for each in sent))
        return [pixels(answer) for answer in answers], batches

    masks, batches = asyncio.run(ask())
    assert [mask.shape for mask in masks] == [(96, 128), (64, 64), (96, 128), (96, 128), (96, 128),
                                              (64, 64)]
    assert all((mask == masks[0]).all() for mask in masks if mask.shape == (96, 128))
    assert sum(map(len, batches)) == 6
    assert max(map(len, batches)) > 1
    assert all(len(set(batch)) == 1 for batch in batches)


@pytest.mark.parametrize('lasting', [False, True])
def test_a_defect_is_told_and_a_lasting_one_replaces_the_replica(started, body, lasting):
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
            await replica.segment(body, Wish(), 0.)
        if lasting:
            with pytest.raises(RuntimeError, match='cannot predict any more: CUDA error'):
                await replica.check_health()
        else:
            await replica.check_health()
            assert (await replica.segment(body, Wish(), 0.)).status == 200

    asyncio.run(ask())


def test_ratios_change_while_it_runs(started, body):
    async def ask():
        replica = await started()
        first = await replica.describe()
        await replica.reconfigure(dict(isr_ratio=['2'], deadline_ms=5000., miou={'2': 40.}))
        return first, await replica.describe(), await replica.segment(body, Wish(), 0.)

    first, second, answer = asyncio.run(ask())
    assert [entry['isr_ratio'] for entry in first['ratios']] == ['none', '2', '4']
    assert all(entry['ms'] and min(entry['ms'].values()) > 0 for entry in first['ratios'])
    assert second['deadline_ms'] == 5000.
    assert answer.isr_ratio == '2'
    assert second['ratios'][0]['miou'] == 40.


@pytest.mark.parametrize('settings', [dict(isr_ratio=[]), dict(deadline_ms=0.), dict(in_flight=0)])
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
def client_of(answer=MASK, **settings):
    handle = Handle(answer)
    front = Front(handle, **settings)
    with TestClient(front.__serve_build_asgi_app__(), raise_server_exceptions=False) as client:
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
    body, wish, spent = handle.asked[0]
    assert (body, wish[:4]) == (b'image', ('2', None, None, 50.))
    assert 0 <= spent < 5
    assert form.status_code == 200
    assert handle.asked[1][0] == b'image of a form'
    assert 'edaformer_requests_total{isr_ratio="2",status="200"} 2.0' in text
    assert 'edaformer_seconds_sum{part="compute"} 0.4' in text


def test_json():
    with client_of(Answer(200, dict(classes=dict(sky=1.)), '2')) as (client, handle):
        response = client.post('/segment?rle=1', content=b'image',
                               headers={'Accept': 'application/json'})
        assert response.json() == dict(classes=dict(sky=1.))
        assert handle.asked[0][1][4:] == (True, True)
        error_of(client.post('/segment?rle=1', content=b'image'), 406)


def test_errors_have_one_shape():
    with client_of(Answer(503, 'late', wait=1.2)) as (client, _):
        response = client.post('/segment', content=b'image')
        assert error_of(response, 503) == 'late'
        assert response.headers['retry-after'] == '2'
        assert 'max_side' in error_of(client.post('/segment?max_side=x', content=b'i'), 422)
        assert 'deadline_ms' in error_of(client.post('/segment?deadline_ms=-1', content=b'i'), 422)
        error_of(client.get('/nothing'), 404)
        error_of(client.get('/segment'), 405)
        form = {'Content-Type': 'multipart/form-data; boundary=x'}
        field = b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\nb\r\n--x--\r\n'
        assert 'no file' in error_of(client.post('/segment', content=field, headers=form), 400)
        assert 'cannot be read' in error_of(
            client.post('/segment', content=b'--y', headers={'Content-Type': 'multipart/form-data'}
                        ), 400)
    with client_of(ValueError('/secret/path')) as (client, _):
        response = client.post('/segment', content=b'image')
        assert 'secret' not in error_of(response, 500)


def test_a_body_that_is_too_large_is_not_read():
    with client_of(body_mb=0.001) as (client, handle):
        sent = []

        def chunks():
            for index in range(1000):
                sent.append(index)
                yield b'x' * 500
        assert '0.001 MB' in error_of(client.post('/segment', content=chunks()), 413)
        error_of(client.post('/segment', files={'image': b'x' * 5000}), 413)
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
        assert '--allow-host' in error_of(client.get('/healthz', headers={'Host': 'evil.org'}), 421)
    with pytest.raises(ConfigError, match='is empty'):
        Front(handle, token_file=tmp_path / 'empty')


def test_a_replica_that_dies_is_asked_again_elsewhere():
    from ray.exceptions import RayActorError
    with client_of(lambda count: RayActorError() if count == 1 else Answer(200, b'mask')
                   ) as (client, handle):
        assert client.post('/segment', content=b'image').content == b'mask'
        assert len(handle.asked) == 2
        assert 'edaformer_retries_total 1.0' in client.get('/metrics').text
    with client_of(RayActorError()) as (client, handle):
        error_of(client.post('/segment', content=b'image'), 500)
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
