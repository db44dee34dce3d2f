"""Export a trained segmentor to ONNX, OpenVINO or torch.export, checked against PyTorch."""
import json
import statistics
import tempfile
from functools import cache, partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..analysis.bench import mean_iou
from ..analysis.timing import take_turns
from ..compat import release
from ..errors import ConfigError, RatioError, first_line
from ..files import write_file
from ..isr import ISRRatio, QueryRatio
from ..isr.ratio import NONE
from ..predict.foreign import Foreign
from ..predict.inputs import find_images
from ..predict.outputs import writing
from ..predict.segmenter import Segmenter
from .graph import DIALS, RUNTIME, Adapted, Deployed, describe, quiet, trace
from .parity import (
    LEAST_EQUAL,
    ExportReport,
    Measured,
    Parity,
    TestImages,
    check,
    fit,
    read_images,
    reference,
    settings_of,
    trial_ratios,
)
from .runtimes import FORMATS, Exported, Run, placing

__all__ = ['FORMATS', 'ExportReport', 'Exported', 'export']

_CALIBRATED = 128
_FIXED = 'with this ratio fixed'
_TWINS = 2  # trial ratios at which a file is timed beside one with that ratio fixed


def export(model: str | Path | torch.nn.Module, out: str | Path, *, format: str,
           checkpoint: str | Path | None = None, isr_ratio: ISRRatio | int | str = 'none',
           query_ratio: QueryRatio | int | str | None = None, size: tuple[int, int] | None = None,
           labels: bool = False, int8: bool = False, calibrate: str | Path | None = None,
           images: str | Path | None = None, samples: int = 40, threads: int | None = None,
           **settings: Any) -> ExportReport:
    """Write a model for another runtime, and check that it predicts what PyTorch predicts.

    The file is written under another name, loaded again and compared, and takes its name last.

    Args:
        model: What `Segmenter` takes.
        out: The file; its suffix is that of the format.
        format: One of `FORMATS`.
        checkpoint: Weights for a config, see `Segmenter`.
        isr_ratio: The ISR ratio, which is fixed in the file; or 'runtime', and it is an input.
        query_ratio: The query ratio, fixed or an input as ``isr_ratio`` is.
        size: Height and width of all images; None for images of any size.
        labels: Resize the logits and take the largest class inside the graph.
        int8: Quantise the model, with ranges of activations measured on ``calibrate``.
        calibrate: A folder or pattern of images like those that the model will see.
        images: A folder or pattern of images to compare on; by default the config's test images,
            or else drawn ones.
        samples: Most labelled test images on which the mIoU of float and of int8 is measured.
        threads: Threads of all runtimes; by default as many as PyTorch has.
        **settings: Those of `Segmenter` for models of other libraries, like ``keep_ratio``.

    Raises:
        UserError: A package is missing, the arguments do not fit each other or the model, or the
            file is too far from PyTorch; nothing is written then.
    """
    out = Path(out)
    ratio, dials = _read_ratio(isr_ratio, query_ratio)
    _check_arguments(out, format, dials, int8, calibrate, size, samples, threads)
    segmenter = Segmenter(model, checkpoint, device='cpu', isr_ratio=ratio, **settings)
    if isinstance(segmenter.model, Foreign):
        segmenter.model = Adapted(segmenter.model, segmenter.description.pipeline[-1], bool(dials))
    if size is None:
        _check_open_size(segmenter)
    deployed = Deployed(segmenter.model, labels, dials)
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        test_images = TestImages(segmenter, model, images, samples)
        return _export(segmenter, deployed, out, format, size, calibrate, test_images)
    finally:
        torch.set_num_threads(before)


