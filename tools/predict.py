"""Segment images, folders of them or a video: masks, overlays and the share of each class."""
import argparse

from mmseg_edaformer.command_line import (
    add_cost_arguments,
    add_device,
    add_model_arguments,
    check_inputs,
    check_model,
    read_isr_ratio,
)
from mmseg_edaformer.errors import ConfigError, clear_errors


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog='Re-running resumes where it stopped.')
    parser.add_argument('input', nargs='+',
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
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    check_inputs(args.input)
    check_model(args.model, args.checkpoint)
    from mmseg_edaformer.predict.inputs import is_video
    from mmseg_edaformer.predict.outputs import describe_summary
    from mmseg_edaformer.predict.run import predict_images, predict_video
    from mmseg_edaformer.predict.segmenter import Segmenter
    video = args.video or is_video(args.input[0])
    if video and len(args.input) > 1:
        raise ConfigError('one video at a time: give a single input')
    if args.masks and not video:
        raise ConfigError('--masks is for a video: images always get a mask')
    segmenter = Segmenter(args.model, args.checkpoint, device=args.device,
                          isr_ratio=read_isr_ratio(args), max_side=args.max_side,
                          keep_ratio=args.keep_ratio, batch_size=args.batch_size)
    print(segmenter, flush=True)
    if video:
        summary = predict_video(segmenter, args.input[0], args.out, masks=args.masks)
    else:
        summary = predict_images(segmenter, args.input, args.out)
    print(describe_summary(summary, args.out))


if __name__ == '__main__':
    with clear_errors():
        main()
