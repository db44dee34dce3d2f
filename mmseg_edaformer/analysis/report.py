"""The report of a training or test: report.html in its work dir, and charts and tables beside it.

The page is one file that loads nothing. Its ISR curve is measured here, on a small sample and
within a time limit.
"""
import base64
import math
import shlex
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import asdict, astuple
from datetime import timedelta
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.dataset import pseudo_collate
from mmengine.hooks import EMAHook
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.runner import Runner

from ..cost import unwrap
from ..data.classification import is_classifier
from ..engine.isr_hook import ISRHook
from ..errors import RatioError, UserError
from ..files import write_file
from ..isr import isr
from . import report_plots as plots
from .bench import Bench
from .counts import FOLDER, Evaluation
from .loading import count_windows
from .sweep import DEFAULT, GREEDY, make_rows
from .sweep_report import Row, draw, find_sweep
from .timing import environment, render, size_text

_CURVE_SECONDS, _CURVE_SHARE, _LEAST_SECONDS = 60., 0.05, 10.
_CURVE_IMAGES = 50
_PAIRS = 12  # of classes that are confused
_NAMED = 40  # classes whose confusion matrix can be read

_FILES = ('curves.csv', 'loss.png', 'lr.png', 'metric.png', 'classes.csv', 'confusion.csv',
          'images.csv', 'isr.csv', 'isr.png')


