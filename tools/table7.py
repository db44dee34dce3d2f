"""Costs of the paper's table 7 (ISR on other backbones), ours beside the paper's. Runs nothing."""
import argparse
from pathlib import Path

import torch

import mmseg_edaformer
from mmseg_edaformer.analysis import table7
from mmseg_edaformer.errors import clear_errors

CONFIGS = Path(mmseg_edaformer.__file__).parents[1] / 'configs'


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    names = [row.name for row in table7.TABLE7]
    parser.add_argument('models', nargs='*', default=names, metavar='MODEL',
                        help=f'which columns: {", ".join(names)}; all by default')
    parser.add_argument('--isr-ratio', nargs='+', default=table7.RATIOS,
                        help='ratios to try, of which the nearest to the paper is shown')
    parser.add_argument('--all', action='store_true', help='also show every ratio that was tried')
    args = parser.parse_args()
    if unknown := set(args.models) - set(names):
        parser.error(f'no such column: {", ".join(sorted(unknown))}; they are {", ".join(names)}')
    return args


def main() -> None:
    args = parse_args()
    rows = [table7.measure(row, CONFIGS, args.isr_ratio) for row in table7.TABLE7
            if row.name in args.models]
    print(table7.table(rows))
    if args.all:
        print(table7.tried_table(rows))
    print(f'One image, counted on the meta device, torch {torch.__version__}. "paper": arXiv '
          '2407.17261, table 7; it publishes neither sizes nor ratios: the nearest of those tried '
          'is shown.')


if __name__ == '__main__':
    with clear_errors():
        main()
