"""Costs of the paper's table 7 (ISR on other backbones), ours beside the paper's. Runs nothing."""
import argparse
from pathlib import Path

from mmseg_edaformer.command_line import add_isr_ratio, read_isr_ratio
from mmseg_edaformer.errors import clear_errors

CONFIGS = Path(__file__).parents[1] / 'configs'


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('models', nargs='*', metavar='MODEL',
                        help='columns of the table, such as MiT or Swin (default: all)')
    add_isr_ratio(parser, several=True, default=None,
                  note='; the one nearest to the paper is shown')
    parser.add_argument('--all', action='store_true', help='show every ratio that fits')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    import torch

    from mmseg_edaformer.analysis import table7
    print(table7.table(args.models, CONFIGS, read_isr_ratio(args, table7.RATIOS), every=args.all))
    print(f'One image, counted on the meta device, torch {torch.__version__}. "paper": arXiv '
          '2407.17261, table 7; it publishes neither sizes nor ratios: the nearest of those tried '
          'is shown.')


if __name__ == '__main__':
    with clear_errors():
        main()
