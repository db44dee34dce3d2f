"""The command lines, run as a user runs them."""
import json
import os
import pty
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from mmseg_edaformer.engine import checks
from tests.conftest import ROOT, run, write_config
from tests.processes import done, run_tool


@pytest.fixture(scope='module')
def trained(scenes, tmp_path_factory):
    """The config and the checkpoint of four iterations of training, and what it printed."""
    folder = tmp_path_factory.mktemp('trained')
    config = write_config(folder, scenes)
    output = run('tools/train.py', config, '--work-dir', folder / 'work', '--verbose').stdout
    return config, folder / 'work' / 'iter_4.pth', output


def evaluate(config, checkpoint, folder, *flags, run=done):
    """Run tools/test.py; returns its figures."""
    run('tools/test.py', config, checkpoint, '--work-dir', folder / 'test', '--json',
        folder / 'figures.json', *flags)
    return json.loads((folder / 'figures.json').read_text())


def test_train_logs_and_saves(trained):
    _, checkpoint, output = trained
    assert re.search(r'Iter\(train\) \[4/4\].*loss: ', output)
    assert re.search(r'mIoU: [\d.]+', output)
    assert 'The encoder starts from random weights' in output
    assert '4 iterations of 2 images are 0.7 epochs of the 12 training images' in output
    assert checkpoint.is_file()
    assert list(checkpoint.parent.glob('best_mIoU*.pth'))


@pytest.mark.parametrize(('images', 'warns'), [(639, True), (640, False)])
def test_a_schedule_for_far_more_images(monkeypatch, images, warns):
    told = []
    monkeypatch.setattr(checks, '_warn', told.append)
    checks.check_epochs(160_000, 4, images)
    assert [bool(re.search('160,000 iterations of 4 images are 1,001.6 epochs of the 639 training '
                           'images: lower', text)) for text in told] == [True] * warns


@pytest.mark.slow
def test_a_training_is_resumed_in_its_work_dir_even_a_fine_tuning(trained, tmp_path):
    config, checkpoint, _ = trained
    shutil.copytree(checkpoint.parent, tmp_path / 'work')
    log = done('tools/train.py', config, '--work-dir', tmp_path / 'work', '--resume', '--verbose',
               '--cfg-options', 'train_cfg.max_iters=6', 'load_from=gone.pth')
    assert 'resumed epoch: 0, iter: 4' in log
    assert re.findall(r'Iter\(train\) \[(\d)/6\]', log) == ['5', '6']
    log = done('tools/train.py', config, '--work-dir', tmp_path / 'new', '--resume')
    assert f'Nothing to resume in {tmp_path}/new: training starts' in log


@pytest.mark.slow
def test_isr_flag_is_the_hook_in_the_config(trained, tmp_path):
    config, checkpoint, _ = trained
    plain = evaluate(config, checkpoint, tmp_path)
    flag = evaluate(config, checkpoint, tmp_path, '--isr-ratio', '2')
    hooked = tmp_path / 'hooked.py'
    hooked.write_text(f"_base_ = ['{config}']\n"
                      "custom_hooks = [dict(type='ISRHook', isr_ratio=2)]\n")
    hook = evaluate(hooked, checkpoint, tmp_path)
    assert plain['isr_ratio'] == 'none'
    assert flag['isr_ratio'] == '2'
    assert flag['metrics'].keys() >= {'mIoU', 'aAcc', 'mAcc'}
    assert flag['metrics'] == hook['metrics']
    assert flag['metrics']['aAcc'] != plain['metrics']['aAcc']
    assert plain['images'] == 4


@pytest.mark.slow
def test_outputs(trained, tmp_path):
    config, checkpoint, _ = trained
    labels = predicted(config, checkpoint, tmp_path, '--show-dir', tmp_path / 'shown',
                       '--cfg-options', 'default_hooks.visualization.interval=1')
    assert labels.shape == (4, 64, 96)
    assert labels.max() < 8
    assert sorted(path.name for path in (tmp_path / 'labels').iterdir()) == [
        f'0000{i}.png' for i in range(4)]
    shown = list((tmp_path / 'shown').rglob('*.png'))
    assert len(shown) == 4
    assert np.array(Image.open(shown[0])).shape == (64, 192, 3)  # truth beside prediction


