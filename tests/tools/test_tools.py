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
from tests.processes import run_tool


@pytest.fixture(scope='module')
def trained(scenes, tmp_path_factory):
    """A work dir of four iterations of training, and the config."""
    folder = tmp_path_factory.mktemp('trained')
    config = write_config(folder, scenes)
    done = run('tools/train.py', config, '--work-dir', folder / 'work')
    return config, folder / 'work', done


def done(*command):
    """Run a tool to a good end; returns what it wrote."""
    code, output = run_tool(*command)
    assert code == 0, output[-4000:]
    return output


def evaluate(config, checkpoint, folder, *flags, run=done):
    """Run tools/test.py; returns its figures."""
    run('tools/test.py', config, checkpoint, '--work-dir', folder / 'test', '--json',
        folder / 'figures.json', *flags)
    return json.loads((folder / 'figures.json').read_text())


def test_train_logs_and_saves(trained):
    _, work, done = trained
    assert re.search(r'Iter\(train\) \[4/4\].*loss: ', done.stdout)
    assert re.search(r'mIoU: [\d.]+', done.stdout)
    assert 'The encoder starts from random weights' in done.stdout
    assert '4 iterations of 2 images are 0.7 epochs of the 12 training images' in done.stdout
    assert (work / 'iter_4.pth').is_file()
    assert list(work.glob('best_mIoU*.pth'))


@pytest.mark.parametrize(('images', 'warns'), [(639, True), (640, False)])
def test_a_schedule_for_far_more_images(monkeypatch, images, warns):
    told = []
    monkeypatch.setattr(checks, '_warn', told.append)
    checks.check_epochs(160_000, 4, images)
    assert [bool(re.search('160,000 iterations of 4 images are 1,001.6 epochs of the 639 training '
                           'images: lower', text)) for text in told] == [True] * warns


@pytest.mark.slow
def test_resume_goes_on(trained, tmp_path):
    config, work, _ = trained
    shutil.copytree(work, tmp_path / 'work')
    (tmp_path / 'work' / 'last_checkpoint').write_text(str(tmp_path / 'work' / 'iter_4.pth'))
    log = done('tools/train.py', config, '--work-dir', tmp_path / 'work', '--resume',
               '--cfg-options', 'train_cfg.max_iters=6')
    assert 'resumed epoch: 0, iter: 4' in log
    iterations = re.findall(r'Iter\(train\) \[(\d)/6\]', log)
    assert iterations == ['5', '6']


@pytest.mark.slow
def test_resume_goes_on_in_the_work_dir_even_of_a_fine_tuning(trained, tmp_path):
    config, work, _ = trained
    shutil.copytree(work, tmp_path / 'work')
    (tmp_path / 'work' / 'last_checkpoint').write_text(str(tmp_path / 'work' / 'iter_4.pth'))
    log = done('tools/train.py', config, '--work-dir', tmp_path / 'work', '--resume',
               '--cfg-options', 'train_cfg.max_iters=5', 'load_from=gone.pth')
    assert 'resumed epoch: 0, iter: 4' in log
    log = done('tools/train.py', config, '--work-dir', tmp_path / 'new', '--resume')
    assert f'Nothing to resume in {tmp_path}/new: training starts' in log


@pytest.mark.slow
def test_isr_flag_is_the_hook_in_the_config(trained, tmp_path):
    config, work, _ = trained
    plain = evaluate(config, work / 'iter_4.pth', tmp_path)
    flag = evaluate(config, work / 'iter_4.pth', tmp_path, '--isr-ratio', '2')
    hooked = tmp_path / 'hooked.py'
    hooked.write_text(f"_base_ = ['{config}']\n"
                      "custom_hooks = [dict(type='ISRHook', isr_ratio=2)]\n")
    hook = evaluate(hooked, work / 'iter_4.pth', tmp_path)
    # On 64x96 pixels auto comes to 2 for a model trained at 32x32.
    auto = evaluate(config, work / 'iter_4.pth', tmp_path, '--isr-ratio', 'auto', '--cfg-options',
                'model.data_preprocessor.size=(32,32)')
    assert auto['isr_ratio'] == 'auto'
    assert auto['metrics'] == flag['metrics']
    assert plain['isr_ratio'] == 'none'
    assert flag['isr_ratio'] == '2'
    assert flag['metrics'].keys() >= {'mIoU', 'aAcc', 'mAcc'}
    assert flag['metrics'] == hook['metrics']
    assert flag['metrics']['aAcc'] != plain['metrics']['aAcc']
    assert plain['images'] == 4


