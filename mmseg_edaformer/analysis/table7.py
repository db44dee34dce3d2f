"""The costs of the paper's table 7, ISR on other backbones, beside those of this repository.

Source: arXiv 2407.17261, table 7: Cityscapes, one pass of 1024x2048 pixels. It publishes neither
the sizes of the backbones and of the decoder nor the ratios, so they are chosen to come near.
"""
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mmengine.config import Config
from prettytable import PrettyTable

from ..cost import on_meta, trace_macs
from ..errors import ConfigError, RatioError
from ..isr import isr
from .loading import load_model


class Published(NamedTuple):
    """A column of table 7: its name, our config, and the paper's GFLOPs without and with ISR."""
    name: str
    config: str
    gflops: float
    gflops_isr: float
    input_size: tuple[int, int] = (1024, 2048)


TABLE7 = {row.name: row for row in (
    Published('CvT', 'isr_backbones/cvt_13_cityscapes', 365.5, 222.6),
    # At 1024x2048 CvT's attention alone costs more than that; one window comes near.
    Published('CvT-1024', 'isr_backbones/cvt_13_cityscapes', 365.5, 222.6, (1024, 1024)),
    Published('MViT', 'isr_backbones/mvitv2_tiny_cityscapes', 1435.6, 838.0),
    Published('LVT', 'isr_backbones/lvt_cityscapes', 132.1, 86.1),
    Published('Swin', 'isr_backbones/swin_tiny_cityscapes', 272.2, 208.0),
    Published('DaViT', 'isr_backbones/davit_tiny_cityscapes', 304.8, 242.0),
    Published('PVTv2', 'isr_backbones/pvtv2_b0_cityscapes', 121.8, 63.4),
    Published('MiT', 'isr_backbones/mit_b0_cityscapes', 117.4, 59.0),
    Published('SegFormer', 'isr_backbones/segformer_b0_cityscapes', 125.5, 82.5),
    Published('FeedFormer', 'isr_backbones/feedformer_b0_cityscapes', 107.5, 68.8),
    Published('EDAFormer', 'edaformer_t_cityscapes', 151.7, 94.9),
)}

RATIOS = ('1-2', '1-3', '1-4', '2', '3', '4', '2211-1', '2211-222', '2221-222', '2222-333',
          '211-222', '221-222')
"""The ratios tried; those of another number of stages than a model has are passed over."""

_COLUMNS = ('model', 'size', 'M parameters', 'GMACs', 'paper', 'off by', 'isr_ratio',
            'GMACs with ISR', 'paper with ISR', 'off by ', 'note')


def table(names: Sequence[str], configs: Path, ratios: Sequence[str] = RATIOS, *,
          every: bool = False, input_size: tuple[int, int] | None = None) -> str:
    """Count what models cost, and format them beside the paper.

    Args:
        names: Columns of table 7; all of them if there are none.
        configs: Folder of the configs.
        ratios: ISR ratios to try, of which the one nearest to the paper's cost is shown.
        every: Whether to show every ratio that fits.
        input_size: Height and width in pixels in place of the paper's.

    Raises:
        ConfigError: There is no such column.
    """
    if unknown := [name for name in names if name not in TABLE7]:
        raise ConfigError(f'no such column: {", ".join(unknown)}; they are {", ".join(TABLE7)}')
    lines = PrettyTable(_COLUMNS, align='r')
    lines.align['model'] = lines.align['note'] = 'l'
    for name in names or TABLE7:
        lines.add_rows(_rows(TABLE7[name], configs, ratios, every, input_size))
    return lines.get_string(fields=[name for name in _COLUMNS if name != 'note' or
                                    any(row[-1] for row in lines.rows)])


def _rows(published: Published, configs: Path, ratios: Sequence[str], every: bool,
          input_size: tuple[int, int] | None) -> list[list[str]]:
    size = input_size or published.input_size
    row = [published.name, '{},{}'.format(*size)]
    try:
        model = load_model(Config.fromfile(configs / f'{published.config}.py'))
    except ConfigError as error:
        return [[*row, '-', *_beside(None, published.gflops), '-',
                 *_beside(None, published.gflops_isr), str(error)]]
    reduced, note = {}, ''
    with on_meta(model) as shadow:
        gmacs = trace_macs(shadow, size) / 1e9
        for ratio in ratios:
            try:
                with isr(shadow, ratio):
                    reduced[ratio] = trace_macs(shadow, size) / 1e9
            except RatioError as error:
                note = str(error)
    row += [f'{sum(p.numel() for p in model.parameters()) / 1e6:.2f}',
            *_beside(gmacs, published.gflops)]
    if reduced:
        note = ''
    if '2' in reduced and reduced['2'] == reduced.get('1-2'):
        note = 'the encoder is not reduced'
    shown = {ratio: macs for ratio, macs in reduced.items() if every or macs < gmacs}
    if reduced and not shown:
        note = 'ISR reduces nothing'
    if shown and not every:
        nearest = min(shown, key=lambda ratio: abs(shown[ratio] - published.gflops_isr))
        shown = {nearest: shown[nearest]}
    lines: list[tuple[str, float | None]] = [*shown.items()] or [('-', None)]
    return [[*row, ratio, *_beside(macs, published.gflops_isr), note] for ratio, macs in lines]


def _beside(gmacs: float | None, paper: float) -> list[str]:
    return ['-' if gmacs is None else f'{gmacs:.1f}', str(paper),
            '-' if gmacs is None else f'{gmacs / paper - 1:+.1%}']
