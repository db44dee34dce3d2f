"""Measure one checkpoint at many ISR ratios and recommend one for a drop or a budget."""
import argparse
import logging
import os
import sys
from pathlib import Path

from mmseg_edaformer.command_line import (
    Renamed,
    add_cfg_options,
    add_dataset,
    add_isr_ratio,
    add_keep_ratio,
    add_reduce_zero_label,
    check_checkpoint,
    check_inputs,
    check_model,
    find_config,
)
from mmseg_edaformer.errors import clear_errors


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', nargs='?', help='the config that the checkpoint was trained with')
    parser.add_argument('checkpoint', nargs='?', help='.pth or .safetensors')
    parser.add_argument('--model', help='in place of a config: what tools/predict.py takes, such '
                        'as a folder or hub name of transformers')
    parser.add_argument('--images', metavar='DIR', help='with --model, the images')
    parser.add_argument('--masks', metavar='DIR', help='with --model, masks with the names of the '
                        'images: class indices, 255 for none')
    add_dataset(parser, '--images and --masks')
    add_reduce_zero_label(parser)
    add_keep_ratio(parser)
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
    args = parser.parse_args()
    own, folders = (args.config, args.checkpoint), (args.images, args.masks)
    is_own = all(own) and not any((args.model, args.dataset, *folders))
    if not (is_own or (args.model and not any((*own, args.cfg_options)) and (
            not any(folders) if args.dataset else all(folders)))):
        parser.error('give CONFIG and CHECKPOINT, or --model and either --images and --masks or '
                     '--dataset')
    return args


def main() -> None:
    args = parse_args()
    if args.model is None:
        find_config(args.config)
        check_checkpoint(args.checkpoint)
    else:
        check_model(args.model)
        check_inputs([] if args.dataset else [args.images, args.masks])
    sys.path.insert(0, os.getcwd())  # for the custom_imports of configs
    from mmseg_edaformer.analysis import sweep
    goal = sweep.Goal(args.max_drop, args.budget_ms, args.budget_gmacs)
    from mmengine.logging import MMLogger
    MMLogger.get_current_instance().setLevel(logging.WARNING)
    wanted = dict(isr_ratios=args.isr_ratio, query_ratio=args.query_ratio, goal=goal)
    if args.model is None:
        sweep.sweep(args.config, args.checkpoint, samples=args.samples, out=args.out,
                    cfg_options=args.cfg_options, **wanted)
        return
    from mmseg_edaformer.analysis.bench import open_folders
    from mmseg_edaformer.predict.segmenter import Segmenter
    segmenter = Segmenter(args.model, keep_ratio=args.keep_ratio)
    print(segmenter, flush=True)
    folder = Path(args.out or Path('work_dirs', f'isr_sweep_{Path(args.model).name}'))
    images, masks = args.images, args.masks
    if args.dataset:
        from mmseg_edaformer.analysis.labelled import unpack_dataset
        images, masks = unpack_dataset(args.dataset, folder / 'data')
    bench = open_folders(segmenter, images, masks, folder=folder, samples=args.samples,
                         reduce_zero_label=args.reduce_zero_label)
    options = ['--keep-ratio'] if args.keep_ratio else []
    sweep.sweep_bench(bench, folder, [args.model, '', *options], **wanted)


if __name__ == '__main__':
    with clear_errors():
        main()
