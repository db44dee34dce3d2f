"""Convert the authors' checkpoints, segmentors and ImageNet encoders, for this package."""
import argparse

from mmseg_edaformer.engine.convert import convert_file
from mmseg_edaformer.errors import clear_errors


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('source', help='what the authors released: .pth or .safetensors')
    parser.add_argument('target', help='what to write: .pth or .safetensors')
    parser.add_argument('--quiet', action='store_true', help='leave out the list of keys')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    conversion = convert_file(args.source, args.target)
    if not args.quiet:
        for old, new in conversion.renamed.items():
            print(f'{old} -> {new}')
        for old, reason in conversion.dropped.items():
            print(f'{old} dropped: {reason}')
    print(f'{len(conversion.renamed)} keys converted, {len(conversion.dropped)} dropped')
    print(conversion.advice)
    print(f'written: {args.target}')


if __name__ == '__main__':
    with clear_errors():
        main()
