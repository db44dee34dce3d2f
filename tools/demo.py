"""Serve a web page: an image in, its prediction out, with the ISR ratio on sliders."""
import argparse

from mmseg_edaformer.command_line import (
    add_device,
    add_keep_ratio,
    add_model_arguments,
    check_model,
)
from mmseg_edaformer.errors import clear_errors


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_arguments(parser)
    add_keep_ratio(parser)
    add_device(parser)
    parser.add_argument('--host', default='127.0.0.1', metavar='ADDRESS',
                        help='address to listen on (default: 127.0.0.1, for this machine alone; '
                        '0.0.0.0 lets everyone in who can reach it)')
    parser.add_argument('--port', type=int, default=7860,
                        help='port to listen on (default: 7860); 0 for a free one')
    parser.add_argument('--allow-host', nargs='+', default=(), metavar='NAME',
                        help='further host names that browsers reach the page by, such as that of '
                        'a proxy; requests to other names are refused')
    parser.add_argument('--max-upload', type=float, default=20, metavar='MB',
                        help='refuse larger files (default: 20 megabytes)')
    parser.add_argument('--max-side', type=int, default=1024, metavar='N',
                        help='scale larger images down to N pixels on the longer side (default: '
                        '1024)')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    check_model(args.model, args.checkpoint)
    from mmseg_edaformer.predict.page import serve
    from mmseg_edaformer.predict.segmenter import Segmenter
    segmenter = Segmenter(args.model, args.checkpoint, device=args.device,
                          keep_ratio=args.keep_ratio)
    print(segmenter)
    serve(segmenter, host=args.host, port=args.port, names=args.allow_host,
          max_upload=args.max_upload, max_side=args.max_side)


if __name__ == '__main__':
    with clear_errors():
        main()
