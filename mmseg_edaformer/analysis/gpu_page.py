"""The Markdown page of what `gpu_benchmark.Suite` measured; nothing on it is not in the JSON."""
from collections.abc import Iterable, Sequence
from typing import Any

Rows = Sequence[dict[str, Any]]


def page(found: dict[str, Any]) -> str:
    """Write the page.

    Args:
        found: The content of gpu.json.
    """
    environment = found['environment']
    rows: Rows = found['rows']
    lines = [
        '# Measured on a GPU', '',
        '; '.join(f'{name} {value}' for name, value in environment.items()) + '.', '',
        'Made by `make bench-gpu`, from gpu.json. Random weights and images, 150 classes. '
        '*Network* is a batch of images to logits, *total* to label maps; in training it is one '
        'optimizer step. Times are medians in ms of models that take turns. *Speed* is total '
        'against the plain version of the network (`tests/plain.py`, eager) in the same run. '
        "*graphed* replays PyTorch's kernels as a CUDA graph, *compiled* is `torch.compile` with "
        "CUDA graphs, *plain kernels* leaves out this project's own. MiB: most memory at once, of "
        'eager runs. In bfloat16 EDAFormer has bfloat16 weights, and the others, and all in '
        'training, run under autocast. Not counted: normalising images and copying them to the '
        'GPU.', '',
        *_short(rows), *_evaluation(rows), *_training(rows, found['training']),
        *_rooflines(found['rates'], found['rooflines'])]
    if found['failed']:
        lines += ['## Failed', '', *(f'- {name}: {reason}'
                                     for name, reason in found['failed'].items()), '']
    if found['left_out']:
        lines += ['## Not measured', '',
                  f'What did not fit into {found["settings"]["seconds"]:g} seconds: '
                  f'{"; ".join(found["left_out"])}.', '']
    return '\n'.join(lines)


def _short(rows: Rows) -> list[str]:
    """The fastest way to run our models at the trained ratio, for each size and batch."""
    best: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        if row['config'].startswith('EDAFormer') and 'plain' not in row['config'] and (
                row['isr_ratio'] == 'none' and 'time_vs_first' in row):
            cell = (row['config'].partition(',')[0], row['mode'], row['dtype'], _size(row),
                    row['batch_size'])
            if cell not in best or row['time_vs_first'] < best[cell]['time_vs_first']:
                best[cell] = row
    if not best:
        return []
    return ['## In short', '', *_table(
        ['Model', 'what', 'size', 'batch', 'dtype', 'fastest', 'ms', 'images/s', 'speed'],
        ([model, 'prediction' if mode == 'eval' else 'training', size, batch, dtype,
          row['execution'], _number(row['total_ms']), _number(row['images_per_s']), _speed(row)]
         for (model, mode, dtype, size, batch), row in best.items()))]


def _evaluation(rows: Rows) -> list[str]:
    shown = sorted((row for row in rows if row['mode'] == 'eval'), key=lambda row: (
        row['dtype'], row['height'] * row['width'], row['batch_size']))
    if not shown:
        return []
    return ['## Prediction', '', *_table(
        ['size', 'batch', 'dtype', 'model', 'ISR', 'network', 'total', 'p95', 'images/s', 'MiB',
         'speed'],
        ([_size(row), row['batch_size'], row['dtype'], row['config'], row['isr_ratio'],
          _number(row.get('network_ms')), _total(row), _number(row.get('total_p95_ms')),
          _number(row.get('images_per_s')), _number(row.get('peak_mib')), _speed(row)]
         for row in shown))]


def _training(rows: Rows, files: dict[str, float]) -> list[str]:
    shown = [row for row in rows if row['mode'] == 'train']
    lines = ['## Training', ''] if shown or files else []
    if shown:
        lines += _table(['size', 'batch', 'dtype', 'model', 'total', 'images/s', 'MiB', 'speed'], (
            [_size(row), row['batch_size'], row['dtype'], row['config'], _total(row),
             _number(row.get('images_per_s')), _number(row.get('peak_mib')), _speed(row)]
            for row in shown))
    if files:
        lines += [f'With everything that `tools/train.py --amp` does, from JPEG images that '
                  f'{files["workers"]} processes read, EDAFormer-T trains '
                  f'{_number(files["images_per_s"])} images/s at batch {files["batch_size"]}: '
                  f'{_number(files["step_ms"])} ms a step, of which it waits '
                  f'{_number(files["waited_ms"])} ms ({files["share"]:.0%}) for data.', '']
    return lines


def _rooflines(rates: dict[str, Any], found: dict[str, Any]) -> list[str]:
    lines = []
    for mode, what in (('eval', 'prediction'), ('train', 'a training step')):
        if mode not in found:
            continue
        roof = found[mode]
        lines += [
            f'## The most expensive operators of {what}', '',
            f'EDAFormer-T, {_size(roof)}, batch {roof["batch_size"]}, bfloat16, '
            f'eager: one pass takes {_number(roof["pass_ms"])} ms, its operators one by one '
            f'{_number(roof["operators_ms"])} ms. The limit is the longer of two times: floating-'
            f'point operations at {2 * rates["bfloat16"]["gmacs_per_s"] / 1e3:.0f} TFLOP/s, what a '
            f'large matrix product reaches in this run, and bytes at '
            f'{rates["bfloat16"]["gb_per_s"]:.0f} GB/s, what a large copy does.', '', *_table(
                ['operator', 'sizes', 'calls', 'ms', 'GFLOP', 'MB', 'limit, ms', 'of',
                 'ms / limit'],
                ([f'`{row["name"]}`', row['shapes'], row['calls'], _number(row['ms']),
                  _number(row['gflop']), _number(row['mb']), _number(row['limit_ms']),
                  row['bound'], _number(row['ms'] / row['limit_ms'])] for row in roof['rows']))]
    return lines


def _table(head: Sequence[str], body: Iterable[Sequence[Any]]) -> list[str]:
    lines = [head, [':--' for _ in head], *body]
    return ['| ' + ' | '.join(map(str, line)) + ' |' for line in lines] + ['']


def _size(row: dict[str, Any]) -> str:
    return f'{row["height"]}x{row["width"]}'


def _total(row: dict[str, Any]) -> str:
    return 'out of memory' if row['status'] == 'OOM' else _number(row.get('total_ms'))


def _speed(row: dict[str, Any]) -> str:
    return f'{1 / row["time_vs_first"]:.2f}x' if 'time_vs_first' in row else ''


def _number(value: float | None) -> str:
    """Format three significant digits; nothing for None."""
    if value is None:
        return ''
    return f'{value:.0f}' if abs(value) >= 100 else f'{value:.3g}'
