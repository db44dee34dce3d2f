"""Convert checkpoints: to this package's names, or to a single file.

With --config the target is a .safetensors that holds weights, config, classes and colours, from
which tools/predict.py and Segmenter predict without anything else. A SegFormer of transformers, a
folder or a hub name, becomes such a file without --config.
"""
import argparse
from typing import Any

from mmseg_edaformer.command_line import check_checkpoint, find_config, is_foreign
from mmseg_edaformer.errors import ConfigError, clear_errors


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('source', help="the authors' .pth or .safetensors; with --config also a "
                        'checkpoint of a training; or a SegFormer of transformers')
    parser.add_argument('target', help='the file to write: .pth or .safetensors')
    parser.add_argument('--config', help='the config that the source was trained with')
    parser.add_argument('--quiet', action='store_true', help='do not list the keys')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if is_foreign(args.source):
        if args.config:
            raise ConfigError(f'{args.source} says itself what it is: leave --config out')
        from mmseg_edaformer.predict.segformer import convert_segformer
        _describe(convert_segformer(args.source, args.target), args.target)
        print(f'written: {args.target}')
        return
    check_checkpoint(args.source)
    if args.config:
        find_config(args.config)
        from mmseg_edaformer.engine.run_config import load_config
        from mmseg_edaformer.engine.single_file import pack_file
        packed = pack_file(args.source, args.target, load_config(args.config))
        _describe(packed, args.target)
    else:
        from mmseg_edaformer.engine.convert import convert_file
        conversion = convert_file(args.source, args.target)
        if not args.quiet:
            for old, new in conversion.renamed.items():
                print(f'{old} -> {new}')
            for old, reason in conversion.dropped.items():
                print(f'{old} dropped: {reason}')
        print(f'{len(conversion.renamed)} keys converted, {len(conversion.dropped)} dropped')
        print(conversion.advice)
    print(f'written: {args.target}')


def _describe(packed: Any, target: str) -> None:
    print(f'{packed.model["type"]}, {len(packed.classes)} classes: predict with '
          f'tools/predict.py INPUT --model {target} --out DIR')


if __name__ == '__main__':
    with clear_errors():
        main()
