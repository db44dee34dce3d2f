"""Check that a data set is ready for training, and make what can be made without a download."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from mmseg_edaformer.data.prepare import LAYOUTS, Layout, prepare
from mmseg_edaformer.data.synthetic import draw_dataset
from mmseg_edaformer.errors import clear_errors
from mmseg_edaformer.pretrain import FOLDERS, Folders, draw_crops, prepare as prepare_folders


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    layouts: list[Layout | Folders] = [*LAYOUTS.values(), *FOLDERS.values()]
    metavar = '{' + ','.join(layout.name for layout in layouts) + '}'
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
    args = parser.parse_args(argv)
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
