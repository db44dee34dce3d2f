"""Put a few ISR ratios of one checkpoint side by side: a table of mIoU and time, and a picture."""
import argparse
from pathlib import Path

from mmseg_edaformer.command_line import (
    add_cfg_options,
    add_isr_ratio,
    check_checkpoint,
    find_config,
)
from mmseg_edaformer.errors import ConfigError, clear_errors


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, usage='%(prog)s CONFIG CHECKPOINT [options]\n'
        '       %(prog)s RESULT.json [RESULT.json ...] [options]')
    parser.add_argument('inputs', nargs='+', metavar='FILE',
                        help='config and checkpoint of a segmentor, which is tested here; or what '
                        'tools/test.py --json wrote for each ratio of one checkpoint, of a '
                        'segmentor or a classifier')
    add_isr_ratio(parser, several=True, default=None,
                  note=' (default: none optimal 2 auto); not with RESULT.json')
    parser.add_argument('--large', type=int, default=0, metavar='N',
                        help='also test on N larger drawn worlds, 1024,1024 pixels, whose objects '
                        'are as large as those of the demo that the model was trained on')
    parser.add_argument('--picture', metavar='PNG', help='draw predictions of a segmentor there')
    add_cfg_options(parser)
    args = parser.parse_args()
    args.results = all(Path(name).suffix == '.json' for name in args.inputs)
    if args.results and (args.large or args.isr_ratio):
        parser.error('--isr-ratio and --large test a checkpoint: give CONFIG and CHECKPOINT')
    if not args.results and len(args.inputs) != 2:
        parser.error('give CONFIG and CHECKPOINT, or .json files of tools/test.py --json')
    if args.large < 0:
        parser.error(f'--large {args.large}: give 0 or more')
    return args


def main() -> None:
    args = parse_args()
    if args.results:
        for name in args.inputs:
            if not Path(name).exists():
                raise ConfigError(f'{name} cannot be read: No such file or directory')
    else:
        find_config(args.inputs[0])
        check_checkpoint(args.inputs[1])
    from mmseg_edaformer.analysis import compare
    if args.results:
        print(compare.compare_results(args.inputs, args.picture, args.cfg_options))
    else:
        config, checkpoint = args.inputs
        print(compare.compare_checkpoint(
            config, checkpoint, args.isr_ratio or ['none', 'optimal', '2', 'auto'],
            large=args.large, picture=args.picture, cfg_options=args.cfg_options))


if __name__ == '__main__':
    with clear_errors():
        main()
