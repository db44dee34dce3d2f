"""What a training or a test leaves to be looked at: report.html, and pictures and tables beside it.

The page is one file that loads nothing. What is said of the ISR ratios is measured here, on a small
sample and within a limit of time.
"""
import csv
import io
import math
import shlex
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dataset import pseudo_collate
from mmengine.hooks import EMAHook
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.runner import Runner
from mmengine.utils.dl_utils import collect_env

from ..cost import unwrap
from ..data.classification import is_classifier
from ..engine.isr_hook import ISRHook
from ..errors import RatioError, UserError
from ..files import write_file
from ..isr import ISRRatio, isr
from . import report_html as page, report_plots as plots
from .bench import Bench
from .evaluation import FOLDER, Evaluation, ImageScore
from .loading import count_windows, ratio_name
from .report_sources import Ratios, find_sweep, join_curves, read_curves, size_name
from .sweep import DEFAULT, GREEDY, make_rows
from .sweep_report import Row, draw
from .timing import environment

_RATIO_SECONDS, _RATIO_SHARE, _LEAST_SECONDS = 60., 0.05, 10.
_RATIO_IMAGES = 50
_PAIRS = 12  # of classes that are confused
_FILES = ('curves.csv', 'loss.png', 'lr.png', 'metric.png', 'classes.csv', 'confusion.csv',
          'confusion.png', 'images.csv', 'isr.csv', 'isr.png',
          *(f'{kind}_{i}.png' for kind in ('best', 'worst') for i in range(1, 5)))


def write_report(runner: Runner, evaluation: Evaluation | None, kind: str, seconds: float, *,
                 compiled: bool = False, final: bool = True) -> Path:
    """Write report.html to the work dir, and what it shows as PNG and CSV below report/.

    Args:
        runner: It trains, has trained or has tested.
        evaluation: The last validation or the test.
        kind: 'training' or 'test'.
        seconds: How long this process ran.
        compiled: Whether its network is compiled.
        final: Whether the run has ended; the ISR curve is measured then.

    Returns:
        The path of the page.

    Raises:
        OSError: A file cannot be written.
    """
    return _Report(runner, evaluation, kind, seconds, compiled, final).write()


