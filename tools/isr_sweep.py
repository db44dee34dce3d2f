"""Measure one checkpoint at many ISR ratios and recommend one for a drop or a budget."""
import argparse
import logging
import os
import sys

from mmseg_edaformer.analysis import sweep
from mmseg_edaformer.errors import clear_errors


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='the config that the checkpoint was trained with')
    parser.add_argument('checkpoint', help='.pth or .safetensors')
    parser.add_argument('--max-drop', type=float, metavar='POINTS',
                        help='recommend the cheapest ratio that loses at most so much mIoU')
    parser.add_argument('--budget-ms', type=float, metavar='MS',
                        help='recommend the best mIoU within so many ms per image, here')
    parser.add_argument('--budget-gmacs', type=float, metavar='GMACS',
                        help='recommend the best mIoU within so many GMACs per image')
    parser.add_argument('--samples', type=int, metavar='N',
                        help='so many images, drawn at random (default: the whole test set)')
    parser.add_argument('--ratios', nargs='+', default=sweep.DEFAULT, metavar='RATIO',
                        help='as for tools/test.py; greedy stands for the search over stages '
                        f'(default: {" ".join(sweep.DEFAULT)})')
    parser.add_argument('--out', metavar='DIR', help='where the results go, and what a later sweep '
                        'goes on from (default: in work_dirs/ and the name of the config)')
    parser.add_argument('--cfg-options', nargs='+', metavar='KEY=VALUE',
                        help='replace settings of the config')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    sys.path.insert(0, os.getcwd())  # for the custom_imports of configs
    from mmengine.logging import MMLogger  # after mmseg_edaformer, which provides a home
    MMLogger.get_current_instance().setLevel(logging.WARNING)
    goal = sweep.Goal(args.max_drop, args.budget_ms, args.budget_gmacs)
    sweep.sweep(args.config, args.checkpoint, ratios=args.ratios, goal=goal, samples=args.samples,
                out=args.out, cfg_options=args.cfg_options)


if __name__ == '__main__':
    with clear_errors():
        main()
