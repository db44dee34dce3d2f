"""Sheets of attention, features and predictions: they show what the network computes."""
import math
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from mmseg_edaformer.analysis.attention import look
from mmseg_edaformer.analysis.labelled import read_labels
from mmseg_edaformer.analysis.sheets import draw_cells, draw_cross, paint, project, relative_error
from mmseg_edaformer.analysis.visualize import (
    choose_points,
    find_subject,
    parse_point,
    visualize,
)
from mmseg_edaformer.errors import ConfigError, DataError, RatioError
from mmseg_edaformer.isr import ISRRatio
from mmseg_edaformer.predict.segmenter import Segmenter
from tests.processes import done, run_tool


@pytest.fixture
def path(scenes):
    return scenes / 'images' / 'validation' / '00000.png'


@pytest.fixture
def mask(scenes):
    return scenes / 'annotations' / 'validation' / '00000.png'


def test_pixels_have_the_value_of_their_cell():
    values = np.arange(6.).reshape(2, 3)
    edges = np.array([0, 8, 12]), np.array([0, 4, 8, 9])
    found = paint(values, edges, (14, 20), (1., 0.5))
    wanted = np.full((14, 20), np.nan)
    for (row, column), value in np.ndenumerate(values):
        wanted[slice(*edges[0][row:row + 2]), slice(*2 * edges[1][column:column + 2])] = value
    assert np.array_equal(found, wanted, equal_nan=True)


def test_one_projection_for_all():
    direction = F.normalize(torch.randn(6), dim=0)
    along = torch.randn(5, 7) * 10
    features = direction[:, None, None] * along + torch.randn(6, 5, 7) * 0.01 + 3
    (view, same, _), (none, difference) = project([features, features, features * 1.1])
    sign = direction[direction.abs().argmax()].sign()
    assert np.corrcoef(view.ravel(), (sign * along).numpy().ravel())[0, 1] > 0.9999
    assert np.array_equal(same, view)
    assert not none.any()
    assert relative_error(features * 1.1, features) == pytest.approx(0.1, rel=1e-4)
    # Squared differences add up to that of the whole.
    assert math.sqrt((difference ** 2).mean()) == pytest.approx(0.1, rel=1e-4)
    assert np.isfinite(project([torch.zeros(4, 2, 2)])[0][0]).all()


def test_points():
    assert parse_point('12,7', (10, 20)) == (12, 7)
    assert parse_point('0.5,0.25', (10, 20)) == (10, 2)
    assert parse_point('1.0,1.0', (10, 20)) == (19, 9)
    labels = np.zeros((30, 40), np.uint8)
    labels[:, 25:] = 2
    labels[:6, :8] = 1
    chosen = choose_points(labels)
    assert [labels[y, x] for x, y in chosen] == [0, 2, 1]
    assert math.dist(chosen[1], (32, 15)) < 9
    assert choose_points(np.zeros((1, 1), np.uint8)) == [(0, 0)]


@pytest.mark.parametrize(('point', 'says'), [
    ('20,5', 'point 20,5 lies outside of x.png, which has columns 0 to 19 and rows 0 to 9'),
    ('-1,5', 'outside'), ('1.2,0.5', 'outside'), ('a,b', "point 'a,b'"), ('.,1', "point '.,1'"),
    ('5', "cannot parse point '5': give column and row in pixels, 120,80"),
])
def test_points_that_are_none(point, says):
    with pytest.raises(ConfigError, match=says):
        parse_point(point, (10, 20), 'x.png')


def silent(*args, **options):
    return visualize(*args, **{'say': lambda text: None, **options})


def test_the_panels_are_what_they_say(segmenter, path, mask, tmp_path):
    """Painted cells show in the sheet, and the truth is that of the mask."""
    name = 'backbone.stages.0.blocks.0.attn'
    silent(segmenter, [path], tmp_path, isr_ratio=['none', '2'], points=['40,20'], layers=[name],
           labels=mask)
    assert segmenter.isr_ratio == ISRRatio.parse('none')
    sheet = np.array(Image.open(tmp_path / '00000_attention.png'))
    subject = find_subject(segmenter, path, ['40,20'])
    seen = look(segmenter.model, subject.inputs, [name], [subject.to_inputs((40, 20))])[0][name]
    density = seen.density()[0]
    image = draw_cells(subject, (300, 200), density, seen.cells, 'inferno', 0.,
                       float(density.max()), photo=True)
    draw_cross(image, subject, (40, 20))
    panel = np.array(image)
    x, y = cv2.minMaxLoc(cv2.matchTemplate(sheet, panel, cv2.TM_SQDIFF))[2]
    assert (sheet[y:y + 200, x:x + 300] == panel).all()
    truth = read_labels(mask.parent, path, (64, 96), 8, False)
    assert (truth == np.array(Image.open(mask))).all()
    zero = read_labels(mask, path, (64, 96), 8, True)
    assert ((zero == 255) == ((truth == 0) | (truth == 255))).all()


