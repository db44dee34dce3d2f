"""Segment very many images, in folders or shards, on all cores or GPUs of many machines."""
import argparse

from mmseg_edaformer.command_line import (
    add_cost_arguments,
    add_model_arguments,
    check_inputs,
    check_model,
    read_isr_ratio,
)
from mmseg_edaformer.errors import clear_errors


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog='Re-running resumes where it stopped.')
    parser.add_argument('input', help='a folder, a file or a pattern such as "shards/*.tar": of '
                        'images, of .tar as WebDataset has them, or of .parquet')
    add_model_arguments(parser)
    parser.add_argument('--out', required=True, metavar='DIR', help='folder for the results')
    add_cost_arguments(parser)
    parser.add_argument('--workers', type=int, metavar='N', help='number of models at once '
                        '(default: one for each GPU, or without one for each core)')
    parser.add_argument('--threads', type=int, default=1, metavar='N',
                        help='cores of each worker (default: 1)')
    parser.add_argument('--address', help='address of a running Ray: auto, or ray://host:10001 '
                        '(default: start one on this machine)')
    parser.add_argument('--overlays', action='store_true', help='write overlays as well')
    parser.add_argument('--batch-size', type=int, metavar='N', help='predict up to N images of '
                        'equal size at once (default: 8 on a GPU, 1 on a CPU)')
    parser.add_argument('--column', metavar='NAME', help='column of a .parquet that holds the '
                        'images (default: image), or ending of their names in a .tar, such as jpg')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    check_inputs([args.input])
    check_model(args.model, args.checkpoint)
    from mmseg_edaformer.predict.bulk import predict_many
    from mmseg_edaformer.predict.outputs import describe_summary
    summary = predict_many(
        args.input, args.model, args.out, checkpoint=args.checkpoint,
        isr_ratio=read_isr_ratio(args), max_side=args.max_side, keep_ratio=args.keep_ratio,
        workers=args.workers, threads=args.threads, address=args.address,
        overlays=args.overlays, batch_size=args.batch_size, column=args.column)
    overlays = 'overlays, ' if args.overlays else ''
    print(describe_summary(summary, args.out, f'masks, {overlays}legend.png, manifest.jsonl and '
                           'summary.json'))


if __name__ == '__main__':
    with clear_errors():
        main()
