"""The controller of the ratio: what it promises for any queue."""
import random

import pytest

from mmseg_edaformer.serve.controller import Controller, Costs, Job, Queue

RATIOS = 'none', 'optimal', '2', '4'
SECONDS = dict(zip(RATIOS, (1., 0.74, 0.53, 0.41)))
CONTROLLER = Controller(RATIOS)


def costs_of(seconds=SECONDS, pixels=10_000):
    costs = Costs()
    for ratio, value in seconds.items():
        costs.add(ratio, pixels, value)
    return costs


COSTS = costs_of()


def queues(count=300):
    """Random queues: when it is, those that wait, and the last ratio."""
    rng = random.Random(0)
    for _ in range(count):
        jobs = [Job(rng.uniform(0, 8), (100, rng.choice((50, 100, 400))),
                    rng.choice((None, None, None, '2'))) for _ in range(rng.randint(1, 8))]
        yield rng.uniform(-1, 2), sorted(jobs, key=lambda job: job.due), rng.choice(RATIOS)


def ends_of(now, jobs, ratio):
    """When each is served: means add up, and deviations as squares."""
    means, squares = 0., 0.
    for job in jobs:
        mean, deviation = COSTS.expect(job.ratio or ratio, job.pixels)
        means, squares = means + mean, squares + deviation ** 2
        yield now + means + squares ** 0.5


def level(now, jobs, last):
    return RATIOS.index(CONTROLLER.choose(now, jobs, COSTS, last))


def test_who_waits_alone_gets_the_trained_model_if_it_is_in_time():
    seconds, size = COSTS.seconds('none', 10_000), (100, 100)
    for last in RATIOS:
        assert CONTROLLER.choose(5., [Job(5.001 + seconds, size, None)], COSTS, last) == 'none'
        assert CONTROLLER.choose(5., [Job(4.999 + seconds, size, None)], COSTS, last) == 'optimal'


def test_all_are_in_time_with_the_ratio_unless_none_is_faster():
    for now, jobs, last in queues():
        ratio = CONTROLLER.choose(now, jobs, COSTS, last)
        if any(end > job.due for end, job in zip(ends_of(now, jobs, ratio), jobs)):
            assert ratio == '4' or all(job.ratio for job in jobs)


def test_no_more_is_reduced_than_needed():
    eager = Controller(RATIOS, reserve=0., calm=0.)
    for now, jobs, last in queues():
        chosen = RATIOS.index(eager.choose(now, jobs, COSTS, last))
        for ratio in RATIOS[:chosen]:
            assert any(end > job.due for end, job in zip(ends_of(now, jobs, ratio), jobs))


def test_more_load_never_reduces_less():
    for now, jobs, last in queues():
        before = level(now, jobs, last)
        more = sorted([*jobs, Job(jobs[-1].due + 0.5, (100, 100), None)], key=lambda job: job.due)
        assert level(now, more, last) >= before
        assert level(now + 0.3, jobs, last) >= before
        larger = [Job(job.due, (100, 2 * job.size[1]), job.ratio) for job in jobs]
        assert level(now, larger, last) >= before


def test_the_last_ratio_makes_it_calm():
    jobs = [Job(2.9, (100, 100), None), Job(3.3, (100, 100), None)]
    assert level(0., jobs, 'none') < level(0., jobs, '4')
    for now, jobs, _ in queues():
        assert level(now, jobs, '4') >= level(now, jobs, 'none')


def test_the_late_are_those_that_the_floor_does_not_save():
    for now, jobs, _ in queues():
        late, kept = CONTROLLER.find_late(now, jobs, COSTS), []
        for job in jobs:
            *_, end = ends_of(now, [*kept, job], '4')
            assert (end > job.due) == (job in late)
            kept += [job] if job not in late else []
        assert CONTROLLER.find_late(now, kept, COSTS) == []


