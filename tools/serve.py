"""Serve a model over HTTP; under load the ISR ratio rises, so that answers keep their deadline."""
import argparse
import re
import sys

from mmseg_edaformer.command_line import (
    add_device,
    add_isr_ratio,
    add_keep_ratio,
    add_model_arguments,
    check_inputs,
    check_model,
    read_isr_ratio,
)
from mmseg_edaformer.errors import ConfigError, clear_errors


def replica_range(text: str) -> tuple[int, int]:
    """Parse ``2``, or ``1-4``."""
    if not re.fullmatch(r'[1-9]\d{0,3}(-[1-9]\d{0,3})?', text):
        raise argparse.ArgumentTypeError(f"'{text}' is no number of replicas: give 2, or 1-4")
    least, _, most = text.partition('-')
    if int(most or least) < int(least):
        raise argparse.ArgumentTypeError(f"'{text}': give the lower number first")
    return int(least), int(most or least)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_arguments(parser)
    parser.add_argument('--deadline-ms', type=float, default=1000., metavar='MS', help='time from '
                        'a request to its answer (default: 1000); what cannot be in time is '
                        'refused at once')
    add_isr_ratio(parser, several=True, default=None, note=', from the finest to the coarsest '
                  '(default: none 2 2+q2 4+q4, or those of --sweep)')
    parser.add_argument('--sweep', metavar='FILE', help='sweep.json of tools/isr_sweep.py, whose '
                        'ratios are taken, and whose mIoU /model tells')
    parser.add_argument('--max-drop', type=float, metavar='POINTS', help='leave out ratios of the '
                        'sweep that lose more mIoU')
    parser.add_argument('--max-side', type=int, metavar='N', help='scale larger images down for '
                        'the network, to N pixels on the longer side; masks keep their size')
    add_keep_ratio(parser)
    add_device(parser)
    parser.add_argument('--replicas', type=replica_range, default=(1, 1), metavar='N',
                        help='models at once, or least and most, as 1-4 (default: 1)')
    parser.add_argument('--threads', type=int, default=1, metavar='N',
                        help='cores of each replica (default: 1)')
    parser.add_argument('--host', default='127.0.0.1', metavar='ADDRESS', help='address to listen '
                        'on (default: 127.0.0.1, for this machine alone)')
    parser.add_argument('--port', type=int, default=8000, help='port to listen on (default: 8000)')
    parser.add_argument('--allow-host', nargs='+', default=(), metavar='NAME', help='further names '
                        'of this server; requests to other names are refused')
    parser.add_argument('--token-file', metavar='FILE', help='file with a token, which requests '
                        'then need')
    parser.add_argument('--allow-overrides', action='store_true', help='let requests set their '
                        'isr_ratio and query_ratio among those of the server, max_side and '
                        'deadline_ms')
    parser.add_argument('--max-upload', type=float, default=20, metavar='MB',
                        help='refuse larger requests (default: 20 megabytes)')
    parser.add_argument('--megapixels', type=float, default=16, metavar='N',
                        help='refuse larger images (default: 16)')
    parser.add_argument('--in-flight', type=int, default=64, metavar='N',
                        help='most requests at once, times the replicas (default: 64)')
    parser.add_argument('--address', help='deploy on a running Ray and return: auto, or '
                        'ray://host:10001 (default: start one on this machine)')
    parser.add_argument('--yaml', action='store_true',
                        help='print the file for "serve deploy", and start nothing')
    args = parser.parse_args()
    if args.max_drop is not None and (args.sweep is None or args.isr_ratio is not None):
        parser.error('--max-drop chooses among the ratios of --sweep: give that, and no '
                     '--isr-ratio')
    return args


def main() -> None:
    args = parse_args()
    check_model(args.model, args.checkpoint)
    check_inputs([args.token_file] if args.token_file is not None else [])
    import os

    from mmseg_edaformer import serve
    for name in 'threads', 'in_flight', 'max_upload', 'deadline_ms', 'megapixels':
        if not getattr(args, name) > 0:
            raise ConfigError(f'--{name.replace("_", "-")} {getattr(args, name)}: give a number '
                              'above 0')
    miou = {}
    if args.sweep is not None:
        from mmseg_edaformer.analysis.sweep_report import read_ratios
        miou = read_ratios(args.sweep, args.max_drop)
    ratios = read_isr_ratio(args, [*miou] or ['none', '2', '2+q2', '4+q4'])
    paths = {name: os.path.abspath(path) if path is not None and os.path.exists(path) else path
             for name, path in (('model', args.model), ('checkpoint', args.checkpoint),
                                ('token_file', args.token_file))}
    settings = serve.config(
        dict(model=paths['model'], checkpoint=paths['checkpoint'], device=args.device,
             max_side=args.max_side, keep_ratio=args.keep_ratio),
        dict(deadline_ms=args.deadline_ms, isr_ratio=[*ratios], miou=miou,
             megapixels=args.megapixels, allow_overrides=args.allow_overrides),
        replicas=args.replicas, threads=args.threads, host=args.host, port=args.port,
        allow_host=args.allow_host, token_file=paths['token_file'], max_upload=args.max_upload,
        in_flight=args.in_flight)
    if args.yaml:
        import yaml
        yaml.safe_dump(settings, sys.stdout, sort_keys=False)
    else:
        serve.run(settings, args.address)


if __name__ == '__main__':
    with clear_errors():
        main()
