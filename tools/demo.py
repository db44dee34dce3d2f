"""Serve a web page: a picture in, its prediction out, with the ISR ratio on sliders."""
import argparse

from mmseg_edaformer.command_line import add_model_arguments
from mmseg_edaformer.errors import clear_errors
from mmseg_edaformer.predict import page as demo
from mmseg_edaformer.predict.segmenter import Segmenter


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_arguments(parser)
    parser.add_argument('--device', help='cpu, cuda, cuda:1; by default a GPU if there is one')
    parser.add_argument('--host', default='127.0.0.1', metavar='ADDRESS',
                        help='where to listen: by default for this machine alone, 0.0.0.0 lets '
                        'everyone in who can reach it')
    parser.add_argument('--port', type=int, default=7860, help='default 7860; 0 for a free one')
    parser.add_argument('--allow-host', nargs='+', default=(), metavar='NAME',
                        help='further host names that browsers reach the page by, such as that of '
                        'a proxy; requests to other names are refused')
    parser.add_argument('--max-upload', type=float, default=20, metavar='MB',
                        help='refuse larger files (default 20 megabytes)')
    parser.add_argument('--max-side', type=int, default=demo.MAX_SIDE, metavar='PIXELS',
                        help='reduce larger pictures to this, at their longer side (default '
                        f'{demo.MAX_SIDE})')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    segmenter = Segmenter(args.model, args.checkpoint, device=args.device)
    print(f'{segmenter.source}, {len(segmenter.classes)} classes, on {segmenter.device}')
    demo.serve(segmenter, host=args.host, port=args.port, names=args.allow_host,
               max_upload=args.max_upload, max_side=args.max_side)


if __name__ == '__main__':
    with clear_errors():
        main()
