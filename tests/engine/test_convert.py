"""The authors' checkpoints in, ours out."""
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmseg_edaformer import EFT
from mmseg_edaformer.engine import load_from_file
from mmseg_edaformer.engine.convert import convert_file, convert_state_dict
from mmseg_edaformer.errors import CheckpointError
from tests import plain
from tests.conftest import run
from tests.processes import run_tool


def released(size='tiny', num_classes=150, **more):
    """A state dict as the authors save it, with the unused classifier."""
    state = plain.build(size, num_classes).state_dict()
    state['decode_head.conv_seg.weight'] = torch.zeros(num_classes, 128, 1, 1)
    state['decode_head.conv_seg.bias'] = torch.zeros(num_classes)
    return dict(state, **more)


@pytest.mark.parametrize('target', ['ours.pth', 'ours.safetensors'])
def test_a_segmentor(tmp_path, target):
    state = released('tiny', 19)
    torch.save(dict(meta=dict(CLASSES=('road', 'car'), PALETTE=[[1, 2, 3], [4, 5, 6]]),
                    state_dict=state, optimizer=dict(state={}, param_groups=[])),
               tmp_path / 'theirs.pth')
    conversion = convert_file(tmp_path / 'theirs.pth', tmp_path / target)
    assert conversion.dropped.keys() == {'decode_head.conv_seg.weight',
                                         'decode_head.conv_seg.bias'}
    assert conversion.renamed.keys() | conversion.dropped.keys() == state.keys()
    assert 'edaformer_t_cityscapes.py' in conversion.advice
    content = load_from_file(tmp_path / target)
    written = content['state_dict']
    assert torch.equal(written['decode_head.levels.2.1.attn.kv.weight'],
                       state['decode_head.attn44.attn.sr.weight'])
    assert torch.equal(written['decode_head.conv_seg.bias'],
                       state['decode_head.linear_pred.bias'])
    if target.endswith('.pth'):
        assert content['meta']['dataset_meta'] == dict(classes=('road', 'car'),
                                                       palette=[[1, 2, 3], [4, 5, 6]])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(['theirs.pth', target])


@pytest.mark.parametrize('wrap', [lambda state: state, lambda state: dict(state_dict=state),
                                  lambda state: dict(model=state)])
@pytest.mark.parametrize('size', ['tiny', 'base'])
def test_an_imagenet_encoder(tmp_path, wrap, size):
    state = plain.build(size).backbone.state_dict()
    torch.save(wrap(dict(state, **{'head.weight': torch.zeros(1000, 8),
                                   'head.bias': torch.zeros(1000)})), tmp_path / 'EFT.pth')
    conversion = convert_file(tmp_path / 'EFT.pth', tmp_path / 'eft.safetensors')
    assert conversion.backbone_only
    assert f'EFT {size}' in conversion.advice
    assert conversion.dropped.keys() == {'head.weight', 'head.bias'}
    EFT(size).load_state_dict(load_file(tmp_path / 'eft.safetensors'))


@pytest.mark.parametrize(('change', 'message'), [
    (lambda s: s.pop('backbone.block3.4.attn.sr.weight'),
     'backbone.stages.2.blocks.4.attn.kv.weight is missing'),
    (lambda s: s.update({'backbone.block1.0.extra': torch.zeros(1)}),
     'backbone.block1.0.extra is not known'),
    (lambda s: s.update({'backbone.norm2.weight': torch.zeros(5)}),
     r'backbone.stages.1.norm.weight is \(5,\), not \(64,\)'),
    (lambda s: s.pop('backbone.patch_embed1.proj.weight'), 'patch_embed1.proj.weight is missing'),
])
def test_every_key_is_strict(change, message):
    state = released()
    change(state)
    with pytest.raises(CheckpointError, match=message):
        convert_state_dict(state)


def test_another_network_is_refused():
    with pytest.raises(CheckpointError, match='not those of an EDAFormer'):
        convert_state_dict({'conv1.weight': torch.zeros(64, 3, 7, 7)})


def test_a_truncated_file_writes_nothing(tmp_path):
    torch.save(dict(state_dict=released()), tmp_path / 'whole.pth')
    data = (tmp_path / 'whole.pth').read_bytes()
    (tmp_path / 'cut.pth').write_bytes(data[:len(data) // 2])
    for target in ('new.pth', 'new.safetensors'):
        with pytest.raises(CheckpointError, match=r'cut.pth is damaged or cut short'):
            convert_file(tmp_path / 'cut.pth', tmp_path / target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['cut.pth', 'whole.pth']


def test_a_full_disk_leaves_nothing(tmp_path):
    torch.save(released(), tmp_path / 'theirs.pth')
    (tmp_path / f'.new.{os.getpid()}.partial.pth').symlink_to('/dev/full')
    with pytest.raises(CheckpointError, match=r'new\.pth cannot be written'):
        convert_file(tmp_path / 'theirs.pth', tmp_path / 'new.pth')
    assert [path.name for path in tmp_path.iterdir()] == ['theirs.pth']


def test_command_line(tmp_path):
    save_file(released('base', 171), tmp_path / 'theirs.safetensors')
    code, output = run_tool('tools/convert_checkpoint.py', tmp_path / 'theirs.safetensors',
                            tmp_path / 'ours.pth')
    assert code == 0
    assert 'backbone.block1.0.attn.sr.weight -> backbone.stages.0.blocks.0.attn.kv.weight' in output
    assert 'use configs/edaformer_b_cocostuff.py' in output
    for arguments, message in (
            (['none.pth', 'new.pth'], 'error: checkpoint not found: none.pth\n'),
            ([tmp_path / 'ours.pth', 'new.pth', '--config', 'none.py'],
             'error: config not found: none.py\n'),
            ([tmp_path / 'ours.pth', 'new.onnx'], 'write to a .pth or a .safetensors file')):
        code, output = run_tool('tools/convert_checkpoint.py', *arguments)
        assert code == 1
        assert message in output


def test_a_wrong_path_is_told_before_the_heavy_imports():
    script = """
import runpy, sys
sys.argv = ['tools/convert_checkpoint.py', 'none.pth', 'new.pth']
try:
    runpy.run_path(sys.argv[0], run_name='__main__')
finally:
    print('torch' in sys.modules)
"""
    done = run('-c', script, check=False)
    assert done.returncode == 1
    assert done.stdout == 'False\n'
