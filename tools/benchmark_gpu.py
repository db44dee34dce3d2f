"""Measure this project on a GPU in a few minutes, and write gpu.json and the page gpu.md."""
import argparse
import math
import os
import sys
from pathlib import Path

from mmseg_edaformer.command_line import image_size
from mmseg_edaformer.errors import clear_errors


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--out', default='docs', metavar='DIR',
                        help='folder for gpu.json and gpu.md (default: %(default)s)')
    parser.add_argument('--seconds', type=float, default=460., metavar='S',
                        help='leave out what no longer fits into S seconds (default: %(default)s)')
    parser.add_argument('--size', nargs='+', type=image_size, metavar='H,W',
                        default=[(side, side) for side in (512, 1024, 2048)],
                        help='image sizes in pixels, such as 1024,2048; one number is a square '
                        '(default: 512 1024 2048)')
    parser.add_argument('--batch-size', nargs='+', type=int, default=[1, 8, 32], metavar='N')
    parser.add_argument('--train-batch', type=int, default=16, metavar='N',
                        help='images per training step (default: %(default)s)')
    parser.add_argument('--workers', type=int, metavar='N',
                        default=max(1, (os.cpu_count() or 3) - 2),
                        help='processes that read training images (default: %(default)s)')
    parser.add_argument('--repeats', type=int, default=30, metavar='N',
                        help='maximum number of rounds of a cell (default: %(default)s)')
    parser.add_argument('--steps', type=int, default=60, metavar='N',
                        help='steps of the training from files (default: %(default)s)')
    parser.add_argument('--gemm', type=int, default=8192, metavar='SIDE',
                        help='side of the matrices whose product gives the rate (default: '
                        '%(default)s)')
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    from mmseg_edaformer.analysis.gpu_benchmark import Suite
    suite = Suite(sorted(set(args.size), key=math.prod), sorted(set(args.batch_size)),
                  args.train_batch, args.seconds, args.workers, args.repeats, args.steps,
                  args.gemm, Path(args.out))
    sound = suite.run()
    print(f'Written: {suite.out / "gpu.md"}')
    return 0 if sound else 1


if __name__ == '__main__':
    with clear_errors():
        sys.exit(main())
