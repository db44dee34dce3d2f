"""Check that a data set is ready for training, and make what needs no download."""
import argparse
from collections.abc import Sequence
from pathlib import Path

from mmseg_edaformer.errors import clear_errors

_TITLES = {'ade': 'ADE20K', 'cityscapes': 'Cityscapes', 'cocostuff': 'COCO-Stuff 164k',
           'synthetic': 'Synthetic scenes', 'imagenet': 'ImageNet-1K',
           'crops': 'Crops of drawn scenes'}
_DRAWN = {'synthetic': ('', 400, 80), 'crops': (' of each class', 80, 20)}


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    names = parser.add_subparsers(dest='name', required=True, metavar='DATASET',
                                  help=', '.join(_TITLES))
    for name, title in _TITLES.items():
        one = names.add_parser(name, description=f'{title}: {__doc__}')
        one.add_argument('--root', type=Path, help='folder of the data set (default: where the '
                         'configs look for it)')
        one.add_argument('--check', action='store_true',
                         help='only check: convert or draw nothing')
        if name in _DRAWN:
            of, train, val = _DRAWN[name]
            one.add_argument('--train', type=int, default=train,
                             help=f'training images{of} (%(default)s)')
            one.add_argument('--val', type=int, default=val,
                             help=f'validation images{of} (%(default)s)')
            one.add_argument('--seed', type=int, default=0,
                             help='seed of the drawing (%(default)s)')
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    from mmseg_edaformer.data import preparing
    from mmseg_edaformer.data.drawing import draw_dataset
    from mmseg_edaformer.pretraining import crops, folders
    layout = preparing.LAYOUTS.get(args.name) or folders.FOLDERS[args.name]
    root = args.root or Path(layout.root)
    if args.name in _DRAWN and not args.check:
        draw = draw_dataset if args.name == 'synthetic' else crops.draw_crops
        draw(root, train=args.train, val=args.val, seed=args.seed)
    if isinstance(layout, preparing.Layout):
        preparing.prepare(layout, root, check_only=args.check)
    else:
        folders.prepare(layout, root)


if __name__ == '__main__':
    with clear_errors():
        main()
