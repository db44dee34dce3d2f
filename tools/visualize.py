"""Draw what ISR does to an image: its attention, the features of that, and the predictions.

Writes NAME_attention.png, NAME_features.png and NAME_predictions.png for each image.
"""
import argparse
from pathlib import Path

from mmseg_edaformer.command_line import (
    Renamed,
    add_device,
    add_isr_ratio,
    add_model_arguments,
    add_reduce_zero_label,
    check_inputs,
    check_model,
    read_isr_ratio,
)
from mmseg_edaformer.errors import DataError, clear_errors


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('images', nargs='+', metavar='IMAGE',
                        help='images, folders, patterns such as "photos/*.jpg"')
    add_model_arguments(parser)
    parser.add_argument('--out', required=True, metavar='DIR', help='folder for the sheets')
    add_isr_ratio(parser, several=True, note='; the others are compared with the first '
                  '(default: none optimal)')
    parser.set_defaults(isr_ratio=['none', 'optimal'])
    parser.add_argument('--isr-ratios', action=Renamed, new='--isr-ratio')
    parser.add_argument('--with', nargs='+', default=[], dest='others',
                        metavar='MODEL[:CHECKPOINT]',
                        help='other models of the same classes, whose predictions are shown beside')
    parser.add_argument('--points', nargs='+', default=[], metavar='X,Y',
                        help='queries whose attention is shown: column and row of pixels, 120,80, '
                        'or fractions of width and height, 0.5,0.3 (default: in the three largest '
                        'classes)')
    parser.add_argument('--layers', nargs='+', default=[], metavar='NAME',
                        help='attention layers, also as patterns such as "decode_head.*" '
                        '(default: the last of each stage)')
    parser.add_argument('--labels', metavar='MASK', help='the mask of the image, or a folder of '
                        'masks with the names of the images: class indices, 255 for none')
    add_reduce_zero_label(parser)
    add_device(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    others = []
    for text in args.others:
        model, _, checkpoint = text.partition(':')
        others.append((model, checkpoint or None))
    check_inputs(args.images)
    for model, checkpoint in ((args.model, args.checkpoint), *others):
        check_model(model, checkpoint)
    if args.labels is not None and not Path(args.labels).exists():
        raise DataError(f'mask not found: {args.labels}')
    from mmseg_edaformer.analysis.visualize import visualize
    from mmseg_edaformer.predict.segmenter import Segmenter
    visualize(Segmenter(args.model, args.checkpoint, device=args.device), args.images, args.out,
              isr_ratio=read_isr_ratio(args), points=args.points, layers=args.layers,
              others=[(Path(model).stem, Segmenter(model, checkpoint, device=args.device))
                      for model, checkpoint in others],
              labels=args.labels, reduce_zero_label=args.reduce_zero_label)


if __name__ == '__main__':
    with clear_errors():
        main()
