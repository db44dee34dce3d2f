"""Measure this project on a GPU in a few minutes, and write gpu.json and the page gpu.md."""
import argparse
import json
import os
import sys
from pathlib import Path


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--out', default='docs', metavar='DIR',
                        help='where gpu.json and gpu.md go (default: %(default)s)')
    parser.add_argument('--page-of', metavar='JSON',
                        help='measure nothing: write gpu.md from this file')
    parser.add_argument('--seconds', type=float, default=460., metavar='S',
                        help='leave out what no longer fits into these (default: %(default)s)')
    parser.add_argument('--size', nargs='+', type=int, default=[512, 1024, 2048], metavar='SIDE',
                        help='sides of the square images in pixels (default: %(default)s)')
    parser.add_argument('--batch-size', nargs='+', type=int, default=[1, 8, 32], metavar='N')
    parser.add_argument('--train-batch', type=int, default=16, metavar='N',
                        help='images per training step (default: %(default)s)')
    parser.add_argument('--workers', type=int, metavar='N',
                        default=max(1, (os.cpu_count() or 3) - 2),
                        help='processes that read training images (default: %(default)s)')
    parser.add_argument('--repeats', type=int, default=30, metavar='N',
                        help='most rounds of a cell (default: %(default)s)')
    parser.add_argument('--steps', type=int, default=60, metavar='N',
                        help='steps of the training from files (default: %(default)s)')
    parser.add_argument('--gemm', type=int, default=8192, metavar='SIDE',
                        help='of the matrices whose product gives the rate (default: %(default)s)')
    return parser.parse_args()


def main(args: argparse.Namespace) -> int:
    from mmseg_edaformer.analysis.gpu_benchmark import Settings, Suite
    from mmseg_edaformer.analysis.gpu_page import page
    from mmseg_edaformer.errors import ConfigError
    from mmseg_edaformer.files import write_file

    out = Path(args.out)
    sound = True
    if args.page_of:
        try:
            found = json.loads(Path(args.page_of).read_text(encoding='utf-8'))
            text = page(found)
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f'--page-of {args.page_of}: it is no gpu.json of this tool '
                              f'({type(error).__name__}: {error})') from error
    else:
        suite = Suite(Settings(
            sorted(set(args.size)), sorted(set(args.batch_size)), args.train_batch, args.seconds,
            args.workers, args.repeats, args.steps, args.gemm, out / 'gpu.json'))
        sound = suite.run()
        text = page(suite.found)
    write_file(out / 'gpu.md', text)
    print(f'Written: {out / "gpu.md"}')
    return 0 if sound else 1


if __name__ == '__main__':
    arguments = parse_args()  # before what takes seconds to import
    from mmseg_edaformer.errors import clear_errors
    with clear_errors():
        sys.exit(main(arguments))
