"""The results of an audit on the terminal and as JSON."""
import json
import shlex
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from prettytable import PrettyTable
from rich.console import Console

from ...errors import ConfigError, shown
from ...files import write_file
from ..classification import is_classifier
from ..preparing import fits_options
from . import audit
from .fix import Fixed, fix
from .rules import Part

_SHOWN = 3  # files of each finding that are named on the terminal


def check(cfg: Config, out: str | Path, splits: Sequence[str] | None = None, *,
          workers: int | None = None, with_fixes: bool = False) -> int:
    """Audit the data of a config, print the findings and write them to a folder.

    Args:
        cfg: Any config of mmsegmentation, or of a classifier of mmpretrain.
        out: Folder for report.json and samples.png.
        splits: 'train', 'val', 'test' or several; by default those that the config has.
        workers: Number of processes, by default one for each core.
        with_fixes: Whether to write fixed copies to ``fixed`` in the folder.

    Returns:
        Number of findings that are errors.

    Raises:
        ConfigError: A split is not in the config, or images of a classifier are to be fixed.
    """
    from .figures import draw_samples
    if with_fixes and is_classifier(cfg):
        raise ConfigError('--fix is for masks, and this config trains a classifier: replace or '
                          'remove the files that report.json names')
    out = Path(out)
    known = [name for name in ('train', 'val', 'test') if cfg.get(f'{name}_dataloader')]
    lacking = [name for name in splits or () if name not in known]
    if lacking or not known:
        raise ConfigError(f'the config has no {lacking[0] if lacking else "train"}_dataloader: it '
                          f'has {", ".join(known) or "none"}')
    start = time.perf_counter()
    done = audit(cfg, splits or known, workers=workers, out=out)
    fixed = fix(done, out) if with_fixes else []
    errors = sum(finding.level == 'error' for finding in done.findings)
    warnings = len(done.findings) - errors
    write_file(out / 'report.json', json.dumps(dict(
        config=str(cfg.filename), errors=errors, warnings=warnings,
        splits={part.name: _part_as_json(part) for part in done.parts},
        findings=[dict(level=finding.level, split=finding.split, check=finding.check,
                       remedy=finding.remedy, items=_as_json(finding.items))
                  for finding in done.findings],
        fixed=[dict(split=one.part, folder=str(one.folder), files=_as_json(one.files),
                    left_out=_as_json(one.left_out), cfg_options=one.options)
               for one in fixed]), indent=1) + '\n')
    written = ['report.json']
    if draw_samples(done.parts, out / 'samples.png'):
        written.append('samples.png')

    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    console.print(f'{cfg.filename}: {len(done.facts):,} files in '
                  f'{time.perf_counter() - start:.1f} s\n')
    rows = [_row(part) for part in done.parts]
    if rows:
        table = PrettyTable([*rows[0]], align='r')
        table.align.update({'split': 'l', 'data set': 'l'})
        table.add_rows([[*row.values()] for row in rows])
        console.print(str(table))
    for finding in done.findings:
        style = 'bold red' if finding.level == 'error' else 'yellow'
        console.print(f'\n{finding.level}: {finding.split}: {finding.check} '
                      f'({len(finding.items):,})', style=style)
        console.print(f'  {finding.remedy}')
        _print_items(console, finding.items)
    for one in fixed:
        _print_fixed(console, one)
    if with_fixes and not fixed:
        console.print('\nnothing to fix: no finding is one that --fix can fix')
    console.print(f'\n{errors} error{"s" * (errors != 1)}, {warnings} warning'
                  f'{"s" * (warnings != 1)}. All details: '
                  f'{", ".join(shown(out / name) for name in written)}',
                  style='bold red' if errors else 'yellow' if warnings else 'bold green')
    return errors


def _row(part: Part) -> dict[str, str]:
    """Return what the table on the terminal says of a data set, by the headings of its columns."""
    row = {'split': ', '.join([part.name, *(key.partition('_')[0] for key in part.keys[1:])]),
           'data set': type(part.dataset).__name__, 'images': f'{len(part.pairs):,}'}
    if part.classifies:
        counts = part.counts if part.counts.size else np.zeros(1, int)
        return {**row, 'classes': f'{len(part.classes):,}', 'fewest in a class': f'{min(counts):,}',
                'median': f'{np.median(counts):,.0f}', 'most': f'{max(counts):,}'}
    unlabelled = part.unlabelled / max(sum(part.raw.values()), 1)
    return {**row, 'masks': f'{sum(mask is not None for _, mask in part.pairs):,}',
            'classes seen': f'{np.count_nonzero(part.counts)} of {len(part.classes)}',
            'no label': f'{unlabelled:.1%}', 'label 0': f'{part.zero_share:.1%}',
            'reduce_zero_label': str(part.zero_is_no_label)}


def _print_fixed(console: Console, fixed: Fixed) -> None:
    place = f', in {shown(fixed.folder)}' if fixed.files else ''
    console.print(f'\nfixed: {fixed.part}: {len(fixed.files):,} files{place}', style='bold green')
    _print_items(console, fixed.files)
    if fixed.left_out:
        console.print(f'  left out because they cannot be fixed: {len(fixed.left_out):,}')
        _print_items(console, fixed.left_out)
    if fixed.files:
        options = ' '.join(map(shlex.quote, fixed.options))
        console.print('  use it with: --cfg-options ' + options
                      if fits_options(fixed.folder.resolve()) else
                      '  use it with these settings in the config, because --cfg-options cannot '
                      f'carry the path: {options}')


def _print_items(console: Console, items: Sequence[tuple[str, str]]) -> None:
    for name, note in items[:_SHOWN]:
        console.print(f'    {shown(name)}{": " if note else ""}{shown(note)}')
    if len(items) > _SHOWN:
        console.print(f'    ... and {len(items) - _SHOWN:,} more')


def _as_json(items: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    return [{'name': shown(name), 'note': shown(note)} for name, note in items]


def _part_as_json(part: Part) -> dict[str, Any]:
    common = dict(data_set=type(part.dataset).__name__, config_keys=part.keys,
                  folders=dict(part.dataset.data_prefix), images=len(part.pairs))
    if part.classifies:
        return dict(common, images_of_class=dict(zip(part.classes, part.counts.tolist())))
    return dict(common, reduce_zero_label=part.zero_is_no_label, share_of_label_0=part.zero_share,
                pixels_without_label=part.unlabelled,
                pixels=dict(zip(part.classes, part.counts.tolist())),
                pixels_as_stored={str(label): n for label, n in sorted(part.raw.items())})
