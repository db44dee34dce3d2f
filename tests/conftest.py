"""What the tests share: small models, drawn data, quiet registries, a device."""
import contextlib
import gc
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import pytest
import torch
from mmengine.config import config as mmengine_config
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS
from yapf.yapflib import yapf_api

import mmseg_edaformer
from mmseg_edaformer.data import drawing as synthetic
from mmseg_edaformer.engine.allocator import keep_freed_memory
from mmseg_edaformer.models import layers
from mmseg_edaformer.pretraining.crops import draw_crops
from tests.fake_cuda import fake_cuda

ROOT = Path(mmseg_edaformer.__file__).parents[1]

MINI = dict(embed_dims=(16, 32, 64, 128), depths=(1, 1, 2, 1))
"""Sizes of the small encoder that most tests use."""

keep_freed_memory()  # or half of the time goes into mapping the same pages again and again

# mmengine has yapf format the config for each checkpoint, which takes longer than the small
# trainings; what tests start as processes of their own formats it.
for module in mmengine_config, yapf_api:
    module.FormatCode = lambda text, **_: (text, True)


def pytest_addoption(parser):
    parser.addoption('--fake-cuda', action='store_true', help='without a GPU, run the tests of the '
                     'fixture device on a CPU that passes for one too (tests/fake_cuda.py)')


def pytest_collection_finish():
    gc.freeze()  # mmengine collects garbage for each data set: not in all modules, and not in forks


@pytest.fixture(autouse=True)
def _scope_and_seed():
    init_default_scope('mmseg')
    torch.manual_seed(0)


@pytest.fixture
def set_threads():
    """``torch.set_num_threads`` until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def cuda():
    """A GPU, or a CPU that passes for one: for tests marked ``gpu`` of code for GPUs alone."""
    with contextlib.ExitStack() as stack:
        if not torch.cuda.is_available():
            stack.enter_context(fake_cuda())
            stack.callback(layers._kernels.cache_clear)
        # Or float32 would be compared with what TF32 makes of it.
        stack.enter_context(torch.backends.cudnn.flags(
            enabled=True, deterministic=True, allow_tf32=False))
        yield torch.device('cuda')


@pytest.fixture
def device(request):
    """A GPU, or the CPU where there is none: for tests marked ``gpu`` that hold on both."""
    gpu = torch.cuda.is_available() or request.config.getoption('--fake-cuda')
    return request.getfixturevalue('cuda') if gpu else torch.device('cpu')


@pytest.fixture(scope='module')
def browser():
    """Chromium, with a camera that shows a test picture."""
    api = pytest.importorskip('playwright.sync_api')
    path = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))),
                None)
    if path is None:
        pytest.skip('no Chromium is installed')
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=[
            '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
            '--disable-background-networking', '--disable-component-update', '--disable-sync',
            '--use-fake-device-for-media-stream', '--use-fake-ui-for-media-stream'])
        yield chromium
        chromium.close()


def wait_for(page, selector, pattern):
    """Wait until the text of a page matches; returns the match."""
    text = ''
    for _ in range(300):
        text = ' '.join(page.locator(selector).all_inner_texts())
        if found := re.search(pattern, text):
            return found
        page.wait_for_timeout(100)
    raise AssertionError(f'{selector} shows {text!r} and not {pattern}')


@pytest.fixture(scope='session')
def scenes(tmp_path_factory):
    """A small drawn data set in ADE20K's layout; read-only."""
    root = tmp_path_factory.mktemp('scenes')
    synthetic.draw_dataset(root / 'data', train=12, val=4, size=(64, 96))
    return root / 'data'


@pytest.fixture(scope='session')
def crops(tmp_path_factory):
    """Forty drawn images of ten classes for training, ten for validation; read-only."""
    return draw_crops(tmp_path_factory.mktemp('crops') / 'data', train=4, val=1)


