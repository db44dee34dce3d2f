"""Measure what models cost, side by side: time, throughput, memory, multiply-adds."""
import argparse
import logging
import os
import sys

import torch

from mmseg_edaformer.analysis import benchmark, benchmark_report as report
from mmseg_edaformer.analysis.pipeline import describe_pipelines
from mmseg_edaformer.engine.run_config import load_config
from mmseg_edaformer.errors import ConfigError, clear_errors


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='the config that the others are compared with')
    parser.add_argument('checkpoint', nargs='?', help='its weights (default: random ones)')
    parser.add_argument('--compare', nargs='+', default=[], metavar='CONFIG',
                        help='more configs for the same run, of any mmseg segmentor')
    parser.add_argument('--isr-ratio', nargs='+', default=['none'], metavar='RATIO',
                        help='as for tools/test.py, several at once: none optimal 2')
    parser.add_argument('--size', nargs='+', metavar='HEIGHTxWIDTH',
                        help='image sizes in pixels, such as 1024x2048 (default: 512; of --mode '
                        'data those of ImageNet or ADE20K)')
    parser.add_argument('--batch-size', nargs='+', type=int, default=[1], metavar='N')
    parser.add_argument('--mode', nargs='+', choices=(*benchmark.MODES, 'data'),
                        default=['eval'],
                        help='eval: images to label maps; train: optimizer steps; data: the steps '
                        'of the training pipeline on one core, for classifiers too')
    parser.add_argument('--dtype', nargs='+', choices=benchmark.DTYPES, default=['float32'])
    parser.add_argument('--device', choices=benchmark.DEVICES,
                        default='cuda' if torch.cuda.is_available() else 'cpu',
                        help='meta: parameters and multiply-adds alone, without any timing')
    parser.add_argument('--execution', choices=benchmark.EXECUTIONS, default='eager',
                        help='of every model: as it is, as CUDA graphs, or compiled')
    parser.add_argument('--threads', type=int, metavar='N', help='threads of torch on the CPU')
    parser.add_argument('--allocator', choices=('keep', 'system'), default='keep',
                        help='on the CPU, keep freed memory as tools/train.py and tools/test.py '
                        'do, or leave it to the system')
    parser.add_argument('--repeats', type=int, default=50, metavar='N',
                        help='most rounds of a cell (default: %(default)s)')
    parser.add_argument('--seconds', type=float, default=20., metavar='S',
                        help='start no round of a cell after these, once there are five '
                        '(default: %(default)s)')
    parser.add_argument('--limits', action='store_true',
                        help='measure matrix product and copy too, and relate the times to them')
    parser.add_argument('--out', metavar='DIR', help='write benchmark.csv, .md and .png there')
    parser.add_argument('--cfg-options', nargs='+', metavar='KEY=VALUE',
                        help='replace settings of the first config; --compare the same config to '
                        'see what they change')
    return parser.parse_args()


def origin(plan: benchmark.Plan) -> str:
    return '; '.join(f'{name} {value}' for name, value in benchmark.environment(plan).items())


def main() -> None:
    args = parse_args()
    sys.path.insert(0, os.getcwd())  # for the custom_imports of configs
    from mmengine.logging import MMLogger  # after mmseg_edaformer, which provides a home
    MMLogger.get_current_instance().setLevel(logging.WARNING)
    if args.threads is not None and args.threads < 1:
        raise ConfigError('--threads must be 1 or more')
    if 'data' in args.mode:
        if len(args.mode) > 1 or args.out:
            raise ConfigError('--mode data only prints its table: leave out the other modes and '
                              '--out')
        cfgs = [load_config(path, cfg_options=None if index else args.cfg_options)
                for index, path in enumerate((args.config, *args.compare))]
        for size in args.size or [None]:
            print(describe_pipelines(cfgs, size and benchmark.parse_size(size), 4 * args.repeats))
        print(origin(benchmark.Plan()))
        return
    plan = benchmark.Plan(
        sizes=[benchmark.parse_size(size) for size in args.size or ['512']],
        batch_sizes=args.batch_size, modes=args.mode, dtypes=args.dtype, device=args.device,
        repeats=args.repeats, seconds=args.seconds, limits=args.limits,
        keep_memory=args.allocator == 'keep')
    contenders = benchmark.load_contenders(args.config, args.checkpoint, args.compare,
                                           args.isr_ratio, args.cfg_options, args.execution)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    for note in benchmark.left_out(contenders):
        print(note)
    cells = []
    for rows in benchmark.run(contenders, plan):
        cells.append(rows)
        print(report.table(rows), flush=True)
        if args.out:  # what is done is kept, whatever becomes of the rest
            report.write(args.out, cells, benchmark.environment(plan), chart=False)
    print('\n'.join(report.notes([row for rows in cells for row in rows])))
    if args.limits and args.device != 'meta':
        print(report.limit_note())
    print(origin(plan))
    if args.out:
        print('Written:', *report.write(args.out, cells, benchmark.environment(plan)))


if __name__ == '__main__':
    with clear_errors():
        main()
