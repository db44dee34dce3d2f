"""Long checks that a run survives kills and does not grow: `make soak`."""
import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, init_default_scope
from mmseg.apis import inference_model
from mmseg.registry import MODELS

from mmseg_edaformer.engine import checkpoint_hook, find_checkpoint
from mmseg_edaformer.files import replacing
from tests.conftest import segmentor_config
from tests.engine.training import OPTIONS, differences, run_to_end, state, train
from tests.processes import finish, free_port, in_child

pytestmark = pytest.mark.soak
INTERVAL = OPTIONS['default_hooks.checkpoint.interval']


@HOOKS.register_module()
class NoteHook(Hook):
    """Note every finished iteration in a file, before it is saved."""

    priority = 'HIGH'

    def __init__(self, path):
        self.path = path

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.rank == 0:
            Path(self.path).write_text(str(runner.iter + 1))


def die_in_write(number, stage):
    """SIGKILL oneself in the given write of a checkpoint, half or all of it on the disk."""
    put, count = checkpoint_hook.SafeLocalBackend.put, 0

    def deadly_put(self, obj, filepath):
        nonlocal count
        count += str(filepath).endswith('.pth')
        if count < number or not str(filepath).endswith('.pth'):
            return put(self, obj, filepath)
        if stage == 'renamed':
            put(self, obj, filepath)
        else:
            with replacing(filepath) as partial:
                partial.write_bytes(obj if stage == 'written' else obj[:len(obj) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    checkpoint_hook.SafeLocalBackend.put = deadly_put


def test_a_hundred_kills(config, whole, tmp_path):
    """At random instants, half of them in the writing of a checkpoint."""
    draw = random.Random(0)
    start = time.monotonic()
    run_to_end(config, tmp_path / 'measured')
    seconds = time.monotonic() - start
    kills, ends, work, note = 0, 0, tmp_path / 'work', tmp_path / 'note'
    while kills < 100:
        in_write = kills % 2 == 0
        write = (draw.randrange(1, 5), draw.choice(('half', 'written', 'renamed'))) * in_write

        def before(cfg, write=write):
            cfg.custom_hooks.append(dict(type='NoteHook', path=str(note)))
            if write:
                die_in_write(*write)

        note.write_text('0')
        state_before = newest(work)
        pid = in_child(train, config, work, before=before, log=tmp_path / 'log')
        if not in_write:
            time.sleep(draw.uniform(0.2, seconds))
            os.kill(pid, signal.SIGKILL)
        code = finish(pid)
        assert code in (0, -signal.SIGKILL), (tmp_path / 'log').read_text()[-3000:]
        if code:
            kills += 1
            reached = max(int(note.read_text() or 0), state_before)
            assert reached - newest(work) <= INTERVAL, (reached, list(work.iterdir()))
            assert len(list(work.glob('iter_*.pth'))) <= 3
        else:
            ends += 1
            assert_same_end(whole, work)
            shutil.rmtree(work)
    run_to_end(config, work)
    assert_same_end(whole, work)
    print(f'{kills} kills, {ends + 1} runs to the end')
    assert ends >= 3


def newest(work):
    """The iteration at which a run would be resumed."""
    path = find_checkpoint(work)
    return int(Path(path).stem.rpartition('_')[2]) if path else 0


def assert_same_end(whole, work):
    assert differences(state(whole), state(work)) == []
    assert not list(work.glob('.*partial*'))


def train_rank(config, work, rank, port, **keywords):
    """One of two processes; what torchrun would set is set here."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', LOCAL_WORLD_SIZE='2',
                      MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))

    def before(cfg):
        cfg.launcher = 'pytorch'
        if 'note' in keywords:
            cfg.custom_hooks.append(dict(type='NoteHook', path=keywords['note']))

    train(config, work, before=before)


def two_ranks(config, work, folder, **keywords):
    port = free_port()
    return [in_child(train_rank, config, work, rank, port, log=folder / f'log{rank}', **keywords)
            for rank in range(2)]


def test_twenty_kills_of_two_ranks(config, tmp_path):
    """Of rank 0, of rank 1, or of both; the other one ends by itself."""
    draw = random.Random(1)
    start = time.monotonic()
    assert [finish(pid) for pid in two_ranks(config, tmp_path / 'whole', tmp_path)] == [0, 0], (
        (tmp_path / 'log0').read_text()[-3000:])
    seconds = time.monotonic() - start
    kills, work, note = 0, tmp_path / 'work', tmp_path / 'note'
    ended = []
    while kills < 20:
        note.write_text('0')
        before = newest(work)
        pids = two_ranks(config, work, tmp_path, note=str(note))
        time.sleep(draw.uniform(0.5, seconds))
        for pid in draw.choice((pids[:1], pids[1:], pids)):
            os.kill(pid, signal.SIGKILL)
        start = time.monotonic()
        codes = [finish(pid) for pid in pids]
        ended.append(time.monotonic() - start)
        assert ended[-1] < 60
        if codes == [0, 0]:
            assert differences(state(tmp_path / 'whole'), state(work)) == []
            shutil.rmtree(work)
            continue
        kills += 1
        assert max(int(note.read_text() or 0), before) - newest(work) <= INTERVAL
    assert [finish(pid) for pid in two_ranks(config, work, tmp_path)] == [0, 0]
    assert differences(state(tmp_path / 'whole'), state(work)) == []
    print(f'{kills} kills; the other rank ended after at most {max(ended):.1f} s')


def resident():
    """Megabytes that this process holds."""
    return int(Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGESIZE') / 2**20


@HOOKS.register_module()
class MemoryHook(Hook):

    def __init__(self, path):
        self.path = path

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if (runner.iter + 1) % 100 == 0:
            with open(self.path, 'a') as file:
                file.write(f'{resident():.1f}\n')


def test_memory_of_2000_iterations(config, tmp_path):
    run_to_end(config, tmp_path / 'work', options={
        'train_cfg.max_iters': 2000, 'train_cfg.val_interval': 100,
        'default_hooks.checkpoint.interval': 500, 'default_hooks.logger.interval': 100,
    }, before=lambda cfg: cfg.custom_hooks.append(
        dict(type='MemoryHook', path=str(tmp_path / 'memory'))))
    assert_flat([float(line) for line in (tmp_path / 'memory').read_text().split()])


def assert_flat(sizes):
    """The last quarter holds no more than the second one did, but for a few MiB."""
    print('MiB at equal intervals:', *sizes)
    quarter = len(sizes) // 4
    assert max(sizes[-quarter:]) - max(sizes[quarter:2 * quarter]) < 8


def test_memory_of_5000_predictions(tmp_path):
    def predict():
        torch.set_num_threads(1)
        init_default_scope('mmseg')
        cfg = Config(dict(
            model=dict(segmentor_config(), type='StreamedEncoderDecoder'),
            test_pipeline=[dict(type='LoadImageFromFile'), dict(type='PackSegInputs')]))
        model = MODELS.build(cfg.model).eval()
        model.cfg = cfg
        draw = np.random.default_rng(0)
        images = [draw.integers(0, 255, (height, width, 3), np.uint8)
                  for height, width in ((64, 64), (64, 96), (33, 50), (96, 64), (80, 80))]
        for number in range(5000):
            result = inference_model(model, images[number % 5])
            assert result.pred_sem_seg.data.shape[1:] == images[number % 5].shape[:2]
            if (number + 1) % 250 == 0:
                print(f'{resident():.1f}')

    log = tmp_path / 'log'
    assert finish(in_child(predict, log=log)) == 0, log.read_text()[-3000:]
    sizes = [float(line) for line in log.read_text().split('\n') if line.replace('.', '').isdigit()]
    assert len(sizes) == 20
    assert_flat(sizes)
