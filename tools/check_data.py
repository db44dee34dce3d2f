"""Look at every image and mask, or image and class, of a config's data and report what is wrong."""
import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mmseg_edaformer.command_line import add_cfg_options, find_config
from mmseg_edaformer.errors import clear_errors


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog='Exit code: 1 when there are errors, 0 when there are none or '
        'only warnings.')
    parser.add_argument('config', help='such as configs/edaformer_t_ade.py or eft_t_in1k.py, '
                        'or any of mmseg')
    parser.add_argument('--split', nargs='+', choices=('train', 'val', 'test'), metavar='SPLIT',
                        help='train, val, test or several (default: all that the config has)')
    parser.add_argument('--out', metavar='DIR', help='folder for report.json and the figures '
                        '(default: work_dirs/, the name of the config, /data_check)')
    parser.add_argument('--workers', type=int, metavar='N', help='processes (default: all cores)')
    parser.add_argument('--fix', action='store_true', help='write fixed copies to DIR/fixed and '
                        'leave the data as it is; not for classifiers')
    add_cfg_options(parser)
    args = parser.parse_args(argv)
    if args.workers is not None and args.workers < 1:
        parser.error('--workers must be 1 or more')
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    path = find_config(args.config)
    from mmseg_edaformer.data.audit import report
    from mmseg_edaformer.engine.run_config import load_config
    cfg = load_config(args.config, cfg_options=args.cfg_options)
    out = args.out or Path('work_dirs', path.stem, 'data_check')
    errors = report.check(cfg, out, args.split, workers=args.workers, with_fixes=args.fix)
    sys.exit(1 if errors else 0)


if __name__ == '__main__':
    with clear_errors():
        main()
