"""Which ratios are valid, and how the others are refused."""
import pytest

from mmseg_edaformer.errors import RatioError
from mmseg_edaformer.isr import ISRRatio


@pytest.mark.parametrize(('value', 'encoder', 'decoder'), [
    (2, (2, 2, 2, 2), (2, 2, 2)), ('2', (2, 2, 2, 2), (2, 2, 2)), ('12', (12,) * 4, (12,) * 3),
    ('2211-222', (2, 2, 1, 1), (2, 2, 2)), ('2,2,1,1-2,2,2', (2, 2, 1, 1), (2, 2, 2)),
    ('16,8,1,1-2, 2, 2', (16, 8, 1, 1), (2, 2, 2)), ('optimal', (2, 2, 1, 1), (2, 2, 2)),
    (' Optimal ', (2, 2, 1, 1), (2, 2, 2)), ('none', (1,) * 4, (1,) * 3),
    ('1-2', (1,) * 4, (2,) * 3), (ISRRatio((3,), (1,)), (3,) * 4, (1,) * 3)])
def test_what_is_read(value, encoder, decoder):
    ratio = ISRRatio.parse(value)
    assert ratio.for_stages('encoder', 4) == encoder
    assert ratio.for_stages('decoder', 3) == decoder


@pytest.mark.parametrize('value', [0, -1, '0', '-1', '0011-222', '2211', '222', '', '-', '2211-',
                                   'fast', '2.5', 2.5, True, None, [2, 2], '2a11-222',
                                   '2211-222-2', '2,,1-2', 'auto-222', 'auto2'])
def test_what_is_refused_lists_what_is_valid(value):
    with pytest.raises(RatioError, match=r'2211-222.*none, optimal, auto'):
        ISRRatio.parse(value)


@pytest.mark.parametrize(('value', 'part', 'count'), [
    ('221-222', 'encoder', 4), ('2211-22', 'decoder', 3), ('2211-222', 'decoder', 2)])
def test_a_wrong_count_is_told_once_the_model_is_known(value, part, count):
    with pytest.raises(RatioError, match=f'{value} has .* {part}, which has {count} stages'):
        ISRRatio.parse(value).for_stages(part, count)


@pytest.mark.parametrize('value', ['2', '2211-222', '16,8,1,1-2,2,2', '1-2', '12,-3', '2-12,',
                                   '12,1,1,1-2', 'none', 'auto'])
def test_print_and_read_again(value):
    assert str(ISRRatio.parse(value)) == value
    assert ISRRatio.parse(str(ISRRatio.parse(value))) == ISRRatio.parse(value)


@pytest.mark.parametrize('value', [1, '1', '1-1', '1111-111'])
def test_one_everywhere_prints_none(value):
    assert str(ISRRatio.parse(value)) == 'none'


def test_auto_is_not_one_but_has_its_multipliers():
    ratio = ISRRatio.parse(' Auto ')
    assert ratio != ISRRatio.parse(1)
    assert ratio.for_stages('encoder', 4) == (1,) * 4
    with pytest.raises(RatioError, match='auto takes no multipliers'):
        ISRRatio((2,), (1,), auto=True)
