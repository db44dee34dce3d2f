"""Measure one checkpoint at many ISR ratios and recommend one for a drop or a budget."""
import argparse
import logging
import os
import sys

from mmseg_edaformer.command_line import (
    Renamed,
    add_cfg_options,
    add_isr_ratio,
    check_checkpoint,
    find_config,
)
from mmseg_edaformer.errors import clear_errors


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='the config that the checkpoint was trained with')
    parser.add_argument('checkpoint', help='.pth or .safetensors')
    goal = parser.add_mutually_exclusive_group()
    goal.add_argument('--max-drop', type=float, metavar='POINTS',
                        help='recommend the cheapest ratio that loses at most so much mIoU')
    goal.add_argument('--budget-ms', type=float, metavar='MS',
                        help='recommend the best mIoU within so many ms per image on this machine')
    goal.add_argument('--budget-gmacs', type=float, metavar='GMACS',
                        help='recommend the best mIoU within so many GMACs per image')
    parser.add_argument('--samples', type=int, metavar='N',
                        help='measure N images, drawn at random (default: the whole test set)')
    add_isr_ratio(parser, several=True, default=None, note='; greedy stands for the search over '
                  'stages (default: none optimal 2 3 4 none+q2 2+q2 greedy)')
    parser.add_argument('--ratios', action=Renamed, new='--isr-ratio')
    parser.add_argument('--out', metavar='DIR', help='folder for the results, from which a later '
                        'sweep resumes (default: in work_dirs/ and the name of the config)')
    add_cfg_options(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    find_config(args.config)
    check_checkpoint(args.checkpoint)
    sys.path.insert(0, os.getcwd())  # for the custom_imports of configs
    from mmseg_edaformer.analysis import sweep
    goal = sweep.Goal(args.max_drop, args.budget_ms, args.budget_gmacs)
    from mmengine.logging import MMLogger
    MMLogger.get_current_instance().setLevel(logging.WARNING)
    sweep.sweep(args.config, args.checkpoint, isr_ratios=args.isr_ratio,
                query_ratio=args.query_ratio, goal=goal, samples=args.samples, out=args.out,
                cfg_options=args.cfg_options)


if __name__ == '__main__':
    with clear_errors():
        main()
