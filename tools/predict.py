"""Segment pictures, folders of them or a video: masks, overlays and what share each class has."""
import argparse
from pathlib import Path

from mmseg_edaformer.command_line import add_cost_arguments, add_model_arguments
from mmseg_edaformer.errors import ConfigError, clear_errors, shown
from mmseg_edaformer.predict.inputs import VIDEOS
from mmseg_edaformer.predict.outputs import describe_summary
from mmseg_edaformer.predict.run import predict_images, predict_video
from mmseg_edaformer.predict.segmenter import Segmenter


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog='Run again, it goes on where it was stopped.')
    parser.add_argument('input', nargs='+',
                        help='pictures, folders, patterns such as "photos/*.jpg", or one video')
    add_model_arguments(parser)
    parser.add_argument('--out', required=True, metavar='DIR', help='where the results go')
    add_cost_arguments(parser)
    parser.add_argument('--device', help='cpu, cuda, cuda:1; by default a GPU if there is one')
    parser.add_argument('--batch-size', type=int, metavar='N', help='predict up to N images of '
                        'equal size at once (default: 8 on a GPU, 1 on a CPU)')
    parser.add_argument('--video', action='store_true',
                        help='the input is a video, whatever its name ends in')
    parser.add_argument('--masks', action='store_true',
                        help='of a video, write the mask of each frame as well')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    video = args.video or Path(args.input[0]).suffix.lower() in VIDEOS
    if video and len(args.input) > 1:
        raise ConfigError('one video at a time: give a single input')
    if args.masks and not video:
        raise ConfigError('--masks is for a video: pictures always get a mask')
    segmenter = Segmenter(args.model, args.checkpoint, device=args.device, isr_ratio=args.isr_ratio,
                          max_side=args.max_side, batch_size=args.batch_size)
    print(f'{shown(segmenter.source)}, {len(segmenter.classes)} classes, on {segmenter.device}',
          flush=True)
    if video:
        summary = predict_video(segmenter, args.input[0], args.out, masks=args.masks)
    else:
        summary = predict_images(segmenter, args.input, args.out)
    print(describe_summary(summary, args.out))


if __name__ == '__main__':
    with clear_errors():
        main()
