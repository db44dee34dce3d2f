"""Timing the training pipeline: every step is there, and nothing stays changed."""
import pytest
import torch
from mmengine.config import Config

from mmseg_edaformer.analysis.pipeline import measure_pipeline
from tests.conftest import ROOT


@pytest.mark.parametrize('name', ['edaformer_t_ade', 'edaformer_t_synthetic'])
def test_every_step_is_timed(name):
    cfg = Config.fromfile(ROOT / 'configs' / f'{name}.py')
    threads = torch.get_num_threads()
    steps = measure_pipeline(cfg, (64, 96), images=3)
    assert [step for step, _ in steps] == [
        *(step.type for step in cfg.train_dataloader.dataset.pipeline), 'collate', 'total']
    assert min(time for _, time in steps) >= 0
    assert steps[-1][1] == pytest.approx(sum(time for _, time in steps[:-1]))
    assert torch.get_num_threads() == threads
