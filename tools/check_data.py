"""Look at every image and mask, or image and class, of a config's data and say what is wrong."""
import argparse
import sys
from pathlib import Path

from mmseg_edaformer.data.audit import report as audit_report
from mmseg_edaformer.engine.run_config import load_config
from mmseg_edaformer.errors import clear_errors


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog='Exit code: 1 when there are errors, 0 when there are none or '
        'only warnings.')
    parser.add_argument('config', help='such as configs/edaformer_t_ade.py or eft_t_in1k.py, '
                        'or any of mmseg')
    parser.add_argument('--split', nargs='+', choices=('train', 'val', 'test'), metavar='SPLIT',
                        help='of train, val and test (default: all that the config has)')
    parser.add_argument('--out', metavar='DIR', help='where report.json and the pictures go '
                        '(default: work_dirs/, the name of the config, /data_check)')
    parser.add_argument('--workers', type=int, metavar='N', help='processes (default: all cores)')
    parser.add_argument('--no-cache', action='store_true', help='read files again that have not '
                        'changed since the last time')
    parser.add_argument('--fix', action='store_true', help='write mended copies to DIR/fixed, '
                        'the data stays as it is; not of a classifier')
    parser.add_argument('--cfg-options', nargs='+', metavar='KEY=VALUE',
                        help='replace settings of the config')
    args = parser.parse_args()
    if args.workers is not None and args.workers < 1:
        parser.error('--workers must be 1 or more')
    return args


def main() -> None:
    args = parse_args()
    cfg = load_config(args.config, cfg_options=args.cfg_options)
    out = args.out or Path('work_dirs', Path(args.config).stem, 'data_check')
    errors = audit_report.check(cfg, out, args.split, workers=args.workers, fresh=args.no_cache,
                                mend=args.fix)
    sys.exit(1 if errors else 0)


if __name__ == '__main__':
    with clear_errors():
        main()
