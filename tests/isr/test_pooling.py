"""The pure functions: cells, counts, biases, masks, methods; against loops and by hand."""
import math

import pytest
import torch

from mmseg_edaformer.errors import RatioError
from mmseg_edaformer.isr.pooling import (
    Layout,
    OpenRatio,
    cells,
    check_method,
    counts,
    merging,
    num_keys,
    pool_bias,
    pool_mask,
    pool_query_tokens,
    pool_tokens,
    spread_query_tokens,
)

GRIDS = [(4, 6), (5, 7), (1, 5), (7, 7)]


def members(grid, ratio):
    """The tokens of each cell, by a loop."""
    rows, columns = cells(grid, ratio)
    return [[y * grid[1] + x for y in range(grid[0]) for x in range(grid[1])
             if (y // ratio, x // ratio) == (row, column)]
            for row in range(rows) for column in range(columns)]


@pytest.mark.parametrize('grid', GRIDS, ids=str)
@pytest.mark.parametrize('ratio', [1, 2, 3, 9])
@pytest.mark.parametrize('method', ['average', 'max'])
def test_tokens_and_counts(grid, ratio, method):
    prefix, rest = 2, 1
    x = torch.randn(2, 3, prefix + grid[0] * grid[1] + rest, 5, dtype=torch.float64)
    layout = Layout((grid,), prefix)
    tokens = x[..., prefix:-rest, :]
    pool = torch.mean if method == 'average' else torch.amax
    expected = torch.cat([x[..., :prefix, :], *(
        pool(tokens[..., cell, :], -2, keepdim=True) for cell in members(grid, ratio)),
        x[..., -rest:, :]], -2)
    torch.testing.assert_close(pool_tokens(x, layout, ratio, method), expected)
    assert num_keys(layout, x.shape[-2], ratio) == expected.shape[-2]
    sizes = [1] * prefix + [len(cell) for cell in members(grid, ratio)] + [1] * rest
    assert counts(layout, x.shape[-2], ratio).tolist() == sizes


@pytest.mark.filterwarnings('ignore:a feature map is smaller than the cells')
@pytest.mark.parametrize('grid', GRIDS, ids=str)
@pytest.mark.parametrize('ratio', [1, 2, 3, 9])
def test_a_ratio_that_is_a_tensor(grid, ratio):
    """It computes by matrices what a number computes by pools, for keys and for queries."""
    x, layout = torch.randn(2, 3, 2 + grid[0] * grid[1] + 1, 5), Layout((grid,), 2)
    dial = OpenRatio(torch.tensor(ratio))
    assert cells(grid, dial) == cells(grid, ratio)
    for function in pool_tokens, pool_query_tokens:
        torch.testing.assert_close(function(x, layout, dial), function(x, layout, ratio))
    assert counts(layout, x.shape[-2], dial).equal(counts(layout, x.shape[-2], ratio))
    torch.testing.assert_close(
        spread_query_tokens(pool_query_tokens(x, layout, dial), layout, dial),
        spread_query_tokens(pool_query_tokens(x, layout, ratio), layout, ratio))
    with pytest.raises(RatioError, match='give one in place of runtime'):
        8 % dial
    maps = torch.randn(2, 3, *grid)
    pool = tuple(min(2 * ratio, side) for side in grid)
    torch.testing.assert_close(dial.average(maps, 2, whole=True),
                               torch.nn.functional.avg_pool2d(maps, pool))


@pytest.mark.parametrize('grid', GRIDS, ids=str)
@pytest.mark.parametrize('ratio', [2, 3])
def test_overlap_averages_a_window_around_each_anchor(grid, ratio):
    x = torch.randn(grid[0] * grid[1], 5, dtype=torch.float64)
    maps = x.reshape(*grid, 5)
    rows, columns = cells(grid, ratio)
    expected = torch.stack([
        maps[max(0, y - ratio + 1):y + ratio, max(0, x - ratio + 1):x + ratio].flatten(0, 1).mean(0)
        for y in range(0, rows * ratio, ratio) for x in range(0, columns * ratio, ratio)])
    torch.testing.assert_close(pool_tokens(x, Layout((grid,)), ratio, 'overlap'), expected)


@pytest.mark.parametrize('grid', GRIDS, ids=str)
@pytest.mark.parametrize('lowest', [-math.inf, torch.finfo(torch.float32).min, -1e5])
def test_bias(grid, lowest):
    bias, layout = torch.randn(3, 1 + grid[0] * grid[1]), Layout((grid,), 1)
    masked = torch.rand_like(bias) < 0.6
    masked[:, 1:][:, members(grid, 2)[0]] = True
    for hidden in (torch.zeros_like(masked), masked):
        means = [[row[free].mean() if free.any() else torch.tensor(lowest)
                  for row, free in zip(bias[:, 1:][:, cell], ~hidden[:, 1:][:, cell])]
                 for cell in members(grid, 2)]
        filled = bias.masked_fill(hidden, lowest)
        torch.testing.assert_close(pool_bias(filled, layout, 2), torch.cat(
            [filled[:, :1], torch.tensor(means).T], 1))
    cell_masks = [masked[:, 1:][:, cell].all(-1) for cell in members(grid, 2)]
    assert torch.equal(pool_mask(masked, layout, 2),
                       torch.stack([masked[:, 0], *cell_masks], -1))


def test_merging_joins_the_most_similar():
    """Of 3 x 3 keys the cells would leave 4, so the best 4 pairs of even and odd keys join."""
    x = torch.nn.functional.normalize(torch.randn(9, 8), dim=-1)
    x[1], x[5] = x[2] * 2, x[4] * 3
    keys = torch.cat([torch.randn(1, 8), x])[None, None]  # a class token in front
    weights = merging(keys, Layout(((3, 3),), 1), 2)[0, 0]
    assert weights.shape == (10, 6)
    torch.testing.assert_close(weights.sum(0), torch.ones(6))
    owner = weights.argmax(-1)
    assert owner[0] not in owner[1:], 'the class token stays alone'
    assert owner[1 + 1] == owner[1 + 2]
    assert owner[1 + 5] == owner[1 + 4]
    torch.testing.assert_close(weights[:, owner[2]].max(), 1 / (owner == owner[2]).sum().float())


def test_merging_stops_at_what_the_cells_would_leave():
    """Of 1 x 5 keys at r=2 three stay, as many as there are cells: the best two pairs join."""
    x = torch.eye(5, 8)
    x[1], x[3] = x[0], x[4] + 0.1 * x[2]
    weights = merging(x[None, None], Layout(((1, 5),)), 2)[0, 0]
    assert weights.argmax(-1).tolist() == [0, 0, 1, 2, 2]


@pytest.mark.parametrize('ratio', [2, 3, 9])
def test_merging_removes_at_most_half(ratio):
    keys = torch.randn(2, 3, 25, 8)
    weights = merging(keys, Layout(((4, 6),), 1), ratio)
    assert weights.shape == (2, 1, 25, 13)
    assert ((weights > 0).sum(-1) == 1).all(), 'every key is in one merged key'


def test_unknown_method():
    with pytest.raises(RatioError, match=r'mean.*use average, max, overlap, bipartite'):
        check_method('mean')