class _Report:

    def __init__(self, runner: Runner, evaluation: Evaluation | None, kind: str, seconds: float,
                 compiled: bool, final: bool) -> None:
        self.runner, self.kind, self.seconds, self.compiled = runner, kind, seconds, compiled
        self.final = final
        self.evaluation = evaluation
        self.counted = evaluation is not None and evaluation.matrix is not None
        self.work_dir = Path(runner.work_dir)
        self.folder = self.work_dir / FOLDER
        self.model: Any = unwrap(runner.model)
        whole: Any = runner.model
        self.augmented = isinstance(whole.module if is_model_wrapper(whole) else whole,
                                    BaseTTAModel)
        self.hook = next((hook for hook in runner.hooks if isinstance(hook, ISRHook)), None)
        self.ratio = 'none' if self.hook is None else ratio_name(self.hook.ratio)
        self.curves = read_curves(self.work_dir)
        trained = [name for name in ('mIoU', 'accuracy/top1') if self.curves.of(name, True)]
        self.main = trained[0] if trained else 'mIoU'
        self.written: set[str] = set()
        self.checkpoint = self._checkpoint()

    def write(self) -> Path:
        """Measure, draw and write all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        training = self.model.training
        self.model.eval()
        try:
            self.ratios = self._measure_ratios()
            self.cost = self._count_cost()
        finally:
            self.model.train(training)
        parts = [self._summary()]
        if self.curves.train or self.kind == 'training':
            parts.append(self._curves())
        if self.counted:
            parts += [self._classes(), self._confusion(), self._images()]
        elif self.evaluation is not None and self.evaluation.unlabelled:
            parts.append(page.section('Classes and images', (
                f'The {self.evaluation.unlabelled} images have no labels to compare with, so there '
                'are no figures of them.')))
        parts += [self._isr(), self._time(), *self._background()]
        for name in set(_FILES) - self.written:  # of an earlier report
            (self.folder / name).unlink(missing_ok=True)
        name = Path(self.runner.cfg.filename or 'a config').stem
        title = f'{"Training" if self.kind == "training" else "Test"} of {name}'
        path = self.work_dir / 'report.html'
        write_file(path, page.page(title, [
            f'{time.strftime("%Y-%m-%d %H:%M")}, in {self.work_dir.resolve()}. '
            f'{"" if self.final else "The run goes on. "}The pictures and tables lie in {FOLDER}/ '
            'as PNG and CSV.'], parts))
        return path

    # What is measured

    def _checkpoint(self) -> Path | None:
        """The tested one, or the last one of the training."""
        if self.kind == 'test':
            return Path(self.runner._load_from) if self.runner._load_from else None
        pointer = self.work_dir / 'last_checkpoint'
        return self.work_dir / pointer.read_text().strip() if pointer.is_file() else None

    def _dataset(self) -> Any:
        loop: Any = self.runner.test_loop if self.kind == 'test' else self.runner._val_loop
        return getattr(getattr(loop, 'dataloader', None), 'dataset', None)

    def _measure_ratios(self) -> Ratios:
        """The ISR curve, from a sweep of this checkpoint or measured now."""
        if self.kind == 'test' and self.checkpoint is not None and self.checkpoint.is_file():
            swept = find_sweep(self.checkpoint, self.work_dir)
            if swept is not None:
                return swept
        reason = self._why_no_ratios()
        if reason:
            return Ratios(says=reason)
        assert self.evaluation is not None
        try:
            with warnings.catch_warnings():  # of ratios that nobody asked for
                warnings.simplefilter('ignore', UserWarning)
                bench = Bench(self.model, self._dataset(), dict(
                    classes=len(self.evaluation.classes), nan_to_num=self.evaluation.nan_to_num,
                    ignore_index=self.evaluation.ignore_index), samples=_RATIO_IMAGES, look=1)
                ratios = self._ratios(bench)
                limit = max(min(_RATIO_SECONDS, _RATIO_SHARE * self.seconds), _LEAST_SECONDS)
                each = self.evaluation.seconds * self.runner.world_size / self.evaluation.size
                if 2 * len(ratios) * each > 1.5 * limit:
                    return Ratios(says=(
                        f'Not measured: one image takes {each:.1f} s here, and {len(ratios)} '
                        f'ratios of it more than the {limit:.0f} s that a report may take. '
                        'tools/isr_sweep.py measures them.'))
                bench.measure(ratios, seconds=limit)
                rows = make_rows(bench, ratios, memory=False)
        except UserError as error:
            return Ratios(says=f'There is none: {error}.')
        except Exception as error:  # of another's model, at a ratio that it was not tested with
            self.runner.logger.warning(f'The ISR curve of the report could not be measured: '
                                       f'{error!r}')
            return Ratios(says=f'It could not be measured: {type(error).__name__}: {error}')
        some = ('' if bench.images == len(bench.dataset)
                else f' of {len(bench.dataset)}, drawn at random')
        method = '' if self.hook is None or self.hook.method == 'average' else (
            f' Keys are averaged here; the figures above are of {self.hook.method}.')
        return Ratios(rows, bench.size, (
            f'Measured at the end of the run on {bench.images} image'
            f'{"s" if bench.images != 1 else ""}{some}, so the mIoU is not that of the whole set. '
            f'GMACs for {size_name(bench.size)} pixels; ms: batch 1, from the image to its labels.'
            f'{method} tools/isr_sweep.py measures more ratios on more images, and recommends '
            'one.'))

    def _why_no_ratios(self) -> str:
        if is_classifier(self.runner.cfg):
            return 'tools/compare_isr.py compares the ratios of a classifier.'
        if not self.counted:
            return 'There is none: no image with labels was predicted.'
        if self.augmented:
            return 'Not measured for test-time augmentation: test without --tta for it.'
        if self.compiled:
            return ('Not measured, since the network would be compiled anew for each ratio: '
                    'tools/isr_sweep.py measures it.')
        if any(isinstance(hook, EMAHook) for hook in self.runner.hooks):
            return ('Not measured, since EMAHook has put the averaged weights away: '
                    'tools/isr_sweep.py measures the checkpoint.')
        return '' if self.final else 'Measured when the run ends.'

    def _ratios(self, bench: Bench) -> list[ISRRatio]:
        found = []
        for value in (*DEFAULT, self.hook.ratio if self.hook else 'none'):
            with suppress(RatioError):  # the model may have other stages than the paper's
                found += [] if value == GREEDY else [bench.ratio(value)]
        return list(dict.fromkeys(found))

    def _count_cost(self) -> dict[str, str]:
        """GMACs at the ratio in effect and the size that the network sees, and parameters."""
        millions = sum(p.numel() for p in self.model.parameters()) / 1e6
        cost = {'parameters': f'{millions:.2f} M'}
        for row in self.ratios.rows:
            if self.ratios.size is not None and row.isr_ratio == self.ratio:
                return cost | {'GMACs': f'{row.gmacs:.3f}', 'size': size_name(self.ratios.size)}
        dataset = self._dataset()
        if dataset is None or not len(dataset) or self.augmented:
            return cost
        try:
            data = self.model.data_preprocessor(pseudo_collate([dataset[0]]), False)
            size = tuple(data['inputs'].shape[-2:])
            if self.hook is None:
                macs = count_windows(self.model, size)
            else:
                with isr(self.model, self.hook.ratio, method=self.hook.method,
                         crop_size=self.hook.crop_size):
                    macs = count_windows(self.model, size)
        except Exception as error:  # of another's model, or of data that has no such inputs
            self.runner.logger.info(f'GMACs could not be counted for the report: {error!r}')
            return cost
        return cost | {'GMACs': f'{macs / 1e9:.3f}', 'size': size_name(size)}

    # What is shown

    def _summary(self) -> page.Raw:
        evaluation, cfg = self.evaluation, self.runner.cfg
        metrics = evaluation.metrics if evaluation else {}
        values: list[tuple[str, Any, str]] = []
        remark = ''
        validated = self.curves.of(self.main, True)
        if self.kind == 'training' and validated:
            best = max(validated, key=lambda step: validated[step])
            remark = f'best {validated[best]:.2f} at {best}'
        for name, value in sorted(metrics.items(), key=lambda pair: pair[0] != self.main):
            if isinstance(value, (int, float, np.number)):
                values.append((name, f'{value:.2f}', remark if name == self.main else ''))
        if self.kind == 'training':
            values.append(('iterations', f'{self.runner.iter}', f'of {self.runner.max_iters}'))
        values.append(('wall time', _duration(self.seconds), 'of this process'))
        if evaluation is not None:
            values.append(('images', evaluation.size,
                           'validated' if self.kind == 'training' else 'tested'))
        if 'GMACs' in self.cost:
            values.append(('GMACs', self.cost['GMACs'], f'for {self.cost["size"]} pixels'))
        values.append(('parameters', self.cost['parameters'], ''))
        method = '' if self.hook is None or self.hook.method == 'average' else self.hook.method
        values.append(('ISR ratio', self.ratio, 'as trained' if self.hook is None else method))
        if self.checkpoint is not None:
            best_one = self.runner.message_hub.runtime_info.get('best_ckpt')
            values.append(('checkpoint', self.checkpoint.name,
                           f'best: {Path(best_one).name}' if best_one and
                           self.kind == 'training' else ''))
        if cfg.get('load_from') and self.kind == 'training' and not cfg.get('resume'):
            values.append(('started from', Path(cfg.load_from).name, ''))
        return page.cards(values)

    def _curves(self) -> page.Raw:
        curves = self.curves
        if not curves.train and not curves.val:
            return page.section('Curves', (
                'There are none: the folder holds no log of a training (vis_data/scalars.json).'))
        self._csv('curves.csv', *join_curves(curves))
        charts = []
        by_epoch = self.runner.log_processor.by_epoch
        for file, title, points, measured in (
                ('loss.png', 'Loss', curves.of('loss'), False),
                ('metric.png', f'{self.main}, validated', curves.of(self.main, True), True),
                ('lr.png', 'Learning rate', curves.of('lr'), False)):
            if points:
                path = self._path(file)
                plots.draw_curve(points, path, title, measured=measured, axis_title='epoch' if
                                 measured and by_epoch else 'iteration')
                charts.append(page.chart(path.read_bytes(), title))
        says = [f'The run was started {curves.starts} times; what a later start logged takes the '
                'place of what an earlier one did.'] if curves.starts > 1 else []
        if self.kind == 'test':
            says.append('Of the training in this folder.')
        return page.section('Curves', page.side_by_side(charts), *says)

    def _classes(self) -> page.Raw:
        found = self.evaluation
        assert found is not None
        iou, accuracy = 100 * found.iou, 100 * found.accuracy
        header = ('class', 'IoU', 'Acc', 'pixels labelled', 'pixels predicted', 'images')
        figures = list(zip(found.classes, iou, accuracy, found.labelled, found.predicted,
                           found.occurs))
        self._csv('classes.csv', ('number', *header), [
            (i, name, _rounded(one), _rounded(two), *counts)
            for i, (name, one, two, *counts) in enumerate(figures)])
        many = len(found.classes) > plots.NAMED
        rows = [(page.colour(found.palette[i], f'{i} {name}' if many else name),
                 page.share(one, _percent(one)), page.share(two, _percent(two)),
                 *(f'{count:,}' for count in counts))
                for i, (name, one, two, *counts) in enumerate(figures)]
        when = '' if self.kind == 'test' else (
            f'Of the validation after iteration {found.iteration}, the last one. ')
        return page.section('Classes', (
            f'{when}images: in how many of the {len(found.images)} the class is labelled. A class '
            'that is neither labelled nor predicted has no IoU and is left out of the mIoU.'),
            page.table(header, rows, wide=True))

    def _confusion(self) -> page.Raw:
        found = self.evaluation
        assert found is not None
        assert found.matrix is not None
        counts = found.matrix[:-1, :-1]
        with np.errstate(invalid='ignore'):
            shares = counts / found.labelled[:, None]
        self._csv('confusion.csv', ('label \\ predicted', *found.classes), [
            (name, *row) for name, row in zip(found.classes, counts.tolist())])
        path = self._path('confusion.png')
        plots.draw_matrix(shares, found.classes, path)
        pairs = np.where(np.eye(len(shares), dtype=bool), 0, np.nan_to_num(shares))
        order = np.argsort(-pairs, axis=None, kind='stable')[:_PAIRS]
        rows = [(found.classes[i], found.classes[j], _percent(100 * shares[i, j]) + ' %',
                 f'{counts[i, j]:,}')
                for i, j in zip(*np.unravel_index(order, shares.shape)) if counts[i, j]]
        return page.section(
            'Confusion', 'Of the pixels of each class (row), the share that is predicted as each '
            'class (column).', page.square(page.chart(path.read_bytes(), 'confusion matrix')),
            page.heading('Most confused'),
            page.table(('label', 'predicted as', 'share of the label', 'pixels'), rows)
            if rows else 'None: every pixel is right.')

    def _images(self) -> page.Raw:
        found = self.evaluation
        assert found is not None
        self._csv('images.csv', [each.name for each in fields(ImageScore)], [
            (each.name, _rounded(each.miou), _rounded(each.accuracy)) for each in found.images])
        scored = sum(not math.isnan(each.miou) for each in found.images)
        most = max(scored // 2, 1)
        parts: list[page.Raw | str] = [
            'By the mean IoU of the classes that are labelled in the image. Errors are red; what '
            'has no label is dark.']
        if not scored:
            parts = ['No image has a labelled pixel.']
        for kind, examples in (('worst', found.worst[:most]), ('best', found.best[:most])):
            if scored < 2 and kind == 'worst':
                continue
            if examples:
                parts.append(page.heading(f'{kind.capitalize()} {len(examples)}'))
            for i, example in enumerate(examples, 1):
                shown = plots.panels(example, found.palette)
                plots.write_row(list(shown.values()), self._path(f'{kind}_{i}.png'))
                parts += [page.paragraph(
                    f'{Path(example.score.name).name}: IoU {example.score.miou:.1f}, '
                    f'{example.score.accuracy:.1f} % of its pixels right'), page.row({
                        name: plots.encode(picture, name == 'image')
                        for name, picture in shown.items()})]
        return page.section('Images', *parts)

    def _isr(self) -> page.Raw:
        rows = self.ratios.rows
        if not rows:
            return page.section('ISR curve', self.ratios.says)
        header = [each.name for each in fields(Row)]
        self._csv('isr.csv', header, [[_rounded(value) if isinstance(value, float) else value
                                       for value in asdict(row).values()] for row in rows])
        path = self._path('isr.png')
        draw(rows, path, named={row.isr_ratio for row in rows})
        here = self.ratio if self.hook and self.hook.method == 'average' else ''
        shown = [(row.isr_ratio + (' (this run)' if row.isr_ratio == here else ''),
                  f'{row.miou:.2f}', f'{row.change:+.2f}', f'{row.gmacs:.3f}',
                  f'{row.ms:.1f}') for row in sorted(rows, key=lambda row: -row.gmacs)]
        return page.section(
            'ISR curve', page.broad(page.chart(path.read_bytes(), 'mIoU over GMACs and time')),
            page.table(('ratio', 'mIoU', 'change', 'GMACs', 'ms'), shown), self.ratios.says)

    def _time(self) -> page.Raw:
        shown: dict[str, str] = {'this process': _duration(self.seconds)}
        if self.kind == 'training':
            times, waits = (self.curves.of(name) for name in ('time', 'data_time'))
            steps = [0, *times]
            whole = sum(value * (step - before) for (step, value), before in
                        zip(times.items(), steps))
            if times:
                shown['training steps'] = (f'{_duration(whole)} over {self.curves.starts} start'
                                           f'{"s" if self.curves.starts > 1 else ""}')
                shown['per iteration'] = f'{statistics.median(times.values()):.3f} s, median'
            if times and waits and sum(times.values()):
                share = sum(waits.values()) / sum(times.values())
                shown['waiting for data'] = f'{share:.1%} of it'
        found = self.evaluation
        if found is not None and found.seconds:
            what = 'last validation' if self.kind == 'training' else 'test'
            shown[what] = (f'{_duration(found.seconds)}, {found.size} images, '
                           f'{found.size / found.seconds:.1f} images/s')
        shown['processes'] = str(self.runner.world_size)
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated() / 2**30
            shown['most GPU memory'] = f'{peak:.2f} GiB allocated on the first GPU'
        with suppress(ImportError):
            import resource  # Windows has none
            # Kilobytes on Linux, bytes on macOS.
            unit = 2**30 if sys.platform == 'darwin' else 2**20
            most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
            shown['most memory'] = f'{most:.2f} GiB of the first process'
        if 'GMACs' in self.cost:
            ratio = '' if self.hook is None else f', ISR {self.ratio}'
            shown['GMACs'] = f'{self.cost["GMACs"]} for {self.cost["size"]} pixels{ratio}'
        shown['parameters'] = self.cost['parameters']
        return page.section('Time and cost', page.facts(shown))

    def _background(self) -> list[page.Raw]:
        cfg = self.runner.cfg
        dumped = self.work_dir / (Path(cfg.filename).name if cfg.filename else '')
        text = dumped.read_text(encoding='utf-8') if dumped.is_file() else cfg.pretty_text
        device = 'cuda' if torch.cuda.is_available() else 'cpu'
        found = {'command': shlex.join(sys.argv), 'compile': 'yes' if self.compiled else 'no',
                 **environment(device),
                 **{str(name): str(value) for name, value in collect_env().items()}}
        built = found.pop('PyTorch compiling details', '')
        found.pop('numpy_random_seed', None)  # not that of the run
        return [page.section('Configuration', f'{cfg.filename or ""}',
                             page.folded('All settings', text)),
                page.section('Environment', page.facts(found),
                             page.folded('How PyTorch was built', built))]

    # Files

    def _path(self, name: str) -> Path:
        assert name in _FILES, name
        self.written.add(name)
        return self.folder / name

    def _csv(self, name: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator='\n')
        writer.writerows([header, *rows])
        write_file(self._path(name), text.getvalue())


def _percent(value: float) -> str:
    return '–' if math.isnan(value) else f'{value:.2f}'


def _rounded(value: float) -> float | str:
    """For a CSV: empty where there is no number."""
    return '' if math.isnan(value) else round(float(value), 4)


def _duration(seconds: float) -> str:
    """Such as 3 h 12 min, 4 min 5 s or 7.3 s."""
    if seconds < 60:
        return f'{seconds:.1f} s'
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours} h {minutes} min' if hours else f'{minutes} min {rest} s'


