"""Export a trained model to ONNX Runtime, OpenVINO, torch.export or a web page, and check it."""
import argparse
import os
import sys
from pathlib import Path

from mmseg_edaformer.command_line import (
    add_isr_ratio,
    add_keep_ratio,
    add_model_arguments,
    check_model,
    image_size,
    read_isr_ratio,
)
from mmseg_edaformer.errors import ConfigError, clear_errors


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog='--format web takes none of --size, --labels, --int8, '
        '--calibrate, --isr-ratio, --query-ratio and --keep-ratio.')
    add_model_arguments(parser)
    parser.add_argument('--format', required=True, choices=('onnx', 'openvino', 'pt2', 'web'))
    parser.add_argument('--out', required=True, metavar='FILE',
                        help='.onnx, .xml (its weights go to a .bin beside it) or .pt2; a folder '
                        'for web')
    add_isr_ratio(parser, note='; fixed in the file, or runtime: an input of it, also for '
                  '--query-ratio (default: none)')
    add_keep_ratio(parser)
    parser.add_argument('--size', type=image_size, metavar='H,W', help='height and width of all '
                        'images, one number for squares (default: any size from a minimum up)')
    parser.add_argument('--labels', action='store_true', help='give a label map at the size of the '
                        "image in place of the head's logits")
    parser.add_argument('--int8', action='store_true', help='quantise the model; onnx and openvino')
    parser.add_argument('--calibrate', metavar='FOLDER', help='images like those that the model '
                        'will see, for --int8')
    parser.add_argument('--images', metavar='FOLDER', help='images for the comparison with PyTorch '
                        '(default: test images of the config, or else drawn ones)')
    parser.add_argument('--samples', type=int, default=40, metavar='N', help='labelled test images '
                        'for the mIoU of --int8 (default: %(default)s)')
    parser.add_argument('--threads', type=int, metavar='N', help='threads of PyTorch and of the '
                        'runtime in the comparison (default: as PyTorch)')
    parser.add_argument('--runtime', metavar='FOLDER', help='the unpacked npm package '
                        'onnxruntime-web, for web (default: npm gets it)')
    args = parser.parse_args()
    if args.format == 'web':
        for name in ('size', 'labels', 'int8', 'calibrate', 'query_ratio', 'keep_ratio'):
            if getattr(args, name):
                parser.error(f'--{name.replace("_", "-")} does not work with --format web')
        if args.isr_ratio not in ('none', 'runtime'):
            parser.error('--isr-ratio does not work with --format web: it has a slider')
    elif args.runtime is not None:
        parser.error('--runtime is for --format web')
    return args


def main() -> None:
    args = parse_args()
    check_model(args.model, args.checkpoint)
    for name in ('calibrate', 'images'):
        source = getattr(args, name)
        if source is not None and not (Path(source).exists() or '*' in source or '?' in source):
            raise ConfigError(f'--{name} {source} does not exist: give a folder of images')
    sys.path.insert(0, os.getcwd())  # for the custom_imports of configs
    import logging

    from mmseg_edaformer import compat
    compat.provide_home()  # before mmengine, which needs one
    from mmengine.logging import MMLogger

    from mmseg_edaformer.export import export
    from mmseg_edaformer.export.web import export_page
    MMLogger.get_current_instance().setLevel(logging.WARNING)
    if args.format == 'web':
        print(export_page(args.model, args.out, checkpoint=args.checkpoint, images=args.images,
                          threads=args.threads, runtime=args.runtime))
        return
    print(export(args.model, args.out, format=args.format, checkpoint=args.checkpoint,
                 isr_ratio=read_isr_ratio(args), size=args.size, labels=args.labels, int8=args.int8,
                 calibrate=args.calibrate, images=args.images, samples=args.samples,
                 threads=args.threads, keep_ratio=args.keep_ratio))


if __name__ == '__main__':
    with clear_errors():
        main()