def predicted(config, checkpoint, folder, *flags, **how):
    """The label maps of a test."""
    evaluate(config, checkpoint, folder, '--out', folder / 'labels', *flags, **how)
    return np.stack([np.array(Image.open(path))
                     for path in sorted((folder / 'labels').iterdir())])


@pytest.mark.gpu
@pytest.mark.slow
def test_bfloat16_and_prediction(trained, scenes, device, tmp_path):
    config, checkpoint, _ = trained
    # A process with a GPU must not fork.
    call = done if device.type == 'cpu' else lambda *command: run(*command).stdout
    labels = [predicted(config, checkpoint, tmp_path / str(len(flags)), '--isr-ratio', '2',
                        *flags, run=call) for flags in ([], ['--bf16'])]
    equal = (labels[0] == labels[1]).mean()
    assert equal > 0.9
    assert equal < 1 or device.type == 'cuda'  # it did compute otherwise
    figures = json.loads((tmp_path / '0' / 'figures.json').read_text())
    name = torch.cuda.get_device_name() if device.type == 'cuda' else 'cpu'
    name = 'cpu' if 'passes for a GPU' in name else name  # not in those processes
    assert (figures['isr_ratio'], figures['device']) == ('2', name)
    output = call('tools/predict.py', scenes / 'images' / 'validation', '--model', config,
                  '--checkpoint', checkpoint, '--isr-ratio', '2', '--out', tmp_path / 'predicted')
    assert f'8 classes, on {"cpu" if name == "cpu" else "cuda"}\n' in output
    for path, expected in zip(sorted((tmp_path / 'predicted' / 'masks').iterdir()), labels[0],
                              strict=True):
        assert (np.array(Image.open(path)) == expected).mean() > 0.999


@pytest.mark.slow
@pytest.mark.parametrize('settings', [
    ['compile.graphs=True'], pytest.param([], marks=pytest.mark.soak)], ids=['graphs', 'code'])
def test_compiled(trained, tmp_path, settings):
    """Without graphs it generates code, which takes minutes on a CPU."""
    config = trained[0]
    shallow = ['--cfg-options', 'model.backbone.depths=(1,1,1,1)',
               'model.decode_head.depths=(1,1,1)', *settings]
    done('tools/train.py', config, '--work-dir', tmp_path, '--compile', *shallow,
         'train_cfg.max_iters=2', 'train_cfg.val_interval=9',
         'default_hooks.checkpoint.interval=2')
    labels = [predicted(config, tmp_path / 'iter_2.pth', tmp_path / str(len(flags)), *flags,
                        *shallow, run=call) for flags, call in (([], done), (['--compile'], run))]
    assert (labels[0] == labels[1]).mean() > 0.999


@pytest.mark.slow
def test_tta_with_isr(trained, tmp_path):
    config, checkpoint, _ = trained
    figures = evaluate(config, checkpoint, tmp_path, '--tta', '--isr-ratio', 'optimal')
    assert 0 <= figures['metrics']['mIoU'] <= 100


@pytest.mark.slow
def test_mmsegs_inferencers_take_our_configs(trained, scenes):
    from mmseg.apis import MMSegInferencer, inference_model, init_model
    config, checkpoint, _ = trained
    image = str(scenes / 'images' / 'validation' / '00000.png')
    model = init_model(str(config), str(checkpoint), device='cpu')
    labels = inference_model(model, image).pred_sem_seg.data[0].numpy()
    assert labels.shape == (64, 96)
    inferencer = MMSegInferencer(str(config), str(checkpoint), device='cpu')
    assert np.array_equal(inferencer(image)['predictions'], labels)


