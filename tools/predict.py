"""Segment images, folders of them or a video: masks, overlays and the share of each class."""
import argparse
import json
import sys
from pathlib import Path

from mmseg_edaformer.command_line import (
    add_cost_arguments,
    add_dataset,
    add_device,
    add_model_arguments,
    add_reduce_zero_label,
    check_inputs,
    check_model,
    read_isr_ratio,
)
from mmseg_edaformer.errors import ConfigError, clear_errors


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog='Re-running resumes where it stopped.')
    parser.add_argument('input', nargs='*',
                        help='images, folders, patterns such as "photos/*.jpg", or one video')
    add_model_arguments(parser)
    parser.add_argument('--out', required=True, metavar='DIR', help='folder for the results')
    add_cost_arguments(parser)
    add_device(parser)
    parser.add_argument('--batch-size', type=int, metavar='N', help='predict up to N images of '
                        'equal size at once (default: 8 on a GPU, 1 on a CPU)')
    parser.add_argument('--video', action='store_true',
                        help='treat the input as a video, whatever its name ends in')
    parser.add_argument('--masks', action='store_true',
                        help='for a video, write the mask of each frame to masks/ as well')
    parser.add_argument('--labels', metavar='MASKS', help='a folder of masks with the names of the '
                        'images, class indices and 255 for none: report mIoU, accuracy and IoU')
    add_dataset(parser, 'images and --labels')
    add_reduce_zero_label(parser)
    parser.add_argument('--json', action='store_true', help='print the summary as JSON')
    args = parser.parse_args()
    if bool(args.input) == bool(args.dataset) or (args.dataset and args.labels):
        parser.error('give images or a video, or --dataset without --labels')
    return args


def main() -> None:
    args = parse_args()
    check_inputs([*args.input, *([args.labels] if args.labels else [])])
    check_model(args.model, args.checkpoint)
    if args.dataset:
        from mmseg_edaformer.analysis.labelled import unpack_dataset
        out = Path(args.out).resolve()
        images, args.labels = unpack_dataset(args.dataset, out.with_name(f'{out.name}_data'))
        args.input = [str(images)]
    from mmseg_edaformer.predict.inputs import is_video
    from mmseg_edaformer.predict.outputs import describe_summary
    from mmseg_edaformer.predict.run import predict_images, predict_video
    from mmseg_edaformer.predict.segmenter import Segmenter
    video = args.video or is_video(args.input[0])
    if video and len(args.input) > 1:
        raise ConfigError('one video at a time: give a single input')
    if args.masks and not video:
        raise ConfigError('--masks is for a video: images always get a mask')
    if args.labels and video:
        raise ConfigError('--labels is for images: leave it out')
    segmenter = Segmenter(args.model, args.checkpoint, device=args.device,
                          isr_ratio=read_isr_ratio(args), max_side=args.max_side,
                          keep_ratio=args.keep_ratio, batch_size=args.batch_size)
    print(segmenter, flush=True, file=sys.stderr if args.json else sys.stdout)
    if video:
        summary = predict_video(segmenter, args.input[0], args.out, masks=args.masks)
    else:
        summary = predict_images(segmenter, args.input, args.out)
    if args.labels:
        from mmseg_edaformer.analysis.labelled import score
        summary['metrics'] = score(summary, args.out, args.labels, args.reduce_zero_label)
    if args.json:
        print(json.dumps(summary, indent=2))
        return
    print(describe_summary(summary, args.out))
    if args.labels:
        print('{mIoU} mIoU, {accuracy} % of the pixels'.format(**summary['metrics']))


if __name__ == '__main__':
    with clear_errors():
        main()
