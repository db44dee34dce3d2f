"""Put a few ISR ratios of one checkpoint side by side: a table of mIoU and time, and a picture."""
import argparse

from mmseg_edaformer.command_line import (
    add_cfg_options,
    add_isr_ratio,
    check_checkpoint,
    find_config,
    read_isr_ratio,
)
from mmseg_edaformer.errors import clear_errors


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='the config that the checkpoint was trained with')
    parser.add_argument('checkpoint', help='.pth or .safetensors')
    add_isr_ratio(parser, several=True, note=' (default: none optimal 2 auto)')
    parser.set_defaults(isr_ratio=['none', 'optimal', '2', 'auto'])
    parser.add_argument('--large', type=int, default=0, metavar='N',
                        help='also test on N larger drawn worlds, 1024,1024 pixels, whose objects '
                        'are as large as those of the demo that the model was trained on')
    parser.add_argument('--picture', metavar='PNG', help='draw predictions there')
    add_cfg_options(parser)
    args = parser.parse_args()
    if args.large < 0:
        parser.error(f'--large {args.large}: give 0 or more')
    return args


def main() -> None:
    args = parse_args()
    find_config(args.config)
    check_checkpoint(args.checkpoint)
    from mmseg_edaformer.analysis.compare import compare_checkpoint
    print(compare_checkpoint(args.config, args.checkpoint, read_isr_ratio(args), large=args.large,
                             picture=args.picture, cfg_options=args.cfg_options))


if __name__ == '__main__':
    with clear_errors():
        main()
