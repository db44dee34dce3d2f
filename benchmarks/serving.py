"""Measure a server that keeps its deadline, against fixed ratios and a simulation.

``python -m benchmarks.serving MODEL``, from the repository, where MODEL knows the drawn scenes. It
starts a server on this machine, and sends it the same bursts in each mode.
"""
import argparse
import asyncio
import heapq
import json
import math
import random
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmseg_edaformer.errors import clear_errors
from mmseg_edaformer.serve.controller import Controller, Costs, Job, Queue

LOADS = 0.5, 0.8, 1., 1.2, 1.5
RATIOS = 'none', 'optimal', '2', '4', '4+q4'
PATIENCE = 4.
"""The deadline, in times of a request at none."""
BURST, SHARE, LENGTH = 3., 0.1, 2.
"""Bursts of this many times the mean rate; their share of the time; their mean length, in times of
a request at none."""
_SCENES = 16  # of each size
_EVER = 1e8  # ms: the deadline of a server that never refuses


def draw_arrivals(count: int, rate: float, seed: int = 0) -> list[float]:
    """Return arrivals of a Poisson process with bursts; the unit is a request's time at none."""
    rng = random.Random(seed)
    calm, now = rate * (1 - BURST * SHARE) / (1 - SHARE), 0.
    arrivals: list[float] = []
    bursting, change = False, rng.expovariate(SHARE / (LENGTH * (1 - SHARE)))
    while len(arrivals) < count:
        step = rng.expovariate(BURST * rate if bursting else calm)
        if now + step < change:
            now += step
            arrivals.append(now)
            continue
        now, bursting = change, not bursting
        change += rng.expovariate(1 / LENGTH if bursting else SHARE / (LENGTH * (1 - SHARE)))
    return arrivals


@dataclass
class Reply:
    """What a request got: a latency in seconds, None if it was refused, and a ratio.

    ``compute`` is the part of the latency in which it was computed, and ``outside`` that in which
    it neither was nor waited for that.
    """
    latency: float | None
    ratio: str = ''
    compute: float = 0.
    outside: float = 0.
    areas: Any = None  # intersections and unions of the classes


@dataclass(eq=False)
class _Job(Job):
    came: float
    index: int


def simulate(arrivals: Sequence[float], seconds: Mapping[str, float], deadline: float, *,
             controller: Controller | None = None, replicas: int = 1, noise: float = 0.05,
             overhead: float = 0., sides: Sequence[int] = (512,), seed: int = 0) -> list[Reply]:
    """Return what requests get from replicas whose images take ``seconds`` at each ratio.

    Without a controller, all get the first ratio and none is refused. A request goes to the shorter
    queue of two that are drawn, as Ray Serve does it. ``noise`` is the relative deviation of the
    seconds, ``overhead`` what passes outside the queue. Images are squares of these ``sides`` in
    turn, whose seconds are in proportion to their pixels.
    """
    rng = random.Random(seed)
    patience = deadline - overhead if controller else math.inf
    of_pixel = len(sides) / sum(side ** 2 for side in sides)
    queues: list[Queue[_Job]] = []
    for _ in range(replicas):
        queues.append(Queue(controller or Controller((next(iter(seconds)),)), Costs()))
        for ratio, value in seconds.items():
            for side in sides:
                queues[-1].costs.add(ratio, side ** 2, value * of_pixel * side ** 2)
    replies, busy = [Reply(None) for _ in arrivals], [False] * replicas
    events: list[tuple[float, int, int]] = [(at, index, -1) for index, at in enumerate(arrivals)]
    heapq.heapify(events)
    while events:
        now, index, number = heapq.heappop(events)
        if number < 0:
            number = min(rng.sample(range(replicas), min(2, replicas)),
                         key=lambda number: len(queues[number].waiting) + busy[number])
            side = sides[index % len(sides)]
            queues[number].admit(now, _Job(now + patience, (side, side), None, now, index))
        else:
            busy[number], queues[number].free = False, now
        queue = queues[number]
        if busy[number]:
            continue
        queue.drop_late(now)
        if queue.waiting:
            ratio, (job,) = queue.take(now)
            took = seconds[ratio] * of_pixel * job.pixels * max(0.5, rng.gauss(1., noise))
            queue.costs.add(ratio, job.pixels, took)
            busy[number] = True
            replies[job.index] = Reply(now + took - job.came + overhead, ratio)
            heapq.heappush(events, (now + took, len(arrivals), number))
    return replies


