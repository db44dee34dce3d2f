"""Draw what ISR does to a picture: its attention, the features of that, and the predictions.

Writes NAME_attention.png, NAME_features.png and NAME_predictions.png for each picture.
"""
import argparse
from pathlib import Path

from mmseg_edaformer.analysis.visualize import visualize
from mmseg_edaformer.command_line import add_model_arguments
from mmseg_edaformer.errors import clear_errors
from mmseg_edaformer.predict.segmenter import Segmenter


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('pictures', nargs='+', metavar='PICTURE',
                        help='pictures, folders, patterns such as "photos/*.jpg"')
    add_model_arguments(parser)
    parser.add_argument('--out', required=True, metavar='DIR', help='where the sheets go')
    parser.add_argument('--isr-ratios', nargs='+', default=['none', 'optimal'], metavar='RATIO',
                        help='as of tools/test.py; the first one is what the others are compared '
                        'with (default: none optimal)')
    parser.add_argument('--with', nargs='+', default=[], dest='others',
                        metavar='MODEL[:CHECKPOINT]',
                        help='other models of the same classes, whose predictions stand beside')
    parser.add_argument('--points', nargs='+', default=[], metavar='X,Y',
                        help='queries whose attention is shown: column and row of pixels, 120,80, '
                        'or fractions of width and height, 0.5,0.3 (default: in the three largest '
                        'classes)')
    parser.add_argument('--layers', nargs='+', default=[], metavar='NAME',
                        help='attention layers, also as patterns such as "decode_head.*" '
                        '(default: the last of each stage)')
    parser.add_argument('--labels', metavar='MASK', help='the mask of the picture, or a folder of '
                        'masks called as the pictures are: class indices, 255 for none')
    parser.add_argument('--reduce-zero-label', action='store_true',
                        help='in the masks 0 means no label and 1 the first class, as in ADE20K')
    parser.add_argument('--device', help='cpu, cuda, cuda:1; by default a GPU if there is one')
    return parser.parse_args()


def load_other(text: str, device: str | None) -> tuple[str, Segmenter]:
    """A model of MODEL[:CHECKPOINT], and what it is called."""
    model, _, checkpoint = text.partition(':')
    return Path(model).stem, Segmenter(model, checkpoint or None, device=device)


def main() -> None:
    args = parse_args()
    segmenter = Segmenter(args.model, args.checkpoint, device=args.device)
    visualize(segmenter, args.pictures, args.out, ratios=args.isr_ratios,
              others=[load_other(text, args.device) for text in args.others], points=args.points,
              layers=args.layers, labels=args.labels, reduce_zero_label=args.reduce_zero_label)


if __name__ == '__main__':
    with clear_errors():
        main()