def test_costs_follow_the_machine():
    costs = costs_of()
    before = costs.seconds('2', 10_000)
    assert 0.53 < before < 0.53 * 1.2
    for _ in range(40):
        costs.add('2', 10_500, 2 * 0.53 * 1.05)
    assert costs.seconds('2', 10_000) == pytest.approx(2 * 0.53, rel=0.01)
    assert costs.seconds('none', 10_000) == COSTS.seconds('none', 10_000)
    noisy = costs_of()
    for index in range(40):
        noisy.add('2', 10_000, 0.53 + 0.2 * (index % 2))
    assert noisy.seconds('2', 10_000) > 0.68


def test_one_stall_does_not_make_a_ratio_too_slow():
    costs = costs_of()
    costs.add('none', 10_000, 100.)
    assert costs.seconds('none', 10_000) < 2 * COSTS.seconds('none', 10_000)


def test_costs_of_sizes_that_were_never_seen():
    costs = costs_of()
    costs.add('2', 160_000, 12.)
    assert costs.seconds('2', 1_000_000) == pytest.approx(costs.seconds('2', 160_000) * 6.25)
    assert costs.seconds('2', 5_000) == pytest.approx(costs.seconds('2', 10_000) / 2)
    assert costs.seconds('auto', 5_000) == 0.
    table = costs.table()['2']  # by side, of about 100 and 400
    assert list(table) == [108, 431]
    assert table[431] == pytest.approx(12_000 * 431 ** 2 / 160_000, rel=0.01)


def test_a_coarse_ratio_that_is_slow_here_is_not_taken():
    costs = costs_of(dict(SECONDS, **{'4': 2.}))
    jobs = [Job(0.7, (100, 100), None) for _ in range(3)]
    assert CONTROLLER.choose(0., jobs, costs) == '2'
    assert CONTROLLER.find_late(0., jobs, costs) == jobs[1:]
    assert len(CONTROLLER.find_late(0., [Job(1.9, (100, 100), '4')], costs)) == 1


@pytest.mark.parametrize('most', [1, 3])
def test_who_is_admitted_is_in_time_if_images_take_what_is_expected(most):
    rng, queue, now, end = random.Random(1), Queue(CONTROLLER, COSTS), 0., 0.
    admitted, served, batches = [], [], 0
    while now < 2000:
        now += rng.expovariate(2.5)
        while end <= now and queue.waiting:
            assert not queue.drop_late(end)
            ratio, jobs = queue.take(end, most)
            batches += 1
            end += len(jobs) * COSTS.expect(ratio, jobs[0].pixels)[0]
            assert queue.free >= end
            queue.free = end
            assert {(job.size, job.ratio) for job in jobs} == {(jobs[0].size, jobs[0].ratio)}
            assert all(end <= job.due + 1e-9 for job in jobs)
            served += jobs
        end = max(end, now)
        job = Job(now + rng.uniform(0.2, 6), (100, rng.choice((50, 100))), rng.choice((None, '2')))
        wait = queue.wait(now)
        if queue.admit(now, job):
            admitted.append(job)
            assert queue.wait(now) > wait
    assert len(admitted) > 2000
    assert {*served} | {*queue.waiting} == {*admitted}
    assert (batches < 0.9 * len(served)) == (most > 1)


def test_who_is_late_after_all_is_dropped():
    queue = Queue(CONTROLLER, COSTS)
    jobs = [Job(due, (100, 100), None) for due in (1., 2., 3.)]
    assert all(queue.admit(0., job) for job in jobs)
    assert not queue.admit(0., Job(0.3, (100, 100), None))
    assert queue.drop_late(1.7) == jobs[:2]
    assert queue.waiting == jobs[2:]


def test_what_seemed_too_slow_without_a_queue_is_in_doubt():
    queue, job, other = (Queue(CONTROLLER, COSTS), Job(0.6, (100, 100), None),
                         Job(0.3, (100, 100), '2'))
    assert queue.admit(0., job)
    assert queue.take(0.) == ('2', [job])
    assert queue.doubt == ('none', job)
    assert not queue.admit(0.1, other)  # the model is busy
    assert queue.doubt == ('none', job)
    assert not queue.admit(5., other)
    assert queue.doubt == ('2', other)