def _export(segmenter: Segmenter, deployed: Deployed, out: Path, kind: str,
            size: tuple[int, int] | None, calibrate: str | Path | None,
            test_images: TestImages) -> ExportReport:
    """Write, check and time; in int8 if there are images to ``calibrate``."""
    program, minimum = trace(deployed, size)
    metadata = describe(segmenter, deployed, size, minimum)
    inputs = test_images.inputs(size, minimum, bool(deployed.dials))
    ratios = trial_ratios(deployed, segmenter.isr_ratio)
    rows: list[Measured] = []
    with tempfile.TemporaryDirectory() as folder, placing(out) as place:
        plain = place if calibrate is None else Path(folder) / out.name
        try:
            with quiet():
                FORMATS[kind].write(program, plain, json.dumps(metadata))
        except RuntimeError as error:  # of torch.onnx
            raise ConfigError(f'{out} is not written: {kind} cannot hold this model '
                              f'({first_line(error)}). Try another --format or another ratio'
                              ) from error
        files = {kind if calibrate is None else f'{kind} float32': plain}
        if calibrate is not None:
            metadata['int8'], files[f'{kind} int8'] = True, place
            quantise, file = FORMATS[kind].quantise, Exported(plain)
            assert quantise is not None
            with quiet():
                quantise(plain, place, json.dumps(metadata), [
                    dict(images=fit(image, size, minimum)[None],
                         **file.multipliers(**settings_of(deployed, ratio)))
                    for image, ratio in zip(read_images(segmenter, calibrate, _CALIBRATED),
                                            cycle(ratios))])
        load = cache(Exported)
        for ratio in ratios:
            segmenter.isr_ratio = ratio
            calls: dict[str, Run] = {'PyTorch': lambda batch: reference(deployed, batch)}
            parities: dict[str, Parity] = {}
            for name, path in files.items():
                int8, least = path != plain, LEAST_EQUAL[path != plain]
                with quiet():  # about cells that shrink to small images
                    calls[name], parities[name] = check(
                        path, out, deployed, inputs, ratio, int8=int8,
                        least=0. if int8 and ratio != ratios[0] else least, load=load)
                if parities[name].equal < least:
                    test_images.notes.append(
                        f'At {ratio}, int8 gives {100 * parities[name].equal:.2f} % of PyTorch\'s '
                        'labels on these images: do not use it there.')
            if deployed.dials and ratio in ratios[:_TWINS]:
                calls.update(_fix(segmenter, deployed, kind, size, Path(folder), inputs[0],
                                  test_images.notes))
            times = take_turns({name: partial(partial, call, inputs[0]) for name, call in
                                calls.items()}, torch.device('cpu'), repeats=30, seconds=20)
            areas = {} if calibrate is None else test_images.areas(calls, size, minimum)
            for name in calls:
                rows.append(Measured(
                    name + f', {ratio}' * bool(deployed.dials), parities.get(name),
                    1e3 * statistics.median(times[name]), *_compare(times, name, 'PyTorch'),
                    float(mean_iou(areas[name].sum(0))) if areas else None,
                    _compare(times, name, _FIXED) if name in files and _FIXED in times else None))
    timing = 'times of {}x{}x{} in turn (with quartiles), threads: {}'.format(
        *inputs[0].shape[:3], torch.get_num_threads())
    if areas:
        timing += f'; mIoU of {len(areas["PyTorch"])} labelled images'
    return ExportReport(out, metadata, tuple(rows), timing, tuple(test_images.notes))


def _compare(times: dict[str, list[float]], name: str, base: str
             ) -> tuple[float, tuple[float, float]]:
    """Return the median and the quartiles of the ratio of two times in the same turn."""
    low, middle, high = statistics.quantiles(np.divide(times[name], times[base]))
    return middle, (low, high)


def _fix(segmenter: Segmenter, deployed: Deployed, kind: str, size: tuple[int, int] | None,
         folder: Path, images: np.ndarray, notes: list[str]) -> dict[str, Run]:
    """Return the same file with the segmenter's ratio fixed, if it takes the images, by name.

    Where there can be no such file, return {} and add a note: it serves for times alone.
    """
    fixed = Deployed(segmenter.model, deployed.labels)
    path = folder / f'fixed{FORMATS[kind].suffix}'
    try:
        program, minimum = trace(fixed, size)
        if images.shape[1] < minimum[0] or images.shape[2] < minimum[1]:
            return {}
        metadata = json.dumps(describe(segmenter, fixed, size, minimum))
        with quiet():
            FORMATS[kind].write(program, path, metadata)
    except (ConfigError, RuntimeError) as error:
        notes.append(f'No time {_FIXED} ({segmenter.isr_ratio}): {first_line(error)}')
        return {}
    return {_FIXED: Exported(path)}


