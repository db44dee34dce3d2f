"""The costs of the paper's table 7, ISR on other backbones, beside those of this repository.

Source: arXiv 2407.17261, table 7: Cityscapes, one pass of 1024x2048 pixels. It publishes neither
the sizes of the backbones and of the decoder nor the ratios, so they are chosen to come near.
"""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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


TABLE7 = (
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
)

RATIOS = ('1-2', '1-3', '1-4', '2', '3', '4', '2211-1', '2211-222', '2221-222', '2222-333',
          '211-222', '221-222')
"""The ratios tried; those of another number of stages than a model has are passed over."""


def choose(names: Sequence[str]) -> list[Published]:
    """Return the columns of these names, or all.

    Raises:
        ConfigError: There is no such column.
    """
    known = {row.name: row for row in TABLE7}
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f'no such column: {", ".join(unknown)}; they are {", ".join(known)}')
    return [known[name] for name in names or known]


@dataclass(frozen=True)
class Measured:
    """What one model costs: parameters, GMACs without ISR, and at each ratio that fits.

    ``problem`` says why there is nothing to show.
    """
    published: Published
    parameters: int = 0
    gmacs: float = 0.
    reduced: Mapping[str, float] = field(default_factory=dict)
    problem: str = ''

    @property
    def nearest(self) -> str | None:
        """The ratio whose cost is nearest to the paper's with ISR, of those that reduce it."""
        return min((ratio for ratio, gmacs in self.reduced.items() if gmacs < self.gmacs),
                   key=lambda ratio: abs(self.reduced[ratio] - self.published.gflops_isr),
                   default=None)

    @property
    def note(self) -> str:
        """What ISR does not reduce, or the problem."""
        if self.reduced and self.nearest is None:
            return 'ISR reduces nothing'
        if '2' in self.reduced and self.reduced['2'] == self.reduced.get('1-2'):
            return 'the encoder is not reduced'
        return self.problem


def measure(published: Published, configs: Path, ratios: Sequence[str] = RATIOS,
            input_size: tuple[int, int] | None = None) -> Measured:
    """Build the model of a column and count what it costs without and with ISR.

    ``configs`` is their folder, and ``input_size`` stands in for the column's.
    """
    input_size = input_size or published.input_size
    try:
        model = load_model(Config.fromfile(configs / f'{published.config}.py'))
    except ConfigError as error:
        return Measured(published, problem=str(error))
    reduced, problem = {}, ''
    with on_meta(model) as shadow:
        gmacs = trace_macs(shadow, input_size) / 1e9
        for ratio in ratios:
            try:
                with isr(shadow, ratio):
                    reduced[ratio] = trace_macs(shadow, input_size) / 1e9
            except RatioError as error:
                problem = str(error)
    return Measured(published, sum(p.numel() for p in model.parameters()), gmacs, reduced,
                    '' if reduced else problem)


def table(rows: Sequence[Measured]) -> str:
    """Format the rows, each at the ratio that is nearest to the paper."""
    lines = PrettyTable(['model', 'size', 'M parameters', 'GMACs', 'paper', 'off by', 'isr_ratio',
                         'GMACs with ISR', 'paper with ISR', 'off by ', 'note'], align='r')
    lines.align['model'] = lines.align['note'] = 'l'
    for row in rows:
        known, ratio = row.published, row.nearest
        lines.add_row([
            known.name, '{},{}'.format(*known.input_size),
            f'{row.parameters / 1e6:.2f}' if row.gmacs else '-',
            *_beside(row.gmacs or None, known.gflops), ratio or '-',
            *_beside(row.reduced.get(ratio or ''), known.gflops_isr), row.note])
    return lines.get_string(fields=[name for name in lines.field_names if name != 'note' or
                                    any(row.note for row in rows)])


def _beside(gmacs: float | None, paper: float) -> tuple[str, float, str]:
    return ('-', paper, '-') if gmacs is None else (
        f'{gmacs:.1f}', paper, f'{gmacs / paper - 1:+.1%}')


def tried_table(rows: Sequence[Measured]) -> str:
    """Format the GMACs of every model at every ratio that was tried; '-' where it does not fit."""
    ratios = list(dict.fromkeys(ratio for row in rows for ratio in row.reduced))
    lines = PrettyTable(['model', 'none', *ratios, 'paper with ISR'], align='r')
    lines.float_format = '.1'
    lines.align['model'] = 'l'
    for row in rows:
        lines.add_row([row.published.name, row.gmacs, *(
            row.reduced.get(ratio, '-') for ratio in ratios), row.published.gflops_isr])
    return str(lines)
