"""ISR in the runner: around validation and test only, and gone afterwards."""
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import default_collate
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner

from mmseg_edaformer import EFT, ISRHook
from tests.conftest import MINI


class Classifier(BaseModel):
    """Any model of mmengine that holds an EFT."""

    def __init__(self):
        super().__init__()
        self.backbone = EFT(MINI)
        self.seen = []

    def forward(self, inputs, labels=None, mode='tensor'):
        self.seen.append((mode, self.backbone.stages[0].blocks[0].attn.isr_ratio))
        score = self.backbone(torch.stack(list(inputs)))[-1].mean((1, 2, 3))
        return dict(loss=score.square().mean()) if mode == 'loss' else list(score)


class Count(BaseMetric):

    def process(self, data_batch, data_samples):
        self.results.extend(data_samples)

    def compute_metrics(self, results):
        return dict(count=len(results))


class Fail(Hook):

    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        raise ZeroDivisionError

    after_test_iter = after_val_iter


def build(tmp_path, ratio, *hooks, **options):
    data = [(torch.randn(3, 64, 64), 0) for _ in range(2)]
    loader = dict(batch_size=1, num_workers=0, dataset=data, collate_fn=default_collate,
                  sampler=dict(type='DefaultSampler', shuffle=False))
    return Runner(
        Classifier(), str(tmp_path), train_dataloader=loader, val_dataloader=loader,
        test_dataloader=loader, val_evaluator=[Count()], test_evaluator=[Count()],
        train_cfg=dict(by_epoch=True, max_epochs=2, val_interval=1), val_cfg=dict(),
        test_cfg=dict(), optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.)),
        custom_hooks=[dict(type='ISRHook', isr_ratio=ratio, **options), *hooks],
        default_scope='mmengine', experiment_name=f'isr{tmp_path.name}', cfg=Config())


def test_training_is_untouched_and_evaluation_reduced(tmp_path):
    runner = build(tmp_path, 'optimal')
    runner.train()
    runner.test()
    assert runner.model.seen == ([('loss', 1)] * 2 + [('predict', 2)] * 2) * 2 + [
        ('predict', 2)] * 2
    assert {stage.blocks[0].attn.isr_ratio for stage in runner.model.backbone.stages} == {1}
    log = next(tmp_path.rglob('*.log')).read_text()
    assert 'ISR 2211-222 on 512x512' in log
    assert 'GMACs' in log


@pytest.mark.parametrize('stage', ['val', 'test'])
def test_the_trained_pools_are_back_after_an_exception(tmp_path, stage):
    runner = build(tmp_path, 2, Fail())
    with pytest.raises(ZeroDivisionError):
        getattr(runner, stage)()
    assert runner.model.seen == [('predict', 2)]
    assert {stage.blocks[0].attn.isr_ratio for stage in runner.model.backbone.stages} == {1}


def test_auto_counts_from_the_crop_size(tmp_path):
    runner = build(tmp_path, 'auto', crop_size=(32, 32))
    layer = runner.model.backbone.stages[0].blocks[0].attn
    pools = []
    layer.register_forward_pre_hook(
        lambda layer, args: pools.append(layer.pool_size(*args[0].shape[2:])))
    runner.test()
    assert pools[-2:] == [(16, 16)] * 2  # those before are of the report
    assert layer.isr_keys is None
    assert 'ISR auto on 64x64' in next(tmp_path.rglob('*.log')).read_text()


def test_a_network_that_cannot_be_counted_runs_all_the_same(tmp_path):
    runner = build(tmp_path, 'optimal')
    forward = runner.model.backbone.forward

    def particular(x):
        if x.device.type == 'meta' or x.shape[0] != 2:
            raise TypeError('two images at once, please')
        return forward(x)

    runner.model.backbone.forward = particular
    ISRHook('optimal').before_run(runner)
    reason = 'Classifier does not run on 512x512 pixels (TypeError'
    log = next(tmp_path.rglob('*.log')).read_text()
    assert f'cannot count ahead what it reduces: {reason}' in log