@pytest.mark.slow
def test_outputs(trained, tmp_path):
    config, work, _ = trained
    evaluate(config, work / 'iter_4.pth', tmp_path, '--out', tmp_path / 'labels', '--show-dir',
         tmp_path / 'shown', '--cfg-options', 'default_hooks.visualization.interval=1', run=run)
    labels = sorted((tmp_path / 'labels').glob('*.png'))
    assert [path.name for path in labels] == [f'0000{i}.png' for i in range(4)]
    for path in labels:
        array = np.array(Image.open(path))
        assert array.shape == (64, 96)
        assert array.max() < 8
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
    """In processes of their own: a process with a GPU must not fork."""
    config, work, _ = trained
    labels = [predicted(config, work / 'iter_4.pth', tmp_path / str(len(flags)), '--isr-ratio', '2',
                        *flags, run=run) for flags in ([], ['--bf16'])]
    equal = (labels[0] == labels[1]).mean()
    assert equal > 0.9
    assert equal < 1 or device.type == 'cuda'  # it did compute otherwise
    figures = json.loads((tmp_path / '0' / 'figures.json').read_text())
    name = torch.cuda.get_device_name() if device.type == 'cuda' else 'cpu'
    name = 'cpu' if 'passes for a GPU' in name else name  # not in those processes
    assert (figures['isr_ratio'], figures['device']) == ('2', name)
    output = run('tools/predict.py', scenes / 'images' / 'validation', '--model', config,
                 '--checkpoint', work / 'iter_4.pth', '--isr-ratio', '2', '--out',
                 tmp_path / 'predicted').stdout
    assert f'8 classes, on {"cpu" if name == "cpu" else "cuda"}\n' in output
    for path, expected in zip(sorted((tmp_path / 'predicted' / 'masks').iterdir()), labels[0],
                              strict=True):
        assert (np.array(Image.open(path)) == expected).mean() > 0.999


@pytest.mark.slow
def test_compiled(trained, tmp_path):
    config = trained[0]
    shallow = ['--cfg-options', 'model.backbone.depths=(1,1,1,1)',
               'model.decode_head.depths=(1,1,1)']
    work = tmp_path / 'work'
    run('tools/train.py', config, '--work-dir', work, '--compile', *shallow,
        'train_cfg.max_iters=2', 'train_cfg.val_interval=9', 'default_hooks.checkpoint.interval=2')
    labels = [predicted(config, work / 'iter_2.pth', tmp_path / str(len(flags)), *flags, *shallow,
                        run=run)
              for flags in ([], ['--compile'])]
    assert (labels[0] == labels[1]).mean() > 0.999


@pytest.mark.slow
def test_tta_with_isr(trained, tmp_path):
    config, work, _ = trained
    figures = evaluate(config, work / 'iter_4.pth', tmp_path, '--tta', '--isr-ratio', 'optimal')
    assert 0 <= figures['metrics']['mIoU'] <= 100


@pytest.mark.slow
def test_mmsegs_inferencers_take_our_configs(trained, scenes):
    from mmseg.apis import MMSegInferencer, inference_model, init_model
    config, work, _ = trained
    image = str(scenes / 'images' / 'validation' / '00000.png')
    model = init_model(str(config), str(work / 'iter_4.pth'), device='cpu')
    labels = inference_model(model, image).pred_sem_seg.data[0].numpy()
    assert labels.shape == (64, 96)
    inferencer = MMSegInferencer(str(config), str(work / 'iter_4.pth'), device='cpu')
    assert np.array_equal(inferencer(image)['predictions'], labels)


@pytest.mark.slow
def test_mmsegs_own_tool_trains_our_config(trained, tmp_path):
    """The plugin comes first among the imports, so the stock tool works with mmcv-lite too."""
    import mmseg
    config, _, _ = trained
    tool = os.path.join(os.path.dirname(mmseg.__file__), '.mim', 'tools', 'train.py')
    done = run(tool, config, '--work-dir', tmp_path)
    assert 'Iter(train) [4/4]' in done.stdout


def test_a_terminal_gets_a_live_bar(trained, tmp_path):
    config, work, _ = trained
    main, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, 'tools/test.py', config, work / 'iter_4.pth', '--work-dir', tmp_path],
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
    final = re.search(r'mIoU: ([\d.]+)', text)[1]
    assert float(re.findall(r'mIoU ([\d.]+)', text)[-1]) == pytest.approx(float(final), abs=0.01)
    assert 'per class results' in text


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
    (lambda root: shutil.rmtree(root), r'the train set is not where the config says: .*data '
     r'does not exist .*prepare_data.py'),
    (lambda root: shutil.rmtree(root / 'annotations' / 'training'),
     r'annotations/training does not exist'),
    (lambda root: (root / 'images' / 'training' / '00003.png').unlink(),
     r'1 mask of the train set has no partner. Missing: .*images/training/00003.png'),
    (lambda root: (root / 'annotations' / 'validation' / '00001.png').unlink(),
     r'1 image of the val set has no partner. Missing: .*annotations/validation/00001.png'),
])
def test_missing_files_stop_before_training(damaged, tmp_path, break_it, says):
    root, config = damaged
    break_it(root)
    assert re.search(says, refused('tools/train.py', config, '--work-dir', tmp_path / 'work'))
    assert not (tmp_path / 'work').exists()


@pytest.mark.slow
def test_some_masks_are_looked_at_before_training(damaged, tmp_path):
    root, config = damaged
    Image.fromarray(np.full((64, 96), 77, np.uint8)).save(
        root / 'annotations' / 'training' / '00011.png')
    message = refused('tools/train.py', config, '--work-dir', tmp_path / 'work')
    assert re.search(r'the train set: label out of range: .*training/00011.png: 77 '
                     r'\(6,144 pixels\)', message)
    assert not (tmp_path / 'work').exists()


