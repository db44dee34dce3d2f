"""Test a segmentor or a classifier, at any ISR ratio."""
import argparse

from mmseg_edaformer.command_line import (
    add_isr_ratio,
    add_run_arguments,
    check_checkpoint,
    find_config,
    read_isr_ratio,
    run_settings,
)
from mmseg_edaformer.errors import clear_errors


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='the config that the checkpoint was trained with')
    parser.add_argument('checkpoint', help='.pth or .safetensors')
    add_isr_ratio(parser, default=None, note=', or 2211 for a classifier (default: as the config '
                  'says)')
    parser.add_argument('--isr-method', default='average', metavar='METHOD',
                        help='how keys are reduced: average (default), max, overlap or bipartite')
    parser.add_argument('--tta', action='store_true', help='test-time augmentation')
    parser.add_argument('--bf16', action='store_true', help='compute in bfloat16')
    parser.add_argument('--out', metavar='DIR', help='write the predicted labels there as PNG')
    parser.add_argument('--json', metavar='FILE', help='write metrics, ratio and time to this file')
    parser.add_argument('--show', action='store_true', help='show each prediction in a window')
    parser.add_argument('--show-dir', metavar='DIR', help='write each prediction there as an image')
    parser.add_argument('--wait-time', type=float, default=2., metavar='SECONDS',
                        help='time that --show shows each image')
    add_run_arguments(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    find_config(args.config)
    check_checkpoint(args.checkpoint)
    from mmseg_edaformer import compat
    from mmseg_edaformer.engine import launch
    from mmseg_edaformer.engine.run_config import load_config
    cfg = load_config(args.config, **run_settings(args))
    launch.prepare_test(cfg, args.checkpoint, isr_ratio=read_isr_ratio(args),
                        isr_method=args.isr_method, tta=args.tta, out=args.out, show=args.show,
                        show_dir=args.show_dir, wait_time=args.wait_time, bf16=args.bf16,
                        skip_bad_files=args.skip_bad_files)
    launch.evaluate(cfg, args.json, bf16=args.bf16)
    compat.leave_distributed()


if __name__ == '__main__':
    with clear_errors():
        main()
