"""A few ratios of one checkpoint side by side, on its test set and on larger worlds."""
import pytest
from PIL import Image

from mmseg_edaformer.analysis import compare
from mmseg_edaformer.errors import ConfigError
from tests.conftest import ROOT
from tests.processes import done


def rows(text):
    """The cells of a table."""
    return [line.strip('| ').replace(' ', '').split('|') for line in text.splitlines()
            if line.startswith('|')]


def test_command_line(edaformer, tmp_path, monkeypatch):
    """Of a checkpoint that is tested on the way, also on larger worlds."""
    monkeypatch.setattr(compare, '_LARGE', (512, 512))
    config = tmp_path / 'larger.py'  # images on which a ratio saves what the table shows
    config.write_text(f"""
_base_ = ['{edaformer[0]}']
model = dict(data_preprocessor=dict(size=(128, 128)))
test_dataloader = dict(dataset=dict(pipeline=[
    dict(type='LoadImageFromFile'), dict(type='ResizeToMultiple', size_divisor=128),
    dict(type='LoadSegLabels', num_classes=8), dict(type='PackSegInputs')]))
""")
    told = done('tools/compare_isr.py', config, edaformer[1], '--isr-ratio', '2', 'auto',
                '--large', 1, '--picture', tmp_path / 'x.png',
                '--cfg-options', 'test_dataloader.dataset.indices=2')
    head, *body = rows(told)
    assert head == ['isr_ratio', 'mIoU', 'change', 'GMACs', 'ms', 'time', 'best']
    small, large = ({row[0]: float(row[3]) for row in part} for part in (body[:3], body[4:]))
    assert small.keys() == large.keys() == {'none', '2', 'auto'}
    assert small['2'] < small['none'] == small['auto']  # auto acts on large images only
    assert max(large['2'], large['auto']) < large['none']
    assert 'Larger worlds: 1 images of 512x512 pixels' in told
    assert Image.open(tmp_path / 'x.png').size[0] > 1000


def test_what_cannot_be_compared(edaformer, monkeypatch):
    with pytest.raises(ConfigError, match='has no IoUMetric as test_evaluator'):
        compare.compare_checkpoint(f'{ROOT}/configs/eft_t_crops.py', edaformer[1], ['2'])
    monkeypatch.setattr(compare, 'CLASSES', ('other',))
    with pytest.raises(ConfigError, match='--large draws scenes, whose classes are not those'):
        compare.compare_checkpoint(*edaformer, ['2'], large=1)
