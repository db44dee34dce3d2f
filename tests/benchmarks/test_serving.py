"""The simulation of the server, and the bursts that it is measured with."""
import numpy as np
import pytest

from benchmarks import serving
from benchmarks.serving import Controller, draw_arrivals, simulate, summarise

SECONDS = dict(none=1., optimal=0.74, **{'2': 0.53, '4': 0.41})
CONTROLLER = Controller(tuple(SECONDS))


def test_arrivals_have_their_rate_and_come_in_bursts():
    arrivals = np.array(draw_arrivals(20_000, 1.2))
    assert arrivals[-1] == pytest.approx(20_000 / 1.2, rel=0.05)
    assert draw_arrivals(50, 1.2) == draw_arrivals(50, 1.2)
    counts = np.histogram(arrivals, np.arange(0, arrivals[-1], 2.))[0]
    assert counts.var() > 1.5 * counts.mean()  # 1 for a Poisson process


def test_every_request_gets_one_reply():
    for replicas in 1, 3:
        arrivals = draw_arrivals(500, 1.5 * replicas)
        replies = simulate(arrivals, SECONDS, 4., controller=CONTROLLER, replicas=replicas)
        assert len(replies) == 500
        assert 0 < sum(reply.latency is None for reply in replies) < 250
        assert {reply.ratio for reply in replies if reply.latency} == {*SECONDS}


def test_nothing_is_reduced_or_refused_when_idle():
    replies = simulate([3. * index for index in range(50)], SECONDS, 4., controller=CONTROLLER)
    assert {reply.ratio for reply in replies} == {'none'}
    assert max(reply.latency for reply in replies) < 1.3


def test_a_fixed_ratio_refuses_nothing_and_is_late():
    replies = simulate(draw_arrivals(1000, 1.2), dict(none=1.), 4.)
    assert all(reply.latency for reply in replies)
    assert summarise(replies, 4.)['in_time'] < 50


def test_the_controller_is_in_time_at_more_than_the_capacity():
    arrivals = draw_arrivals(2000, 1.2)
    kept = summarise(simulate(arrivals, SECONDS, 4., controller=CONTROLLER), 4.)
    assert kept['in_time'] > 95
    refusing = summarise(simulate(arrivals, SECONDS, 4., controller=Controller(('none',))), 4.)
    assert refusing['in_time'] < 75
    many = summarise(simulate(draw_arrivals(8000, 1.2 * 100), SECONDS, 4., controller=CONTROLLER,
                              replicas=100), 4.)
    assert many['in_time'] > 85  # bursts bring 1.5 times what all can do


def test_one_request_at_a_time_is_as_late_as_by_hand():
    replies = simulate([0., 0.5, 0.6], dict(none=1.), 10., noise=0., overhead=0.25)
    assert [reply.latency for reply in replies] == pytest.approx([1.25, 1.75, 2.65])


def test_images_of_several_sizes_take_their_share():
    replies = simulate([0., 5., 10.], dict(none=1.), 20., noise=0., sides=(100, 200))
    assert [reply.latency for reply in replies] == pytest.approx([0.4, 1.6, 0.4])


def test_areas_are_those_of_the_masks(tmp_path):
    import io

    from PIL import Image
    truth = np.random.default_rng(0).integers(8, size=(20, 30), dtype=np.uint8)
    mask = np.random.default_rng(1).integers(8, size=(20, 30), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(mask).save(file, 'PNG')
    areas = serving._areas(file.getvalue(), truth)
    for index in range(8):
        assert areas[0, index] == ((mask == index) & (truth == index)).sum()
        assert areas[1, index] == ((mask == index) | (truth == index)).sum()