class Scene(NamedTuple):
    """A drawn image as a JPEG, and its labels."""
    body: bytes
    labels: np.ndarray


def draw_scenes(sizes: Sequence[int]) -> list[Scene]:
    """Draw squares of these sizes in turn, whose objects have as many pixels as at 512."""
    import cv2

    from mmseg_edaformer.data.drawing import draw_scene
    scenes = []
    for index in range(_SCENES):
        for size in sizes:
            image, labels = draw_scene(np.random.default_rng((1, index)), (size, size), 512 / size)
            body = cv2.imencode('.jpg', image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])[1]
            scenes.append(Scene(body.tobytes(), labels))
    return scenes


async def send(address: str, scenes: Sequence[Scene], arrivals: Sequence[float]) -> list[Reply]:
    """Send scenes at these seconds, whatever the answers do."""
    import aiohttp
    replies = [Reply(None) for _ in arrivals]
    start = time.perf_counter()
    masks: dict[int, bytes] = {}

    async def ask(index: int, at: float) -> None:
        await asyncio.sleep(start + at - time.perf_counter())
        sent = time.perf_counter()
        async with session.post(f'{address}/segment', data=scenes[index % len(scenes)].body
                                ) as response:
            body = await response.read()
            if response.status == 200:
                latency, timing = time.perf_counter() - sent, response.headers['Server-Timing']
                inside = [float(ms) / 1e3 for ms in re.findall(r'dur=([\d.]+)', timing)][:2]
                replies[index] = Reply(latency, response.headers['ISR-Ratio'],
                                       inside[1], latency - sum(inside))
                masks[index] = body
            elif response.status not in (408, 503):
                raise RuntimeError(f'{response.status}: {body!r}')

    timeout = aiohttp.ClientTimeout(total=arrivals[-1] + 600)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)
                                     ) as session:
        await asyncio.gather(*(ask(index, at) for index, at in enumerate(arrivals)))
    for index, body in masks.items():
        replies[index].areas = _areas(body, scenes[index % len(scenes)].labels)
    return replies


def _areas(mask: bytes, truth: np.ndarray) -> np.ndarray:
    import io

    from PIL import Image
    labels, count = np.array(Image.open(io.BytesIO(mask))), 8
    hit = labels[labels == truth]
    areas = [np.bincount(values.ravel(), minlength=256)[:count] for values in (hit, labels, truth)]
    return np.stack([areas[0], areas[1] + areas[2] - areas[0]])


def summarise(replies: Sequence[Reply], deadline: float) -> dict[str, Any]:
    """Return figures of one run."""
    from mmseg_edaformer.analysis.bench import mean_iou
    latency = [reply.latency for reply in replies if reply.latency is not None]
    kept = [reply for reply in replies if (reply.latency or math.inf) <= deadline]
    areas = [reply.areas for reply in kept if reply.areas is not None]
    counts = Counter(reply.ratio for reply in kept)
    return dict(
        in_time=100 * len(kept) / len(replies), refused=len(replies) - len(latency),
        **{f'p{q}': float(1e3 * np.percentile(latency or [math.nan], q)) for q in (50, 95, 99)},
        miou=float(mean_iou(sum(areas))) if areas else None,
        ratios={ratio: count / len(kept) for ratio, count in counts.most_common()})