@pytest.mark.slow
def test_mmsegs_own_tool_trains_our_config(trained, tmp_path):
    """The plugin comes first among the imports, so the stock tool works with mmcv-lite too."""
    import mmseg
    config, _, _ = trained
    tool = os.path.join(os.path.dirname(mmseg.__file__), '.mim', 'tools', 'train.py')
    assert 'Iter(train) [4/4]' in run(tool, config, '--work-dir', tmp_path).stdout


def test_a_terminal_gets_a_live_bar(trained, tmp_path):
    config, checkpoint, _ = trained
    main, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, 'tools/test.py', config, checkpoint, '--work-dir', tmp_path],
        cwd=ROOT, stdout=terminal, stderr=subprocess.STDOUT, env={**os.environ, 'COLUMNS': '120',
                                                                  'TERM': 'xterm'})
    os.close(terminal)
    shown = b''
    try:
        while chunk := os.read(main, 4096):
            shown += chunk
    except OSError:  # the other end of the terminal is closed
        pass
    assert process.wait() == 0
    text = re.sub(r'\x1b\[[\d;?]*[A-Za-z]', '', shown.decode())
    assert re.search(r'test .*4/4.*images/s [\d.]+ +mIoU [\d.]+', text)
    bar, _, end = text.rpartition('Test: ')
    live, final = (float(re.findall(r'mIoU ([\d.]+)', part)[-1]) for part in (bar, end))
    assert live == pytest.approx(final, abs=0.01)


# Bad input: one clear message, exit code 1, nothing half-written.

def refused(*command):
    code, output = run_tool(*command)
    assert code == 1, output
    errors = [line for line in output.splitlines() if line.startswith('error: ')]
    assert len(errors) == 1, output
    assert 'Traceback' not in output
    return errors[0]


@pytest.fixture
def damaged(scenes, tmp_path):
    """A copy of the scenes to damage, and a config for it."""
    shutil.copytree(scenes, tmp_path / 'data')
    return tmp_path / 'data', write_config(tmp_path, tmp_path / 'data')


@pytest.mark.slow
@pytest.mark.parametrize(('break_it', 'says'), [
    (shutil.rmtree, r'the train set is not where the config says: .*data does not exist '
     r'.*prepare_data.py'),
    (lambda root: shutil.rmtree(root / 'annotations' / 'training'),
     r'annotations/training does not exist'),
    (lambda root: (root / 'images' / 'training' / '00003.png').unlink(),
     r'masks of the train set without a partner: 1. Missing: .*images/training/00003.png'),
    (lambda root: (root / 'annotations' / 'validation' / '00001.png').unlink(),
     r'images of the val set without a partner: 1. Missing: .*annotations/validation/00001.png'),
    (lambda root: Image.fromarray(np.full((64, 96), 77, np.uint8)).save(
        root / 'annotations' / 'training' / '00011.png'),
     r'the train set: label out of range: .*training/00011.png: 77 \(6,144 pixels\)'),
])
def test_bad_data_stops_a_run_before_training(damaged, tmp_path, break_it, says):
    root, config = damaged
    break_it(root)
    assert re.search(says, refused('tools/train.py', config, '--work-dir', tmp_path / 'work'))
    assert not (tmp_path / 'work').exists()


@pytest.mark.slow
def test_a_label_out_of_range_is_named(damaged, tmp_path):
    root, config = damaged
    masks = root / 'annotations' / 'training'
    for number in range(12, 60):
        for folder in masks, root / 'images' / 'training':
            shutil.copy(folder / '00000.png', folder / f'{number:05}.png')
    looked_at = set(np.linspace(0, 59, 16).astype(int))  # before the training
    for number, path in enumerate(sorted(masks.glob('*.png'))):
        if number not in looked_at:
            labels = np.array(Image.open(path))
            labels[:2, :3] = 77
            Image.fromarray(labels).save(path)
    message = refused('tools/train.py', config, '--work-dir', tmp_path / 'work', '--cfg-options',
                      'train_dataloader.num_workers=1')
    assert re.search(r'annotations/training/000\d\d.png holds the label 77 \(6 pixels\): its 8 '
                     r'classes are 0 to 7', message)
    assert not list(tmp_path.rglob('*.pth'))


