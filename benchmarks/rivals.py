"""Measure everything that makes a trained segmentor cheaper, in one run, and write docs/rivals.md.

``python -m benchmarks.rivals CONFIG CHECKPOINT [CONFIG CHECKPOINT ...]``, from the repository.
"""
import argparse
import logging
import shlex
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from mmseg_edaformer.command_line import add_cfg_options, check_checkpoint, find_config
from mmseg_edaformer.errors import clear_errors

WAYS = ('2', '3', '4', 'max 2', 'overlap 2', 'bipartite 2', 'none+q2', 'none+q4', '2+q2', '4+q4',
        'scale 0.5', 'scale 0.75', 'scale 0.9', 'tome 0.2', 'tome 0.3', 'tome 0.5', '2x2 q',
        '2x2 q+k', 'todo 2', 'todo 4')
"""What is measured beside the trained model."""

RIVALS = {'scale': 'smaller input', 'tome': 'Token Merging', '2x2': 'SegFormer++ 2x2',
          'todo': 'ToDo'}


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('models', nargs='+', metavar='CONFIG CHECKPOINT',
                        help='a config and its checkpoint, or several of both in turn')
    parser.add_argument('--samples', type=int, default=20, metavar='N',
                        help='images of the test set, drawn at random (%(default)s)')
    parser.add_argument('--ways', nargs='+', metavar='WAY', help='measure these alone, such as '
                        '"tome 0.3" "todo 2" 2+q2 (default: all of docs/rivals.md)')
    parser.add_argument('--input-scale', nargs='+', type=float, default=[1.], metavar='S',
                        help='measure all ways on images that are enlarged so many times: 1 2 '
                        '(default: 1)')
    parser.add_argument('--note', default='', help='a sentence for the document, such as what else '
                        'ran on the machine')
    parser.add_argument('--out', type=Path, default=Path('docs/rivals.md'), metavar='FILE',
                        help='document to write; its plot lies beside it (%(default)s)')
    add_cfg_options(parser)
    args = parser.parse_args(argv)
    if len(args.models) % 2:
        parser.error('give a checkpoint for each config')
    if min(args.input_scale) <= 0:
        parser.error('--input-scale: give numbers above 0')
    return args


def group_of(name: str) -> str:
    """Return the method that a way belongs to."""
    rival = RIVALS.get(name.partition(' ')[0])
    keys, _, queries = name.partition('+q')
    return rival or ('as trained' if name == 'none' else 'ISR: keys' if not queries else
                     'ISR: queries' if keys == 'none' else 'ISR: both')


def measure(config: str, checkpoint: str, scale: float, args: argparse.Namespace
            ) -> dict[str, Any]:
    """Measure one checkpoint; returns what the document says about it.

    ``scale`` enlarges what the backbone sees, in all ways alike.
    """
    from mmseg_edaformer.analysis.bench import InputScale, open_bench
    from mmseg_edaformer.analysis.sweep import make_rows
    from mmseg_edaformer.analysis.sweep_report import table
    from mmseg_edaformer.analysis.timing import size_text
    from mmseg_edaformer.engine.checkpoint_loading import load_checkpoint
    from mmseg_edaformer.engine.run_config import load_config

    from .ways import read, spare_weights
    bench = open_bench(load_config(config, cfg_options=args.cfg_options), checkpoint, None,
                       args.samples)
    spare_weights(bench.model)
    name, done = Path(config).stem, load_checkpoint(checkpoint).get('meta', {}).get('iter')
    with nullcontext() if scale == 1 else InputScale(scale).applied(bench.model):
        ways = list(dict.fromkeys(read(bench, name) for name in ('none', *(args.ways or WAYS))))
        bench.measure(ways, title=name)
        rows = make_rows(bench, ways, memory=False)
        return dict(
            name=name if scale == 1 else f'{name}, images enlarged {scale:g} times', rows=rows,
            note=f'{"Unknown" if done is None else done} iterations of training; {bench.images} '
            f'images of {len(bench.dataset)}; GMACs for {size_text(bench.size)} pixels' +
            (f', enlarged {scale:g} times.' if scale != 1 else '.'),
            table=table(rows, set(map(str, ways)), markdown=True),
            duels=[dict(name=row.isr_ratio, by={cost: duel(bench, ways, rows, row, cost)
                                                for cost in ('ms', 'gmacs')})
                   for row in rows if group_of(row.isr_ratio) in RIVALS.values()])


def duel(bench: Any, ways: Sequence[Any], rows: Sequence[Any], rival: Any, cost: str) -> str:
    """Compare a rival with the best ratio that costs no more, the trained one among them."""
    from mmseg_edaformer.analysis.sweep import change_interval
    ratios = [row for row in rows if group_of(row.isr_ratio) not in RIVALS.values()]
    fit = [row for row in ratios if getattr(row, cost) <= getattr(rival, cost)]
    best = max(fit or ratios, key=lambda row: row.miou)
    text = f'{rival.miou - best.miou:+.2f} against `{best.isr_ratio}`' + (
        '' if fit else ', which costs more, as all ratios do')
    if rival.change_low is None:  # too few images
        return text
    areas = {str(way): bench.areas(way) for way in ways}
    low, high = change_interval(areas[rival.isr_ratio], areas[best.isr_ratio],
                                bench.metric['nan_to_num'])
    result = ': **wins**' if low > 0 else ': loses' if high < 0 and fit else ''
    return f'{text} ({low:+.2f} to {high:+.2f}){result}'


def write_document(path: Path, models: Sequence[dict[str, Any]], **values: str) -> None:
    """Write the document, with these values in it, and beside it one plot of all checkpoints."""
    import torch
    from PIL import Image

    from mmseg_edaformer.analysis.sheets import below, captioned
    from mmseg_edaformer.analysis.sweep_report import draw
    from mmseg_edaformer.analysis.timing import environment
    from mmseg_edaformer.files import replacing, templates, write_file
    plots = []
    with tempfile.TemporaryDirectory() as folder:
        for model in models:
            names = {row.isr_ratio for row in model['rows']}
            draw(model['rows'], Path(folder) / 'plot.png', None, names, {
                name: group_of(name) for name in ('none', *WAYS, *names) if name in names})
            with Image.open(Path(folder) / 'plot.png') as plot:
                plots.append(captioned(plot.convert('RGB'), f'{model["name"]}. {model["note"]}'))
    with replacing(path.with_suffix('.png')) as partial:
        below(plots, gap=14).save(partial, 'PNG')
    text = templates(Path(__file__).parent).get_template('rivals.md.jinja2').render(
        models=models, plot=path.with_suffix('.png').name, **values,
        environment=environment('cuda' if torch.cuda.is_available() else 'cpu'))
    write_file(path, text.rstrip() + '\n')


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    pairs = list(zip(args.models[::2], args.models[1::2]))
    for config, checkpoint in pairs:
        find_config(config)
        check_checkpoint(checkpoint)
    from mmengine.logging import MMLogger
    MMLogger.get_current_instance().setLevel(logging.WARNING)
    models = [measure(*pair, scale, args) for pair in pairs for scale in args.input_scale]
    command = shlex.join(['python', '-m', 'benchmarks.rivals', *(argv or sys.argv[1:])])
    write_document(args.out, models, command=command, remark=args.note)
    print(f'Written: {args.out} and {args.out.with_suffix(".png")}')


if __name__ == '__main__':
    with clear_errors():
        main()