@pytest.fixture(scope='session')
def classifier(crops, tmp_path_factory):
    """A config: the small recipe of pretraining with a small encoder; an epoch is five steps."""
    path = tmp_path_factory.mktemp('config') / 'mini.py'
    path.write_text(f'''
_base_ = ['{ROOT}/configs/eft_t_crops.py']
model = dict(backbone=dict(**{MINI}, drop_path_rate=0.2), head=dict(in_channels=128))
data_root = '{crops}'
train_dataloader = dict(batch_size=8, num_workers=0, persistent_workers=False,
                        dataset=dict(data_root=data_root))
val_dataloader = dict(batch_size=4, num_workers=0, persistent_workers=False,
                      dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
auto_scale_lr = dict(base_batch_size=8)
report = False
''')
    return path


def segmentor_config(num_classes=8, **head):
    """An EncoderDecoder of the small encoder and its decoder."""
    return dict(
        type='EncoderDecoder',
        data_preprocessor=dict(type='SegDataPreProcessor', size=(64, 64), pad_val=0,
                               seg_pad_val=255),
        backbone=dict(type='EFT', arch=MINI),
        decode_head=dict(type='EDAFormerHead', in_channels=(32, 64, 128), channels=32,
                         num_classes=num_classes, **head),
        train_cfg=dict(), test_cfg=dict(mode='whole'))


@pytest.fixture
def segmentor():
    """A small EDAFormer in eval mode with initialised weights."""
    model = MODELS.build(segmentor_config())
    model.init_weights()
    # Norms that do something, so that a lost one shows.
    for module in model.modules():
        if isinstance(module, (torch.nn.LayerNorm, torch.nn.BatchNorm2d)):
            torch.nn.init.normal_(module.weight, 1, 0.2)
            torch.nn.init.normal_(module.bias, 0, 0.2)
    return model.eval()


def run(*command, cwd=ROOT, check=True, **kwargs):
    """Run a command line of the project as a user does; returns the finished process."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=cwd, text=True,
                          capture_output=True, timeout=600, **kwargs)
    if check and done.returncode:
        raise AssertionError(f'{command} ended with {done.returncode}:\n{done.stdout[-3000:]}\n'
                             f'{done.stderr[-3000:]}')
    return done


def seeing_model(config, scenes, init=False):
    """A model whose weights see many classes in drawn scenes, and for which distant keys matter."""
    from mmseg.apis import init_model  # which mmcv-lite alone cannot import
    torch.manual_seed(0)
    model = init_model(str(config), device='cpu')
    if init:
        model.init_weights()
    for module in model.modules():
        if isinstance(module, (torch.nn.LayerNorm, torch.nn.BatchNorm2d)):
            torch.nn.init.normal_(module.bias, 0, 0.5)
    torch.nn.init.normal_(model.decode_head.conv_seg.weight)
    image = cv2.imread(str(scenes / 'images' / 'validation' / '00000.png'))
    with torch.no_grad():  # so that each class wins somewhere
        logits = model(torch.tensor(image).permute(2, 0, 1)[None].float() / 64 - 2)
        scale = 1 / logits.std((0, 2, 3))
        model.decode_head.conv_seg.weight *= scale[:, None, None, None]
        model.decode_head.conv_seg.bias.sub_(logits.mean((0, 2, 3))).mul_(scale)
    return model


def write_config(folder, scenes, iterations=4):
    """A config of the small model on the drawn scenes; returns its path."""
    config = folder / 'mini.py'
    config.write_text(f'''
_base_ = ['{ROOT}/configs/edaformer_t_synthetic.py']
model = dict(
    data_preprocessor=dict(size=(64, 64)), backbone={MINI},
    decode_head=dict(in_channels=(32, 64, 128), channels=32, depths=(1, 1, 1)))
crop_size = (64, 64)
data_root = '{scenes}'
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False, dataset=dict(
    data_root=data_root, pipeline=[
        dict(type='LoadSegImage'), dict(type='LoadSegLabels', num_classes=8),
        dict(type='RandomSegCrop', crop_size=crop_size), dict(type='PackSegInputs')]))
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
param_scheduler = [dict(type='ConstantLR', factor=1., by_epoch=False)]
train_cfg = dict(max_iters={iterations}, val_interval={iterations})
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval={iterations}))
auto_scale_lr = dict(base_batch_size=2)
report = False
''')
    return config
