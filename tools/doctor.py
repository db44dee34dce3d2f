"""Check that this machine can train and test, and say how to fix what it lacks."""
import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where the package is not installed

from mmseg_edaformer.command_line import find_config
from mmseg_edaformer.errors import clear_errors


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog='The exit code is 0 if training and testing can run, else 1.')
    parser.add_argument('config', nargs='?', help='also check this config and its data')
    parser.add_argument('--json', action='store_true',
                        help='print the report as JSON, to paste into a bug report')
    parser.add_argument('--timeout', type=float, default=120., metavar='SECONDS',
                        help='time after which one step counts as hanging (default: %(default)g)')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.config:
        find_config(args.config)
    from mmseg_edaformer import doctor
    if sys.stderr.isatty():
        print('Importing and trying the libraries takes some seconds.', file=sys.stderr)
    report = doctor.examine(args.config, args.timeout)
    if args.json:
        print(doctor.as_json(report))
    else:
        doctor.show(report)
    sys.exit(not report.ready)


if __name__ == '__main__':
    with clear_errors():
        main()