@pytest.mark.parametrize(('options', 'error', 'says'), [
    (dict(images=['a.png', 'b/a.png']), DataError, 'under one name'),
    (dict(points=['96,3']), ConfigError, 'point 96,3 lies outside of .*a.png.* columns 0 to 95'),
    (dict(layers=['nothing']), ConfigError, r'no attention layer is called nothing. There are: '
     r'backbone.stages.0.blocks.0.attn, .*decode_head.levels.2.0.attn'),
    (dict(isr_ratio=['none', '22-222']), RatioError, '2 multipliers for the encoder'),
    (dict(out='text.png'), ConfigError, 'text.png cannot be written to'),
    (dict(labels='b'), DataError, 'mask .*a.png'),
    (dict(labels='void'), DataError, r'void holds 0 masks called a.\*, not one'),
    (dict(labels='a.png', images=['a.png', 'c.png']), ConfigError,
     'for several images, give the folder of their masks'),
])
def test_bad_input(segmenter, path, tmp_path, options, error, says):
    for name in 'b', 'void':
        (tmp_path / name).mkdir()
    (tmp_path / 'text.png').write_text('words')
    for name in 'a.png', 'b/a.png', 'c.png':
        shutil.copy(path, tmp_path / name)
    options = dict(images=['a.png'], out='out') | options
    images = [tmp_path / name for name in options.pop('images')]
    if 'labels' in options:
        options['labels'] = tmp_path / options['labels']
    with pytest.raises(error, match=says):
        silent(segmenter, images, tmp_path / options.pop('out'), **options)
    assert not list(tmp_path.glob('out/*'))


def test_models_that_do_not_fit(segmenter, other, path, tmp_path, monkeypatch):
    monkeypatch.setattr(Segmenter, 'classes', property(lambda self: (
        ('one', 'two') if self is other else segmenter.description.classes)))
    with pytest.raises(ConfigError, match=r'cars predicts 2 classes that are not the 8 of '):
        silent(segmenter, [path], tmp_path / 'out', others=[('cars', other)])


def test_command_line(edaformer, segformer, segmenter, path, mask, tmp_path):
    command = ('tools/visualize.py', path, '--model', Path(edaformer[0]).parent,
               '--out', tmp_path / 'out')
    output = done(*command, '--with', ':'.join(segformer), '--isr-ratio', 'none', '2',
                  '2211-222', '--labels', mask, '--points', '10,10', '0.9,0.9',
                  '--device', 'cpu')
    for kind in 'attention', 'features', 'predictions':
        with Image.open(tmp_path / 'out' / f'00000_{kind}.png') as sheet:
            assert np.array(sheet).std() > 20
    assert sheet.width == 40 + 4 * (440 + 10) - 10
    # The figures are those of the predictions.
    labels = {}
    for ratio in '2', 'none':
        segmenter.isr_ratio = ratio
        labels[ratio] = segmenter(path).labels
    changed = (labels['2'] != labels['none']).mean()
    assert changed > 0
    line = next(line for line in output.splitlines() if '| ISR 2 ' in line)
    assert line.split()[-2] == f'{changed:.1%}'
    for text in ('decode_head.levels.2.0.attn', 'segformer', 'Written: ',
                 f'point 1 at 10,10: {segmenter.classes[labels["none"][10, 10]]}'):
        assert text in output
    assert 'Warning' not in output
    for flags, says in ((('--isr-ratios', 'none'), '--isr-ratios is now --isr-ratio'),
                        (('--with', 'none.py'), 'no such model: none.py'),
                        (('--labels', 'none.png'), 'mask not found: none.png')):
        assert says in run_tool(*command, *flags)[1]
