"""Losses that are nan or infinite: the run stops before the weights change, or skips the step."""
import re
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.optim import BaseOptimWrapper, OptimWrapper, OptimWrapperDict, build_optim_wrapper
from mmengine.registry import HOOKS, OPTIM_WRAPPERS

from mmseg_edaformer.engine.nonfinite import FiniteLossHook, FiniteSteps, skip_nonfinite_steps
from mmseg_edaformer.errors import ConfigError
from tests.engine.training import differences, run_to_end, state, train, train_here
from tests.processes import finish, in_child


@HOOKS.register_module()
class BadLossHook(Hook):
    """Make the loss of some iterations nan, infinite, or of a gradient that is."""

    def __init__(self, iterations, kind):
        self.iterations, self.kind = iterations, kind

    def before_train(self, runner):
        loss = runner.model.loss

        def bad_loss(*args, **kwargs):
            losses = loss(*args, **kwargs)
            if runner.iter in self.iterations:
                losses['decode.loss_ce'] = self.spoil(losses['decode.loss_ce'])
            return losses

        runner.model.loss = bad_loss

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter in self.iterations:  # as a pass through the network would
            runner.model.decode_head.fuse_norm.running_mean.fill_(float('nan'))

    def spoil(self, value):
        if self.kind == 'nan':
            return value * float('nan')
        if self.kind == 'infinite':
            return value + float('inf')  # its gradient is finite
        return value + (value - value.detach()).abs().sqrt()  # infinite slope at 0


def bad_loss(iterations, kind):
    return lambda cfg: cfg.custom_hooks.append(dict(
        type='BadLossHook', iterations=iterations, kind=kind))


@pytest.mark.parametrize(('kind', 'what', 'accumulated', 'skip'), [
    ('nan', 'the loss is', 1, 1), ('infinite', 'the loss is', 1, None),
    ('slope', 'the gradient of the loss is', 1, None), ('nan', 'the loss is', 3, None)])
def test_the_run_stops(config, tmp_path, kind, what, accumulated, skip):
    """The batches whose loss is not finite are named, also when gradients are accumulated."""
    work, log = tmp_path / 'work', tmp_path / 'log'
    code = finish(in_child(train, config, work, log=log, skip_nonfinite=skip,
                           before=bad_loss([3, 4] if skip else [4], kind),
                           options={'optim_wrapper.accumulative_counts': accumulated}))
    assert code == 1
    assert ('Step skipped (1 of 1)' in log.read_text()) == bool(skip)
    message = re.search(r'^error: (.*)$', log.read_text(), re.M)[1]
    iteration = 5 if accumulated == 1 else 6  # the step ends there
    assert f'{what} not a finite number at iteration {iteration}, images: ' in message
    assert len(re.findall(r'images/training/000\d\d.png', message)) == 2
    assert f'last good checkpoint is {work}/iter_3.pth' in message
    assert '--skip-nonfinite' in message
    assert sorted(path.name for path in work.glob('*.pth')) == ['iter_3.pth']


def test_steps_are_skipped(config, tmp_path):
    work = tmp_path / 'work'
    log = run_to_end(config, work, skip_nonfinite=2, before=bad_loss([3, 5], 'nan'))
    assert re.search(r'Step skipped \(1 of 2\): the loss is .* iteration 4,', log)
    assert re.search(r'Step skipped \(2 of 2\): the loss is .* iteration 6,', log)
    after = state(work)
    assert all(tensor.isfinite().all() for tensor in after['weights'].values())
    # The optimizer has counted the steps that it took.
    steps = {int(values['step']) for values in after['optimizer']['state'].values()}
    assert steps == {10}


@pytest.mark.gpu
def test_a_skipped_step_changes_nothing(config, device, tmp_path):
    work = tmp_path / 'work'
    options = {'train_cfg.max_iters': 4, 'default_hooks.checkpoint.interval': 1,
               'default_hooks.checkpoint.max_keep_ckpts': 4}
    assert train_here(config, work, skip_nonfinite=1, before=bad_loss([3], 'nan'),
                      options=options) == 0
    before, after = (state(work, f'iter_{number}.pth') for number in (3, 4))
    assert differences(before['optimizer']['state'], after['optimizer']['state']) == []
    assert differences(before['weights'], after['weights']) == []


@OPTIM_WRAPPERS.register_module()
class CountingWrapper(OptimWrapper):
    """A user's own."""

    steps = 0

    def step(self, **kwargs):
        self.steps += 1
        super().step(**kwargs)


@OPTIM_WRAPPERS.register_module()
class ForeignWrapper(BaseOptimWrapper):
    """Not derived from OptimWrapper, as DeepSpeed's is."""


def test_the_wrapper_of_a_user_is_protected():
    cfg = Config(dict(optim_wrapper=dict(
        type='CountingWrapper', optimizer=dict(type='SGD', lr=1.))))
    for _ in range(2):  # a second time, as from a config in a work dir
        skip_nonfinite_steps(cfg)
        assert cfg.optim_wrapper.wrapped == 'CountingWrapper'
    model = torch.nn.Linear(2, 1, bias=False)
    wrapper, before = build_optim_wrapper(model, cfg.optim_wrapper), model.weight.clone()
    assert isinstance(wrapper, CountingWrapper)
    assert isinstance(wrapper, FiniteSteps)
    wrapper.update_params(model(torch.full((1, 2), torch.inf)).sum())
    assert (wrapper.steps, wrapper.finite) == (0, False)
    assert torch.equal(model.weight, before)
    wrapper.update_params(model(torch.ones(1, 2)).sum())
    assert (wrapper.steps, wrapper.finite) == (1, True)
    assert torch.allclose(model.weight, before - 1)


@pytest.mark.parametrize('settings', [
    dict(type='ForeignWrapper', optimizer=dict(type='SGD', lr=1.)), dict(constructor='Several')])
def test_wrappers_that_cannot_skip(settings):
    """They stay as they are, and steps that are to be skipped are an error."""
    cfg = Config(dict(optim_wrapper=settings))
    skip_nonfinite_steps(cfg)
    assert cfg.optim_wrapper == settings
    runner = SimpleNamespace(optim_wrapper=OptimWrapperDict())
    FiniteLossHook().before_train(runner)
    with pytest.raises(ConfigError, match=r'steps of optim_wrapper\.type=OptimWrapperDict cannot'):
        FiniteLossHook(skip=1).before_train(runner)


def test_the_norm_of_the_gradient_is_logged(config, tmp_path):
    """It is mmengine's own, and the guard changes no weight."""
    options = {'train_cfg.max_iters': 3, 'optim_wrapper.clip_grad': None}
    results = []

    def unguard(cfg):
        cfg.custom_hooks = [hook for hook in cfg.custom_hooks if hook['type'] != 'FiniteLossHook']
        cfg.optim_wrapper.type = cfg.optim_wrapper.pop('wrapped')
        cfg.optim_wrapper.clip_grad = dict(max_norm=float('inf'))

    for name, before in ('guarded', None), ('plain', unguard):
        log = run_to_end(config, tmp_path / name, options=options, before=before)
        assert 'has been overridden' not in log  # mmengine's warning of steps that it does not know
        results.append((re.findall(r'grad_norm: ([\d.]+)', log),
                        state(tmp_path / name, 'iter_3.pth')['weights']))
    (guarded, weights), (plain, expected) = results
    assert guarded == plain
    assert len(guarded) == 3
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
