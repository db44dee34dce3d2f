"""Put the results of tools/test.py at several ISR ratios side by side: a table and a picture."""
import argparse

from mmseg_edaformer.analysis import compare
from mmseg_edaformer.errors import clear_errors


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('results', nargs='+', help='what tools/test.py --json wrote for each ratio '
                        'of one checkpoint, of a segmentor or a classifier')
    parser.add_argument('--picture', metavar='PNG',
                        help='where to draw predictions; not of a classifier')
    parser.add_argument('--cfg-options', nargs='+', metavar='KEY=VALUE',
                        help='those that tools/test.py was given')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    print(compare.compare(args.results, args.picture, args.cfg_options))


if __name__ == '__main__':
    with clear_errors():
        main()