@pytest.mark.slow
def test_an_image_that_cannot_be_decoded_is_named(damaged, trained, tmp_path):
    root, config = damaged
    path = root / 'images' / 'validation' / '00002.png'
    path.write_bytes(path.read_bytes()[:100])
    message = refused('tools/test.py', config, trained[1], '--work-dir',
                      tmp_path / 'work', '--json', tmp_path / 'figures.json')
    assert f'image cannot be decoded: {path} (100 bytes)' in message
    assert not (tmp_path / 'figures.json').exists()


@pytest.mark.slow
def test_a_checkpoint_for_other_classes(trained, tmp_path):
    config, checkpoint, _ = trained
    other = torch.load(checkpoint, weights_only=True)['state_dict']
    for name in ('weight', 'bias'):
        other[f'decode_head.conv_seg.{name}'] = torch.zeros_like(
            other[f'decode_head.conv_seg.{name}'])[:5]
    torch.save(dict(state_dict=other), tmp_path / 'other.pth')
    message = refused('tools/test.py', config, tmp_path / 'other.pth', '--work-dir', tmp_path)
    assert ('decode_head.conv_seg.weight is 5x32x1x1 in the checkpoint and 8x32x1x1 in the model'
            in message)
    assert '--load-from' in message
    log = done('tools/train.py', config, '--work-dir', tmp_path / 'work', '--load-from',
               tmp_path / 'other.pth')
    assert re.search('Left as initialised, .*decode_head.conv_seg.weight is 5x32x1x1', log)
    new = torch.load(tmp_path / 'work' / 'iter_4.pth', weights_only=True)['state_dict']
    assert new['decode_head.conv_seg.weight'].shape[0] == 8


TRAIN, TEST = 'tools/train.py {config} ', 'tools/test.py {config} '
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason='works on a GPU')


@pytest.mark.slow
@pytest.mark.parametrize(('command', 'says'), [
    ('tools/train.py configs/none.py', 'config not found: configs/none.py'),
    ('tools/train.py edaformer_t_adee', 't_adee: did you mean edaformer_t_ade?'),
    (TRAIN + '--load-from none.pth', 'checkpoint not found: none.pth'),
    (TEST + 'none.pth', 'checkpoint not found: none.pth'),
    (TEST + '{checkpoint} --isr-ratio 0', 'isr_ratio 0 is not an integer from 1'),
    (TEST + '{checkpoint} --isr-ratio 2211-2222',
     '4 multipliers for the decoder, which has 3 stages'),
    pytest.param(TEST + '{checkpoint} --compile', 'no-such-compiler is not on the PATH',
                 marks=without_gpu),
    pytest.param(TRAIN + '--amp', 'needs a GPU', marks=without_gpu),
    (TRAIN + '--cfg-options model.decode_head.chanels=3',
     "the config gives EDAFormerHead an argument 'chanels' that it does not have: "
     "did you mean 'channels'?"),
    (TRAIN + '--cfg-options model.backbone.arch=huge', "EFT has no arch 'huge'"),
    (TRAIN + '--cfg-options model.decode_head.num_classes=19',
     'SyntheticDataset has 8 classes, the model 19'),
    (TRAIN + '--cfg-options model.backbone.type=ETF', 'ETF is not in the'),
])
def test_what_cannot_work_is_refused(trained, tmp_path, monkeypatch, command, says):
    monkeypatch.setenv('CXX', 'no-such-compiler')
    words = command.format(config=trained[0], checkpoint=trained[1]).split()
    assert says in refused(*words, '--work-dir', tmp_path)