MODES: dict[str, dict[str, Any]] = {
    **{f'always {ratio}': dict(isr_ratio=[ratio], deadline_ms=_EVER) for ratio in RATIOS[:4]},
    'controller': dict(isr_ratio=[*RATIOS])}
"""What is compared: policies of the server. The first ones never refuse a request."""


class Bench:
    """A server on this machine, and scenes of some sizes for it."""

    def __init__(self, model: dict[str, Any], replicas: int, port: int) -> None:
        self.model, self.replicas, self.port = model, replicas, port
        self.address = f'http://127.0.0.1:{port}'

    def settings(self, policy: dict[str, Any]) -> dict[str, Any]:
        """Return the config of a server with a policy."""
        from mmseg_edaformer import serve
        return serve.config(self.model, policy, port=self.port, in_flight=10 ** 4,
                            replicas=(self.replicas,) * 2)

    def run(self, scenes: Sequence[Scene], policy: dict[str, Any], arrivals: Sequence[float]
            ) -> list[Reply]:
        """Send scenes to a server with a policy."""
        from mmseg_edaformer import serve
        serve.deploy(self.settings(policy))
        return asyncio.run(send(self.address, scenes, arrivals))

    def request_seconds(self, scenes: Sequence[Scene], ratio: str = 'none') -> float:
        """Return what computing a request takes while all replicas are busy."""
        count = 12 * self.replicas  # as many of each size, if there are up to four
        policy = dict(isr_ratio=[ratio], deadline_ms=_EVER)
        replies = self.run(scenes, policy, [0.] * count)
        return float(np.mean([reply.compute for reply in replies]))


