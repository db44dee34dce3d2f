"""The sources of a run's report beside its counts: the training log and the ISR curve."""
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .sweep_report import Row
from .timing import size_text


@dataclass
class Curves:
    """The log of a training, by step and then by name.

    Attributes:
        train: Losses, learning rate, times.
        val: Metrics; a step is an epoch if the validations were counted in epochs.
        starts: Number of times that the run was started.
    """
    train: dict[int, dict[str, float]] = field(default_factory=dict)
    val: dict[int, dict[str, float]] = field(default_factory=dict)
    starts: int = 0

    def of(self, name: str, validated: bool = False) -> dict[int, float]:
        """Return one value by step."""
        lines = self.val if validated else self.train
        return {step: line[name] for step, line in sorted(lines.items()) if name in line}


def read_curves(work_dir: Path) -> Curves:
    """Join the logs of all starts of a run, each of which has a folder of its own.

    From its first step on, a start replaces what earlier ones logged. One that begins as early as
    those before it is another run, and replaces all of them.
    """
    curves = Curves()
    for path in sorted(work_dir.glob('*/vis_data/scalars.json')):
        train: dict[int, dict[str, float]] = {}
        val: dict[int, dict[str, float]] = {}
        for text in path.read_text(encoding='utf-8', errors='replace').splitlines():
            try:
                line = json.loads(text)
            except ValueError:  # cut by a kill
                continue
            if isinstance(line, dict) and isinstance(line.get('step'), int):
                numbers = {name: value for name, value in line.items()
                           if isinstance(value, (int, float))}
                of_training = 'loss' in line or 'lr' in line
                (train if of_training else val).setdefault(line['step'], {}).update(numbers)
        if not train and not val:
            continue
        if train:
            first = min(train)
            if first <= min(curves.train, default=first):
                curves = Curves()
            curves.train = {step: line for step, line in curves.train.items() if step < first}
            curves.val = {step: line for step, line in curves.val.items() if step < first}
        curves.train |= train
        curves.val |= val
        curves.starts += 1
    return curves


def join_curves(curves: Curves) -> tuple[list[str], list[list[Any]]]:
    """Return header and rows of a table of all values; those of validations have a prefix."""
    lines: dict[int, dict[str, float]] = {}
    for prefix, part in (('', curves.train), ('val/', curves.val)):
        for step, line in part.items():
            lines.setdefault(step, {}).update(
                (prefix + name, value) for name, value in line.items() if name != 'step')
    names = sorted({name for line in lines.values() for name in line},
                   key=lambda name: (name.startswith('val/'), name))
    return ['step', *names], [[step, *(line.get(name, '') for name in names)]
                              for step, line in sorted(lines.items())]


@dataclass
class Ratios:
    """The ISR curve: its points, the image size, and a note on where it is from or why it lacks."""
    rows: list[Row] = field(default_factory=list)
    size: tuple[int, int] | None = None
    note: str = ''


def find_sweep(checkpoint: Path, work_dir: Path) -> Ratios | None:
    """Return the newest sweep of a checkpoint, in the work dir or beside it, that is newer."""
    paths = [path for folder in {work_dir.resolve(), checkpoint.resolve().parent}
             for pattern in ('sweep.json', 'isr_sweep_*/sweep.json')
             for path in folder.glob(pattern)]
    for path in sorted(paths, key=lambda path: -path.stat().st_mtime):
        try:
            content = json.loads(path.read_text(encoding='utf-8'))
            if (os.path.realpath(content['checkpoint']) == os.path.realpath(checkpoint) and
                    path.stat().st_mtime > checkpoint.stat().st_mtime):
                size = tuple(content['input_size'])
                return Ratios([Row(**row) for row in content['rows']], size, (
                    f'From {path}: {content["images"]} of {content["images_of_test_set"]} images, '
                    f'GMACs for {size_text(size)} pixels.'))
        except (OSError, ValueError, KeyError, TypeError):  # no sweep
            continue
    return None
