"""An image at the trained ISR ratio and at another, side by side."""
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmseg.apis import init_model
from PIL import Image

from mmseg_edaformer import report_isr
from mmseg_edaformer.errors import ConfigError, DataError, RatioError
from mmseg_edaformer.isr import ISRRatio
from mmseg_edaformer.predict.comparison import Comparer
from mmseg_edaformer.predict.segmenter import Segmenter
from tests.conftest import ROOT
from tests.predict.conftest import expected

RATIO = ISRRatio.parse('4111-111')


@pytest.fixture
def comparer(whole):
    return Comparer(Segmenter(*whole, device='cpu'))


def test_a_comparison_is_what_segmenter_and_report_say(comparer, whole_segmenter, files):
    path = str(files / '0.png')
    made = comparer.compare(path, RATIO)
    trained, chosen = (expected(whole_segmenter, path, ratio).labels for ratio in ('none', RATIO))
    assert (made.results[0].labels == trained).all()
    assert (made.results[1].labels == chosen).all()
    assert made.changed == (trained != chosen).mean() > 0
    assert made.gmacs == pytest.approx(
        [macs / 1e9 for macs in report_isr(whole_segmenter.model, RATIO, (128, 192)).macs])
    assert min(made.milliseconds) > 0
    assert 1 <= made.rounds <= 5
    assert comparer.compare(path, RATIO) is made
    same = comparer.compare(path, comparer.ratio([1] * 7))
    assert same.changed == 0
    assert same.gmacs[0] == same.gmacs[1] == made.gmacs[0]


def test_requests_at_once_do_not_mix_their_ratios(comparer, whole_segmenter, files):
    ratios = [comparer.ratio([first, *[1] * 6]) for first in (2, 4, 8)]
    path = str(files / '1.png')
    with ThreadPoolExecutor(3) as threads:
        comparisons = list(threads.map(lambda ratio: comparer.compare(path, ratio), ratios))
    for ratio, made in zip(ratios, comparisons, strict=True):
        assert (made.results[1].labels == expected(whole_segmenter, path, ratio).labels).all()


def test_the_windows_of_a_sliding_model_are_all_counted(comparer, whole_segmenter, files):
    comparer.segmenter.model.test_cfg = ConfigDict(
        mode='slide', crop_size=(64, 64), stride=(64, 64))
    made = comparer.compare(str(files / '0.png'), RATIO)
    one = report_isr(whole_segmenter.model, RATIO, (64, 64)).macs
    assert made.gmacs == pytest.approx([6 * macs / 1e9 for macs in one])


def test_large_images_are_scaled_down_and_turned_ones_upright(whole_segmenter, files):
    made = Comparer(whole_segmenter, 96).compare(str(files / 'turned.jpg'), RATIO)
    assert made.results[0].labels.shape == (96, 64)
    upright = np.array(Image.open(files / '0.png').rotate(-90, expand=True).resize((64, 96)))
    assert np.abs(made.results[0].image[..., ::-1].astype(int) - upright).mean() < 10
    with pytest.raises(ConfigError, match='--max-side 8: give 32 or more'):
        Comparer(whole_segmenter, 8)


def test_what_cannot_be_read_is_named_as_it_was_uploaded(comparer, files, tmp_path):
    with pytest.raises(DataError, match=r'image cannot be decoded: broken.png \(3000 bytes\)'):
        comparer.compare(str(files / 'broken.png'), RATIO)
    Image.new('1', (10000, 10000)).save(tmp_path / 'bomb.png')
    with pytest.raises(DataError, match=r'bomb.png .* it has 10000x10000 pixels, more than 67108'):
        comparer.compare(str(tmp_path / 'bomb.png'), RATIO)


def test_stages_are_those_of_the_model(comparer, tmp_path):
    assert comparer.stages == dict(encoder=(1, 2, 3, 4), decoder=(2, 3, 4))
    assert str(comparer.ratio([2, 2, 1, 1, 3, 2, 1])) == '2211-321'
    assert comparer.multipliers('optimal') == [2, 2, 1, 1, 2, 2, 2]
    config = ROOT / 'configs' / 'segformer_b0_synthetic.py'
    model = init_model(str(config), device='cpu')
    torch.save(dict(state_dict=model.state_dict(), meta={}), tmp_path / 'b0.pth')
    other = Comparer(Segmenter(config, tmp_path / 'b0.pth', device='cpu'))
    assert other.stages == dict(encoder=(1, 2, 3, 4))
    assert other.ratio([1, 1, 1, 1]) == ISRRatio.parse('none')
    assert str(other.ratio([2, 2, 1, 1])) == '2211-1'
    assert other.multipliers('optimal') == [2, 2, 1, 1]
    assert other.multipliers('211-1') is None
    other.segmenter.model.backbone = torch.nn.Identity()
    with pytest.raises(RatioError, match='holds no attention that ISR can reduce'):
        Comparer(other.segmenter)
