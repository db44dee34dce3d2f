"""The Markdown page of what `gpu_benchmark.Suite` measured; nothing on it is not in the JSON."""
from collections.abc import Callable, Sequence
from typing import Any

from prettytable import PrettyTable, TableStyle

from .timing import number

Row = dict[str, Any]
_COLUMNS: dict[str, Callable[[Row], Any]] = {
    'size': lambda row: f'{row["height"]}x{row["width"]}',
    'batch': lambda row: row['batch_size'], 'dtype': lambda row: row['dtype'],
    'model': lambda row: row['config'], 'ISR': lambda row: row['isr_ratio'],
    'mode': lambda row: 'prediction' if row['mode'] == 'eval' else 'training',
    'execution': lambda row: row['execution'],
    'network': lambda row: number(row.get('network_ms')),
    'total': lambda row: ('out of memory' if row['status'] == 'OOM' else
                          number(row.get('total_ms'))),
    'p95': lambda row: number(row.get('total_p95_ms')),
    'images/s': lambda row: number(row.get('images_per_s')),
    'MiB': lambda row: number(row.get('peak_mib')),
    'speed': lambda row: f'{1 / row["time_vs_first"]:.2f}x' if 'time_vs_first' in row else '',
    'operator': lambda row: f'`{row["name"]}`', 'sizes': lambda row: row['shapes'],
    'calls': lambda row: row['calls'], 'ms': lambda row: number(row['ms']),
    'GFLOP': lambda row: number(row['gflop']), 'MB': lambda row: number(row['mb']),
    'limit, ms': lambda row: number(row['limit_ms']), 'bound by': lambda row: row['bound'],
    'ms / limit': lambda row: number(row['ms'] / row['limit_ms'])}


def page(content: dict[str, Any]) -> str:
    """Write the page from the content of gpu.json."""
    rows = content['rows']
    lines = [
        '# Measured on a GPU', '',
        '; '.join(f'{name} {value}' for name, value in content['environment'].items()) + '.', '',
        'Made by `make bench-gpu`, from gpu.json. Random weights and images, 150 classes. '
        '*Network* is a batch of images to logits, *total* to label maps; in training it is one '
        'optimizer step. Times are medians in ms of models that take turns. *Speed* is total '
        'against the plain version of the network (`tests/plain.py`, eager) in the same run. '
        "*graphed* replays PyTorch's kernels as a CUDA graph, *compiled* is `torch.compile` with "
        "CUDA graphs, *plain kernels* leaves out this project's own. MiB: most memory at once, of "
        'eager runs. In bfloat16 EDAFormer has bfloat16 weights, and the others, and all in '
        'training, run under autocast. Not counted: normalising images and copying them to the '
        'GPU.', '',
        *_section('In short', _fastest(rows), 'model', 'mode', 'size', 'batch', 'dtype',
                  'execution', 'total', 'images/s', 'speed'),
        *_section('Prediction', sorted(
            (row for row in rows if row['mode'] == 'eval'), key=lambda row: (
                row['dtype'], row['height'] * row['width'], row['batch_size'])),
            'size', 'batch', 'dtype', 'model', 'ISR', 'network', 'total', 'p95', 'images/s', 'MiB',
            'speed'),
        *_section('Training', [row for row in rows if row['mode'] == 'train'],
                  'size', 'batch', 'dtype', 'model', 'total', 'images/s', 'MiB', 'speed')]
    if files := content['training']:
        lines += ['## Training from files', '',
                  f'With everything that `tools/train.py --amp` does, from JPEG images that '
                  f'{files["workers"]} processes read, EDAFormer-T trains '
                  f'{number(files["images_per_s"])} images/s at batch {files["batch_size"]}: '
                  f'{number(files["step_ms"])} ms a step, of which it waits '
                  f'{number(files["waited_ms"])} ms ({files["share"]:.0%}) for data.', '']
    for mode, title in (('eval', 'prediction'), ('train', 'a training step')):
        if roof := content['rooflines'].get(mode):
            lines += _roofline(f'The most expensive operators of {title}', roof,
                               content['rates']['bfloat16'])
    if content['failed']:
        lines += ['## Failed', '', *(f'- {name}: {reason}'
                                     for name, reason in content['failed'].items()), '']
    if content['left_out']:
        lines += ['## Not measured', '',
                  f'These did not fit into {content["settings"]["seconds"]:g} seconds: '
                  f'{"; ".join(content["left_out"])}.', '']
    return '\n'.join(lines)


def _fastest(rows: Sequence[Row]) -> list[Row]:
    """Choose the fastest way to run our models at the trained ratio, for each size and batch."""
    best: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        model = row['config'].partition(',')[0]
        if model.startswith('EDAFormer') and 'plain' not in row['config'] and (
                row['isr_ratio'] == 'none' and 'time_vs_first' in row):
            cell = model, *(row[name] for name in ('mode', 'dtype', 'height', 'width',
                                                   'batch_size'))
            if cell not in best or row['time_vs_first'] < best[cell]['time_vs_first']:
                best[cell] = row | dict(config=model)
    return list(best.values())


def _roofline(title: str, roof: dict[str, Any], rates: dict[str, float]) -> list[str]:
    heading, space, *table = _section(
        title, roof['rows'], 'operator', 'sizes', 'calls', 'ms', 'GFLOP', 'MB', 'limit, ms',
        'bound by', 'ms / limit')
    return [
        heading, space,
        f'EDAFormer-T, {_COLUMNS["size"](roof)}, batch {roof["batch_size"]}, bfloat16, '
        f'eager: one pass takes {number(roof["pass_ms"])} ms, its operators one by one '
        f'{number(roof["operators_ms"])} ms. The limit is the longer of two times: floating-'
        f'point operations at {2 * rates["gmacs_per_s"] / 1e3:.0f} TFLOP/s, which a large matrix '
        f'product reaches in this run, and bytes at {rates["gb_per_s"]:.0f} GB/s, which a large '
        'copy reaches.', '', *table]


def _section(title: str, rows: Sequence[Row], *columns: str) -> list[str]:
    if not rows:
        return []
    table = PrettyTable(list(columns), align='l')
    table.add_rows([[_COLUMNS[name](row) for name in columns] for row in rows])
    table.set_style(TableStyle.MARKDOWN)
    return [f'## {title}', '', table.get_string(), '']
