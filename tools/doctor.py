"""Say what this machine and environment have, what is wrong with them, and what mends it."""
import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog='Ends with 0 when training and testing can run, otherwise 1.')
    parser.add_argument('config', nargs='?', help='check this config and its data as well')
    parser.add_argument('--json', action='store_true',
                        help='print the same as JSON, to be pasted into a bug report')
    parser.add_argument('--timeout', type=float, default=120., metavar='SECONDS',
                        help='what takes longer to import counts as hanging (%(default)g)')
    return parser.parse_args()


def load_doctor() -> Any:
    """mmseg_edaformer.doctor by its file: importing the package needs what is checked here."""
    path = Path(__file__).resolve().parents[1] / 'mmseg_edaformer' / 'doctor.py'
    spec = importlib.util.spec_from_file_location('_doctor', path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    args = parse_args()
    doctor = load_doctor()
    if sys.stderr.isatty():
        print('Trying what is installed takes some seconds.', file=sys.stderr)
    with doctor.load_sibling('errors').clear_errors():
        report = doctor.examine(args.config, args.timeout)
        if args.json:
            print(doctor.as_json(report))
        else:
            doctor.show(report)
    sys.exit(not report.ready)


if __name__ == '__main__':
    main()
