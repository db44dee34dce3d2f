"""Write a trained model for ONNX Runtime, OpenVINO or torch.export, and check it beside PyTorch."""
import argparse
import logging
import os
import sys

from mmseg_edaformer.command_line import add_model_arguments
from mmseg_edaformer.errors import ConfigError, clear_errors
from mmseg_edaformer.export import FORMATS, export


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_arguments(parser)
    parser.add_argument('--format', required=True, choices=FORMATS)
    parser.add_argument('--out', required=True, metavar='FILE',
                        help='.onnx, .xml (with a .bin beside it) or .pt2')
    parser.add_argument('--isr-ratio', default='none', metavar='RATIO',
                        help='as of tools/test.py, fixed in the file (default: none)')
    parser.add_argument('--size', metavar='H,W', help='height and width of all images (default: '
                        'any, from a minimum up)')
    parser.add_argument('--labels', action='store_true', help='give a label map at the size of the '
                        "image in place of the head's logits")
    parser.add_argument('--int8', action='store_true', help='quantise; onnx and openvino')
    parser.add_argument('--calibrate', metavar='FOLDER',
                        help='for --int8: images like those that it will see')
    parser.add_argument('--images', metavar='FOLDER', help='what the file is compared with PyTorch '
                        'on (default: test images of the config, or else drawn ones)')
    parser.add_argument('--samples', type=int, default=40, metavar='N', help='labelled test images '
                        'for the mIoU of --int8 (default: 40)')
    parser.add_argument('--threads', type=int, metavar='N',
                        help='of PyTorch and of the runtime, for the check (default: as PyTorch)')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    sys.path.insert(0, os.getcwd())  # for the custom_imports of configs
    from mmengine.logging import MMLogger  # after mmseg_edaformer, which provides a home
    MMLogger.get_current_instance().setLevel(logging.WARNING)
    size = None
    if args.size is not None:
        sides = args.size.split(',')
        if len(sides) != 2 or not all(side.isdecimal() for side in sides):
            raise ConfigError(f"--size '{args.size}': give height and width, as 512,1024")
        size = int(sides[0]), int(sides[1])
    print(export(args.model, args.out, format=args.format, checkpoint=args.checkpoint,
                 isr=args.isr_ratio, size=size, labels=args.labels, int8=args.int8,
                 calibrate=args.calibrate, images=args.images, samples=args.samples,
                 threads=args.threads))


if __name__ == '__main__':
    with clear_errors():
        main()