def tabulate(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the tables of a measurement, one for each kind of images, in Markdown."""
    lines = []
    for sizes in dict.fromkeys(row['sizes'] for row in rows):
        of_sizes = [row for row in rows if row['sizes'] == sizes]
        times = ', '.join(f'{ratio} {1e3 * value:.0f}'
                          for ratio, value in of_sizes[0]['seconds'].items())
        lines += [f'\n**{sizes.replace(",", ", ")} pixels**, deadline '
                  f'{1e3 * of_sizes[0]["deadline"]:.0f} ms; ms of a request: {times}\n',
                  '| load | | in time | simulated: as here, 8, 100 replicas | refused | p50 | p95 '
                  '| p99 ms | mIoU | ratios of those in time |', '|---' * 10 + '|']
        for row in of_sizes:
            simulated = row.get('simulated')
            ratios = ', '.join(f'{ratio} {100 * share:.0f} %'
                               for ratio, share in row['ratios'].items())
            miou = '' if row['miou'] is None else f'{row["miou"]:.2f}'
            latency = ' | '.join(f'{row[name]:.0f}' for name in ('p50', 'p95', 'p99'))
            expected = ', '.join(f'{value:.1f}' for value in (simulated or {}).values())
            lines.append(f'| {row["load"]:g} | {row["mode"]} | {row["in_time"]:.1f} % | '
                         f'{expected} | {row["refused"]} | {latency} | {miou} | '
                         f'{ratios if row["mode"] == "controller" else ""} |')
    return '\n'.join(lines) + '\n'


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the share in time and the mIoU over the load, a column for each kind of images."""
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot as plt
    kinds = list(dict.fromkeys(row['sizes'] for row in rows))
    figure, axes = plt.subplots(2, len(kinds), figsize=(4 * len(kinds), 6), sharex=True,
                                squeeze=False, layout='constrained')
    for column, sizes in enumerate(kinds):
        for index, mode in enumerate(MODES):
            chosen = [row for row in rows if (row['sizes'], row['mode']) == (sizes, mode)]
            style = dict(color='black', linewidth=2.5) if mode == 'controller' else dict(
                color=f'C{index}', linewidth=1)
            for line, name in zip(axes[:, column], ('in_time', 'miou')):
                line.plot([row['load'] for row in chosen], [row[name] for row in chosen],
                          marker='o', markersize=4, label=mode, **style)
        axes[0, column].set_title(f'{sizes.replace(",", ", ")} pixels')
        axes[0, column].axhline(95, color='grey', linestyle=':')
        axes[1, column].set_xlabel('load, of the computing time at none')
    axes[0, 0].set_ylabel('answers in time, %')
    axes[1, 0].set_ylabel('mIoU of those in time')
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def expect(seconds: Mapping[str, float], deadline: float, load: float, replicas: int,
           controlled: bool, overhead: float, requests: int, sides: Sequence[int]) -> float:
    """Return the share in time that the simulation expects, in percent."""
    arrivals = [seconds['none'] * at for at in draw_arrivals(requests, load * replicas)]
    return float(summarise(simulate(
        arrivals, seconds, deadline, replicas=replicas, overhead=overhead, sides=sides,
        controller=Controller(tuple(seconds)) if controlled else None), deadline)['in_time'])


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('model', help='what tools/serve.py takes as --model')
    parser.add_argument('--sizes', nargs='+', default=['512', '1024', '384,512,768'], metavar='N,N',
                        help='sides of the images of each table (default: 512 1024 384,512,768)')
    parser.add_argument('--loads', nargs='+', type=float, default=LOADS, metavar='L',
                        help='loads: requests in the time that the replicas need to compute one '
                        'each at none (default: 0.5 to 1.5)')
    parser.add_argument('--requests', type=int, default=120, metavar='N',
                        help='requests at each load, at most 1000 (default: 120)')
    parser.add_argument('--replicas', type=int, default=2, metavar='N')
    parser.add_argument('--port', type=int, default=8199)
    parser.add_argument('--out', type=Path, default=Path('work_dirs/serving'), metavar='DIR',
                        help='folder for serving.json, .md and .png (%(default)s)')
    args = parser.parse_args(argv)
    args.requests = min(args.requests, 1000)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    from mmseg_edaformer import serve
    bench = Bench(dict(model=args.model, device='cpu'), args.replicas, args.port)
    rows: list[dict[str, Any]] = []
    with serve.started(bench.settings(MODES['controller'] | dict(deadline_ms=_EVER))):
        for sizes in args.sizes:
            sides = [int(size) for size in sizes.split(',')]
            scenes = draw_scenes(sides)
            for _ in range(2):  # after which all that Ray starts has started
                seconds = {ratio: bench.request_seconds(scenes, ratio) for ratio in RATIOS}
            unit = seconds['none']
            print(sizes, {ratio: round(value, 3) for ratio, value in seconds.items()}, flush=True)
            overhead = 0.
            for load in args.loads:
                arrivals = draw_arrivals(args.requests, load * args.replicas)
                for mode, policy in MODES.items():
                    deadline = PATIENCE * unit
                    replies = bench.run(scenes, dict(deadline_ms=1e3 * deadline) | policy,
                                        [unit * at for at in arrivals])
                    overhead = overhead or float(np.median([one.outside for one in replies]))
                    row = dict(sizes=sizes, load=load, mode=mode, deadline=deadline,
                               seconds=seconds, overhead=overhead) | summarise(replies, deadline)
                    if mode in ('always none', 'controller'):
                        row['simulated'] = {number: expect(
                            seconds, deadline, load, number, mode == 'controller', overhead,
                            args.requests if number == args.replicas else 200 * number, sides)
                            for number in (args.replicas, 8, 100)}
                    rows.append(row)
                    print(json.dumps({key: row[key] for key in (
                        'load', 'mode', 'in_time', 'miou', 'p95', 'ratios')}), flush=True)
                    args.out.mkdir(parents=True, exist_ok=True)
                    (args.out / 'serving.json').write_text(json.dumps(rows, indent=1))
    rows.sort(key=lambda row: (args.sizes.index(row['sizes']), row['load']))
    (args.out / 'serving.md').write_text(tabulate(rows))
    plot(rows, args.out / 'serving.png')


if __name__ == '__main__':
    with clear_errors():
        main()