def _read_ratio(isr_ratio: ISRRatio | int | str, query_ratio: QueryRatio | int | str | None
                ) -> tuple[ISRRatio, tuple[str, ...]]:
    """Return the ratio that is fixed, and the names of the ratios that are inputs."""
    keys, _, queries = str(isr_ratio).partition('+q')
    values = keys, queries if query_ratio is None else str(query_ratio)
    fixed = [NONE if value in (RUNTIME, '') else value for value in values]
    try:
        ratio = ISRRatio.parse(fixed[0]).with_queries(fixed[1])
    except RatioError as error:
        raise RatioError(f'{error}. Or {RUNTIME}, which makes it an input of the file') from error
    return ratio, tuple(name for name, value in zip(DIALS, values) if value == RUNTIME)


def _check_arguments(out: Path, kind: str, dials: tuple[str, ...], int8: bool,
                     calibrate: str | Path | None, size: tuple[int, int] | None, samples: int,
                     threads: int | None) -> None:
    """Check what can be checked before a model is loaded."""
    if kind not in FORMATS:
        raise ConfigError(f"format '{kind}' does not exist: use {', '.join(FORMATS)}")
    if out.suffix != FORMATS[kind].suffix:
        raise ConfigError(f'--out {out}: a file of the format {kind} ends in '
                          f'{FORMATS[kind].suffix}')
    if int8 and FORMATS[kind].quantise is None:
        raise ConfigError(f'--int8 does not work with --format {kind}: use onnx or openvino')
    if int8 and dials and kind == 'openvino':
        # NNCF would measure ranges without the setting that `_save_openvino` explains.
        raise ConfigError('--int8 does not work with --format openvino where a ratio is '
                          f'{RUNTIME}, because NNCF may measure wrong ranges then: use onnx, or '
                          'one ratio')
    if int8 != (calibrate is not None):
        raise ConfigError('--int8 needs --calibrate FOLDER, with images like those that the model '
                          'will see' if int8 else '--calibrate is for --int8: give both or none')
    for name, value in (('samples', samples), ('threads', threads)):
        if value is not None and value < 1:
            raise ConfigError(f'--{name} {value}: give 1 or more')
    if size is not None and min(size) < 32:
        raise ConfigError(f'--size {size[0]},{size[1]}: give height and width in pixels from 32 up')
    if release(torch.__version__) < (2, 9):
        raise ConfigError(f'torch {torch.__version__} is too old for the export: install torch 2.9 '
                          'or newer')
    FORMATS[kind].check(*(['nncf'] if int8 and kind == 'openvino' else ()))
    if calibrate is not None:
        find_images(calibrate)
    with writing(out):
        write_file(out.with_name(f'.{out.name}.writable'), '')
        out.with_name(f'.{out.name}.writable').unlink()


def _check_open_size(segmenter: Segmenter) -> None:
    """Check that one graph can predict images of any size as the model does."""
    model: Any = segmenter.model
    if segmenter.isr_ratio.follows_size:
        raise ConfigError('--isr-ratio auto follows the size of each image, but a file keeps one '
                          'ratio: give the size of all images with --size H,W, or another '
                          '--isr-ratio')
    if any('Swin' in type(module).__name__ for module in model.modules()):
        # Its padding and rolling by symbols keep torch.export busy for hours (torch 2.13).
        raise ConfigError('the windows of a Swin Transformer cannot be traced for images of any '
                          'size: give one size with --size H,W')
    if (getattr(model, 'test_cfg', None) or {}).get('mode') == 'slide':
        height, width = model.test_cfg.crop_size
        raise ConfigError('the config predicts with a sliding window, which a graph cannot hold: '
                          f'export the network of one window with --size {height},{width}')
