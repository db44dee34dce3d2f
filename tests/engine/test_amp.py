"""Mixed precision, which needs a GPU: it learns, and resumes from the middle of a run."""
import shutil

import numpy as np
import pytest
import torch

from mmseg_edaformer.models import EDAFormerHead
from tests.conftest import write_config
from tests.engine.training import state, train_here


@pytest.mark.gpu
@pytest.mark.slow
def test_it_learns_and_resumes(cuda, scenes, tmp_path, monkeypatch):
    dtypes, forward = [], EDAFormerHead.forward

    def note(self, maps):
        logits = forward(self, maps)
        dtypes.append(logits.dtype)
        return logits
    monkeypatch.setattr(EDAFormerHead, 'forward', note)
    config = write_config(tmp_path, scenes)
    options = {'train_cfg.max_iters': 32, 'train_cfg.val_interval': 32,
               'default_hooks.checkpoint.interval': 16, 'train_dataloader.batch_size': 4}
    assert train_here(config, tmp_path / 'whole', amp=True, options=options) == 0
    assert dtypes == [torch.bfloat16] * 32 + [torch.float32] * 4

    def losses(work):
        content = torch.load(tmp_path / work / 'iter_32.pth', weights_only=True)
        return content['message_hub']['log_scalars']['train/loss'].data[0]

    whole = losses('whole')
    assert whole[-10:].mean() < 0.9 * whole[:5].mean()  # 0.79 on a CPU

    (tmp_path / 'resumed').mkdir()
    shutil.copy(tmp_path / 'whole' / 'iter_16.pth', tmp_path / 'resumed')
    workers = {'train_dataloader.num_workers': 2, 'train_dataloader.persistent_workers': True}
    assert train_here(config, tmp_path / 'resumed', amp=True, options={**options, **workers}) == 0
    assert dtypes[36:] == [torch.bfloat16] * 16 + [torch.float32] * 4
    resumed = losses('resumed')
    assert len(resumed) == 32
    assert np.abs(resumed - whole)[16:21].max() < 0.02  # with other images it is 0.05
    first, last, again = (state(tmp_path / work, f'iter_{number}.pth') for work, number in (
        ('whole', 16), ('whole', 32), ('resumed', 32)))
    assert again['iter'] == 32

    def distance(one, other):
        return sum((one['weights'][name] - other['weights'][name]).double().square().sum()
                   for name in one['weights']).sqrt()
    # GPUs round otherwise in each run. Without the moments of the optimizer it is half of that way.
    assert distance(again, last) < 0.1 * distance(first, last)
