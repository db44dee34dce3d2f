"""Measure what models cost, side by side: time, throughput, memory, multiply-adds."""
import argparse
import logging
import os
import sys
from typing import Any

from mmseg_edaformer.command_line import (
    add_cfg_options,
    add_isr_ratio,
    check_checkpoint,
    find_config,
    image_size,
    is_hub_name,
    read_isr_ratio,
)
from mmseg_edaformer.errors import clear_errors


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', nargs='?', help='the config that the others are compared with')
    parser.add_argument('checkpoint', nargs='?', help='its weights (default: random ones)')
    parser.add_argument('--model', help='in place of a config: a folder or hub name of '
                        'transformers or segmentation-models-pytorch')
    parser.add_argument('--compare', nargs='+', default=[], metavar='CONFIG',
                        help='more of them for the same run; configs of any mmseg segmentor')
    add_isr_ratio(parser, several=True)
    parser.add_argument('--size', nargs='+', type=image_size, metavar='H,W',
                        help='image sizes in pixels, such as 1024,2048; one number is a square '
                        '(default: 512; of --mode data those of ImageNet or ADE20K)')
    parser.add_argument('--batch-size', nargs='+', type=int, default=[1], metavar='N')
    parser.add_argument('--mode', nargs='+', choices=('eval', 'train', 'data'), default=['eval'],
                        help='eval: images to label maps; train: optimizer steps; data: the steps '
                        'of the training pipeline on one core, for classifiers too')
    parser.add_argument('--dtype', nargs='+', choices=('float32', 'bfloat16'), default=['float32'])
    parser.add_argument('--device', choices=('cpu', 'cuda', 'meta'),
                        help='meta: parameters and multiply-adds without any timing (default: '
                        'cuda where there is a GPU, else cpu)')
    parser.add_argument('--execution', choices=('eager', 'graphed', 'compiled'), default='eager',
                        help='run every model as it is, as CUDA graphs, or compiled')
    parser.add_argument('--threads', type=int, metavar='N', help='threads of torch on the CPU')
    parser.add_argument('--allocator', choices=('keep', 'system'), default='keep',
                        help='on the CPU, keep freed memory as tools/train.py and tools/test.py '
                        'do, or leave it to the system')
    parser.add_argument('--repeats', type=int, default=50, metavar='N',
                        help='maximum number of rounds of a cell (default: %(default)s)')
    parser.add_argument('--seconds', type=float, default=20., metavar='S',
                        help='start no round of a cell after S seconds, once there are five '
                        '(default: %(default)s)')
    parser.add_argument('--limits', action='store_true',
                        help='measure matrix product and copy too, and relate the times to them')
    parser.add_argument('--out', metavar='DIR', help='write benchmark.csv, .md and .png there')
    add_cfg_options(parser)
    args = parser.parse_args()
    if (args.config is None) == (args.model is None):
        parser.error('give CONFIG or --model')
    args.config = args.config or args.model
    if args.threads is not None and args.threads < 1:
        parser.error('--threads must be 1 or more')
    if 'data' in args.mode and (len(args.mode) > 1 or args.out):
        parser.error('--mode data only prints its table: leave out the other modes and --out')
    return args


def main() -> None:
    args = parse_args()
    for config in (args.config, *args.compare):
        if not os.path.isdir(config) and not is_hub_name(config):
            find_config(config)
    check_checkpoint(args.checkpoint)
    sys.path.insert(0, os.getcwd())  # for the custom_imports of configs
    import torch

    import mmseg_edaformer  # noqa: F401  # provides a home to mmseg
    from mmseg_edaformer.analysis import timing
    from mmengine.logging import MMLogger  # isort: skip
    MMLogger.get_current_instance().setLevel(logging.WARNING)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    args.device = args.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    if args.mode == ['data']:
        _time_pipelines(args)
        settings = timing.environment('cpu')
    else:
        settings = _run(args)
    print('; '.join(f'{name} {value}' for name, value in settings.items()))


def _time_pipelines(args: argparse.Namespace) -> None:
    from mmseg_edaformer.analysis.pipeline import describe_pipelines
    from mmseg_edaformer.engine.run_config import load_config
    cfgs = [load_config(path, cfg_options=None if index else args.cfg_options)
            for index, path in enumerate((args.config, *args.compare))]
    for size in args.size or [None]:
        print(describe_pipelines(cfgs, size, 4 * args.repeats))


def _run(args: argparse.Namespace) -> dict[str, Any]:
    from mmseg_edaformer.analysis import benchmark, benchmark_report as report, timing
    plan = benchmark.Plan(
        sizes=args.size or [(512, 512)], batch_sizes=args.batch_size, modes=args.mode,
        dtypes=args.dtype, device=args.device, repeats=args.repeats, seconds=args.seconds,
        limits=args.limits, keep_memory=args.allocator == 'keep')
    contenders = benchmark.load_contenders(args.config, args.checkpoint, args.compare,
                                           read_isr_ratio(args), args.cfg_options, args.execution)
    for contender in contenders:
        if contender.ratios != contenders[0].ratios:
            print(f'{contender.name} holds no attention that ISR can reduce: it runs at ratio none '
                  'only')
    cells = []
    for rows in benchmark.run(contenders, plan):
        cells.append(rows)
        print(f'{report.title(rows[0])}\n{report.table(rows)}', flush=True)
        settings = timing.environment(plan.device, keep_memory=plan.keep_memory)
        if args.out:  # what is done is kept, even if the rest fails
            report.write(args.out, cells, settings, chart=False)
    print('\n'.join(report.notes([row for rows in cells for row in rows])))
    if args.out:
        print('Written:', *report.write(args.out, cells, settings))
    return settings


if __name__ == '__main__':
    with clear_errors():
        main()
