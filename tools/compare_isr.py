"""Put the results of tools/test.py at several ISR ratios side by side: a table and a picture."""
import argparse
import json
from pathlib import Path

import torch
from mmengine.config import Config

from mmseg_edaformer.analysis import compare
from mmseg_edaformer.errors import clear_errors
from mmseg_edaformer.isr import ISRRatio


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('results', nargs='+', help='what tools/test.py --json wrote for each ratio')
    parser.add_argument('--picture', metavar='PNG', help='where to draw predictions')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    results = [json.loads(Path(name).read_text()) for name in args.results]
    ratios = [ISRRatio.parse(result['isr_ratio']) for result in results]
    model, dataset = compare.load_model(Config.fromfile(results[0]['config']),
                                        results[0]['checkpoint'])
    figures = compare.measure_ratios(model, dataset, ratios)
    largest, share = compare.chance(dataset)
    classes = len(dataset.metainfo['classes'])
    print(compare.table(figures, [result['metrics']['mIoU'] for result in results]))
    print(f"Chance: '{largest}' everywhere is right for {share:.1%} of the pixels, "
          f'mIoU {100 * share / classes:.1f}.')
    print(f'{len(dataset)} images, batch 1, {torch.get_num_threads()} threads, '
          f'torch {torch.__version__}; time is the median ratio to the first row.')
    if args.picture:
        compare.draw(model, dataset, ratios, args.picture)
        print(f'Picture: {args.picture}')


if __name__ == '__main__':
    with clear_errors():
        main()