@pytest.mark.slow
@pytest.mark.parametrize('workers', [0, 1])
def test_a_label_out_of_range_is_named(damaged, tmp_path, workers):
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
                      f'train_dataloader.num_workers={workers}')
    assert re.search(r'annotations/training/000\d\d.png holds the label 77 \(6 pixels\): its 8 '
                     r'classes are 0 to 7', message)
    assert not list(tmp_path.rglob('*.pth'))


@pytest.mark.slow
def test_an_image_that_cannot_be_decoded_is_named(damaged, trained, tmp_path):
    root, config = damaged
    path = root / 'images' / 'validation' / '00002.png'
    path.write_bytes(path.read_bytes()[:100])
    message = refused('tools/test.py', config, trained[1] / 'iter_4.pth', '--work-dir',
                      tmp_path / 'work', '--json', tmp_path / 'figures.json')
    assert f'image cannot be decoded: {path} (100 bytes)' in message
    assert not (tmp_path / 'figures.json').exists()


@pytest.mark.slow
@pytest.mark.parametrize(('options', 'says'), [
    (['model.decode_head.chanels=3'],
     "the config gives EDAFormerHead an argument 'chanels' that it does not have: "
     "did you mean 'channels'?"),
    (['model.backbone.depth=3'],
     "the config gives EFT an argument 'depth' that it does not have: did you mean 'depths'?"),
    (['model.backbone.arch=huge'], "EFT has no arch 'huge'"),
    (['model.decode_head.num_classes=19'], 'SyntheticDataset has 8 classes, the model 19'),
    (['model.backbone.type=ETF'], 'ETF is not in the'),
])
def test_a_config_that_cannot_work(trained, tmp_path, options, says):
    assert says in refused('tools/train.py', trained[0], '--work-dir', tmp_path / 'work',
                           '--cfg-options', *options)


@pytest.mark.skipif(torch.cuda.is_available(), reason='GPUs need no C++ compiler')
@pytest.mark.slow
def test_compiling_without_a_compiler(trained, tmp_path, monkeypatch):
    config, work, _ = trained
    monkeypatch.setenv('CXX', 'no-such-compiler')
    says = refused('tools/test.py', config, work / 'iter_4.pth', '--work-dir', tmp_path,
                   '--compile')
    assert 'no-such-compiler is not on the PATH' in says


@pytest.mark.slow
def test_amp_without_a_gpu(trained, tmp_path):
    if torch.cuda.is_available():
        run('tools/train.py', trained[0], '--work-dir', tmp_path / 'work', '--amp')
    else:
        assert 'needs a GPU' in refused('tools/train.py', trained[0], '--amp')


@pytest.mark.slow
def test_a_checkpoint_for_other_classes(trained, tmp_path):
    config, work, _ = trained
    other = torch.load(work / 'iter_4.pth', weights_only=True)['state_dict']
    for name in ('weight', 'bias'):
        other[f'decode_head.conv_seg.{name}'] = torch.zeros_like(
            other[f'decode_head.conv_seg.{name}'])[:5]
    torch.save(dict(state_dict=other), tmp_path / 'other.pth')
    message = refused('tools/test.py', config, tmp_path / 'other.pth', '--work-dir', tmp_path)
    assert ('decode_head.conv_seg.weight is 5x32x1x1 in the checkpoint and 8x32x1x1 in the model'
            in message)
    assert '--load-from' in message
    done = run('tools/train.py', config, '--work-dir', tmp_path / 'work', '--load-from',
               tmp_path / 'other.pth')
    assert re.search('Left as initialised, .*decode_head.conv_seg.weight is 5x32x1x1',
                     done.stdout)
    new = torch.load(tmp_path / 'work' / 'iter_4.pth', weights_only=True)['state_dict']
    assert new['decode_head.conv_seg.weight'].shape[0] == 8


@pytest.mark.slow
@pytest.mark.parametrize(('command', 'says'), [
    (['tools/train.py', 'configs/none.py'], 'config not found: configs/none.py'),
    (['tools/train.py', '{config}', '--load-from', 'none.pth'], 'checkpoint not found: none.pth'),
    (['tools/test.py', '{config}', 'none.pth'], 'checkpoint not found: none.pth'),
    (['tools/test.py', '{config}', '{checkpoint}', '--isr-ratio', '0'],
     'isr_ratio 0 is not an integer from 1 up'),
    (['tools/test.py', '{config}', '{checkpoint}', '--isr-ratio', '2211-2222'],
     '4 multipliers for the decoder, which has 3 stages'),
    (['tools/test.py', '{config}', '{checkpoint}', '--isr-ratio', 'fast'],
     "cannot parse isr_ratio 'fast'"),
])
def test_wrong_command_lines(trained, tmp_path, command, says):
    config, work, _ = trained
    filled = [word.format(config=config, checkpoint=work / 'iter_4.pth') for word in command]
    assert says in refused(*filled, '--work-dir', tmp_path)