class Report:
    """Writes report.html to the work dir, and its charts and tables to report/ as PNG and CSV.

    Args:
        runner: The runner that trains, has trained or has tested.
        evaluation: The last validation, or the test.
        kind: 'training' or 'test'.
        seconds: Duration of this process so far.
        compiled: Whether the network is compiled.
        final: Whether the run has ended; only then the ISR curve is measured.
    """

    def __init__(self, runner: Runner, evaluation: Evaluation | None, kind: str, seconds: float, *,
                 compiled: bool = False, final: bool = True) -> None:
        self.runner, self.evaluation, self.seconds = runner, evaluation, seconds
        self.training, self.compiled, self.final = kind == 'training', compiled, final
        self.counted = evaluation if evaluation and evaluation.classes and (
            evaluation.images) else None
        self.work_dir = Path(runner.work_dir)
        self.folder = self.work_dir / FOLDER
        self.model: Any = unwrap(runner.model)
        whole: Any = runner.model
        self.augmented = isinstance(whole.module if is_model_wrapper(whole) else whole,
                                    BaseTTAModel)
        self.hook = next((hook for hook in runner.hooks if isinstance(hook, ISRHook)), None)
        self.isr_ratio = 'none' if self.hook is None else str(self.hook.isr_ratio)
        self.other_method = '' if self.hook is None or self.hook.method == 'average' else (
            self.hook.method)
        self.curves = plots.read_curves(self.work_dir)
        self.metric = next((name for name in ('mIoU', 'accuracy/top1')
                            if self.curves.of(f'val/{name}')), 'mIoU')
        # The tested checkpoint, or the last one of the training.
        pointer = self.work_dir / 'last_checkpoint'
        self.checkpoint = Path(runner._load_from) if runner._load_from else None
        if self.training:
            self.checkpoint = self.work_dir / pointer.read_text().strip() if (
                pointer.is_file()) else None
        loop: Any = runner._val_loop if self.training else runner.test_loop
        self.dataset: Any = getattr(getattr(loop, 'dataloader', None), 'dataset', None)

    def write(self) -> Path:
        """Measure, draw and write everything; returns the path of the page."""
        self.folder.mkdir(parents=True, exist_ok=True)
        training = self.model.training
        self.model.eval()
        try:
            self.ratios, self.ratios_note = self._measure_ratios()
            self.gmacs = self._count_gmacs()
        finally:
            self.model.train(training)
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        for name in _FILES:  # of an earlier report
            (self.folder / name).unlink(missing_ok=True)
        counts: dict[str, Any] = dict(classes=[]) if self.counted is None else dict(
            classes=self._classes(self.counted), confusion=self._confusion(self.counted),
            examples=self._examples(self.counted))
        cfg = self.runner.cfg
        dumped = self.work_dir / (Path(cfg.filename).name if cfg.filename else '')
        device = 'cuda' if torch.cuda.is_available() else 'cpu'
        path = self.work_dir / 'report.html'
        write_file(path, render(
            'report.html.jinja', filters=_FILTERS, report=self, cfg=cfg, folder=FOLDER,
            named=_NAMED, date=time.strftime('%Y-%m-%d %H:%M'), best=self._best(),
            charts=self._curves(), isr=self._isr(), steps=self._steps(),
            memory=torch.cuda.max_memory_allocated() / 2**30 if device == 'cuda' else 0,
            settings=dumped.read_text('utf-8') if dumped.is_file() else cfg.pretty_text,
            environment={'command': shlex.join(sys.argv), 'compile': 'yes' if self.compiled else
                         'no', **environment(device)}, **counts))
        return path

    def _measure_ratios(self) -> tuple[list[Row], str]:
        """Return the ISR curve, from a sweep of this checkpoint or measured now, and its source."""
        swept = None if self.training or self.checkpoint is None else find_sweep(
            self.checkpoint, self.work_dir)
        reason = self._why_no_ratios()
        if swept or reason:
            return swept or ([], reason)
        counted = self.counted
        assert counted is not None
        try:
            with warnings.catch_warnings():  # of ratios that nobody asked for
                warnings.simplefilter('ignore', UserWarning)
                bench = Bench(self.model, self.dataset, dict(
                    classes=len(counted.classes), ignore_index=counted.ignore_index,
                    nan_to_num=counted.nan_to_num), samples=_CURVE_IMAGES, look=1)
                ratios = []
                for value in dict.fromkeys((*DEFAULT, self.isr_ratio)):
                    with suppress(RatioError):  # the model may have other stages than the paper's
                        ratios += [] if value == GREEDY else [bench.ratio(value)]
                ratios = list(dict.fromkeys(ratios))
                limit = max(min(_CURVE_SECONDS, _CURVE_SHARE * self.seconds), _LEAST_SECONDS)
                image = counted.seconds * self.runner.world_size / counted.size
                if 2 * len(ratios) * image > 1.5 * limit:
                    return [], (
                        f'Not measured: one image takes {image:.1f} s here, so {len(ratios)} '
                        f'ratios would exceed the {limit:.0f} s that a report may take. '
                        'Use tools/isr_sweep.py.')
                bench.measure(ratios, seconds=limit)
                rows = make_rows(bench, ratios, memory=False)
        except UserError as error:
            return [], f'Not measured: {error}.'
        except Exception as error:  # of a foreign model, at a ratio that it was not tested with
            self.runner.logger.warning('The ISR curve of the report could not be measured: '
                                       f'{error!r}')
            return [], f'It could not be measured: {type(error).__name__}: {error}'
        sample = '' if bench.images == len(bench.dataset) else (
            f' of {len(bench.dataset)}, drawn at random, so the mIoU is not that of the whole set')
        method = self.other_method and (
            f' Keys are averaged here; the metrics above are those of {self.other_method}.')
        return rows, (
            f'Measured at the end of the run on {bench.images} image'
            f'{"s" if bench.images != 1 else ""}{sample}.{method} GMACs for '
            f'{size_text(bench.size)} pixels; ms: batch 1, from the image to its labels. '
            'tools/isr_sweep.py measures more ratios on more images and recommends one.')

    def _why_no_ratios(self) -> str:
        ema = any(isinstance(hook, EMAHook) for hook in self.runner.hooks)
        reasons = (
            (is_classifier(self.runner.cfg), 'for classifiers: run tools/test.py at each ratio'),
            (self.counted is None, 'because no image with labels was predicted'),
            (self.augmented, 'with test-time augmentation: test without --tta'),
            (self.compiled, 'because the network would be compiled anew for each ratio: use '
             'tools/isr_sweep.py'),
            (ema, 'because EMAHook has put the averaged weights away: use tools/isr_sweep.py'),
            (not self.final, 'before the run ends'))
        return next((f'Not measured {reason}.' for holds, reason in reasons if holds), '')

    def _count_gmacs(self) -> tuple[float, str] | None:
        """Return the GMACs in effect, and for which image size."""
        if not self.dataset or self.augmented:
            return None
        try:
            data = self.model.data_preprocessor(pseudo_collate([self.dataset[0]]), False)
            size = tuple(data['inputs'].shape[-2:])
            with nullcontext() if self.hook is None else isr(
                    self.model, self.hook.isr_ratio, method=self.hook.method,
                    crop_size=self.hook.crop_size):
                macs = count_windows(self.model, size)
        except Exception as error:  # of a foreign model, or of data that has no such inputs
            self.runner.logger.info(f'GMACs could not be counted for the report: {error!r}')
            return None
        return macs / 1e9, size_text(size)

    def _best(self) -> str:
        validated = self.curves.of(f'val/{self.metric}') if self.training else {}
        best = max(validated, key=lambda step: validated[step], default=None)
        return '' if best is None else f'best {validated[best]:.2f} at {best}'

    def _steps(self) -> dict[str, float] | None:
        times, waits = (self.curves.of(name) for name in ('time', 'data_time'))
        if not self.training or not sum(times.values()):
            return None
        return dict(total=sum(value * (step - before) for (step, value), before in
                              zip(times.items(), [0, *times])),
                    median=statistics.median(times.values()),
                    waiting=sum(waits.values()) / sum(times.values()))

    def _curves(self) -> dict[str, Path]:
        """Write the table and the charts of the training log; returns the charts by title."""
        curves = self.curves
        charts: dict[str, Path] = {}
        if curves.lines:
            names = sorted({name for line in curves.lines.values() for name in line},
                           key=lambda name: (name.startswith('val/'), name))
            plots.write_csv(self.folder / 'curves.csv', ['step', *names], [
                [step, *(line.get(name, '') for name in names)]
                for step, line in sorted(curves.lines.items())])
        for name, title, points, measured in (
                ('loss', 'Loss', curves.of('loss'), False),
                ('metric', f'Validated {self.metric}', curves.of(f'val/{self.metric}'), True),
                ('lr', 'Learning rate', curves.of('lr'), False)):
            if points:
                charts[title] = self.folder / f'{name}.png'
                plots.draw_curve(points, charts[title], title, measured=measured,
                                 unit='epoch' if measured and self.runner.log_processor.by_epoch
                                 else 'iteration')
        return charts

    def _classes(self, evaluation: Evaluation) -> list[dict[str, Any]]:
        rows = [dict(zip(('class', 'IoU', 'Acc', 'pixels labelled', 'pixels predicted', 'images'),
                         values)) for values in zip(
            evaluation.classes, 100 * evaluation.iou, 100 * evaluation.accuracy,
            evaluation.labelled, evaluation.predicted, evaluation.occurs)]
        plots.write_csv(self.folder / 'classes.csv', ('number', *rows[0]), [
            (i, *row.values()) for i, row in enumerate(rows)])
        return rows

    def _confusion(self, evaluation: Evaluation) -> dict[str, Any]:
        counts, classes = evaluation.matrix[:-1, :-1], evaluation.classes
        shares = counts / np.maximum(evaluation.labelled, 1)[:, None]
        plots.write_csv(self.folder / 'confusion.csv', ('label \\ predicted', *classes), [
            (name, *row) for name, row in zip(classes, counts.tolist())])
        pairs = sorted(((shares[i, j], i, j) for i, j in np.argwhere(counts) if i != j),
                       key=lambda pair: -pair[0])
        return dict(shares=shares.tolist(), pairs=[
            (classes[i], classes[j], f'{100 * share:.2f} %', f'{counts[i, j]:,}')
            for share, i, j in pairs[:_PAIRS]])

    def _examples(self, evaluation: Evaluation) -> dict[str, list[Any]]:
        """Return the worst and the best images, each with score and panels; none is in both."""
        plots.write_csv(self.folder / 'images.csv', ('name', 'miou', 'accuracy'),
                        evaluation.images)
        scored = sum(not math.isnan(score.miou) for score in evaluation.images)
        shown: dict[str, list[Any]] = {}
        for rank, examples in (('worst', evaluation.worst[:scored // 2]),
                               ('best', evaluation.best[:max(scored // 2, 1)])):
            for example in examples:
                panels = plots.panels(example, evaluation.palette)
                shown.setdefault(rank, []).append((example.score, {
                    name: cv2.imencode('.jpg' if name == 'image' else '.png', panel)[1].tobytes()
                    for name, panel in panels.items()}))
        return shown

    def _isr(self) -> Path:
        """Write the table and the chart of the ISR curve, if there is one."""
        rows, path = self.ratios, self.folder / 'isr.png'
        if rows:
            plots.write_csv(path.with_suffix('.csv'), list(asdict(rows[0])),
                            [astuple(row) for row in rows])
            draw(rows, path, named={row.isr_ratio for row in rows})
        return path


def _data_uri(source: bytes | Path) -> str:
    content = source.read_bytes() if isinstance(source, Path) else source
    kind = 'png' if content.startswith(b'\x89PNG') else 'jpeg'
    return f'data:image/{kind};base64,{base64.b64encode(content).decode()}'


_FILTERS: dict[str, Callable[[Any], str]] = dict(
    uri=_data_uri, duration=lambda seconds: str(timedelta(seconds=round(seconds))),
    file_name=lambda path: Path(path).name, file_stem=lambda path: Path(path).stem,
    figure=lambda value: '–' if math.isnan(value) else f'{value:.2f}')
