"""Check that a data set is ready for training, and make what can be made without a download."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from mmseg_edaformer.data.drawing import draw_dataset
from mmseg_edaformer.data.preparing import LAYOUTS, Layout, prepare
from mmseg_edaformer.data.shards import IMAGES
from mmseg_edaformer.errors import clear_errors
from mmseg_edaformer.pretraining.folders import (
    FOLDERS,
    Folders,
    draw_crops,
    prepare as prepare_folders,
    prepare_shards,
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    layouts: list[Layout | Folders] = [*LAYOUTS.values(), *FOLDERS.values()]
    metavar = '{' + ','.join(layout.name for layout in layouts) + ',shards}'
    names = parser.add_subparsers(dest='name', required=True, metavar=metavar)
    for layout in layouts:
        one = names.add_parser(layout.name, description=f'{layout.title}: {__doc__}')
        one.add_argument(
            '--root', type=Path, default=layout.root, help='folder of the data set (%(default)s)'
        )
        one.add_argument('--check', action='store_true', help='only check: convert or draw nothing')
    drawn = names.choices['synthetic']
    drawn.add_argument('--train', type=int, default=400, help='training images (%(default)s)')
    drawn.add_argument('--val', type=int, default=80, help='validation images (%(default)s)')
    drawn.add_argument('--seed', type=int, default=0, help='of the drawing (%(default)s)')
    crops = names.choices['crops']
    crops.add_argument(
        '--train', type=int, default=80, help='training images of each class (%(default)s)'
    )
    crops.add_argument(
        '--val', type=int, default=20, help='validation images of each class (%(default)s)'
    )
    crops.add_argument('--seed', type=int, default=0, help='of the drawing (%(default)s)')
    shards = names.add_parser(
        'shards',
        description='Pack a data set in the layout of ImageNet into WebDataset tar files, which '
        'network file systems read faster; see docs/pretraining.md.',
    )
    shards.add_argument(
        '--source', type=Path, default='data/imagenet', help='the folders, only read (%(default)s)'
    )
    shards.add_argument('--root', type=Path, help='where they go (default: SOURCE-shards)')
    shards.add_argument(
        '--images', type=int, default=IMAGES, help='images of each shard (%(default)s)'
    )
    shards.add_argument('--seed', type=int, default=0, help='of their order (%(default)s)')
    shards.add_argument(
        '--check', action='store_true', help='only read all images of the shards in --root'
    )
    args = parser.parse_args(argv)
    if args.name == 'shards':
        root = args.root or args.source.with_name(f'{args.source.name}-shards')
        prepare_shards(
            args.source, root, images=args.images, seed=args.seed, check_only=args.check
        )
        return
    if args.name in FOLDERS:
        if args.name == 'crops' and not args.check:
            draw_crops(args.root, train=args.train, val=args.val, seed=args.seed)
        prepare_folders(FOLDERS[args.name], args.root)
        return
    if args.name == 'synthetic' and not args.check:
        draw_dataset(args.root, train=args.train, val=args.val, seed=args.seed)
    prepare(LAYOUTS[args.name], args.root, check_only=args.check)


if __name__ == '__main__':
    with clear_errors():
        main()
