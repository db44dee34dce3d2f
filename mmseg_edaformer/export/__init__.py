"""A trained segmentor as one file for another runtime: ONNX, OpenVINO or torch.export, checked."""
import json
import statistics
import tempfile
from functools import partial as bind
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version

from ..analysis.bench import mean_iou
from ..analysis.timing import take_turns
from ..errors import ConfigError
from ..files import write_file
from ..isr import ISRRatio
from ..predict.inputs import find_images
from ..predict.outputs import writing
from ..predict.segmenter import Segmenter
from .graph import Deployed, describe, quiet, trace
from .parity import Agreement, Pictures, Report, Row, check, fit, read_images, reference
from .runtimes import FORMATS, Exported, Run, placing

__all__ = ['FORMATS', 'Exported', 'Report', 'export']

_CALIBRATED = 128


def export(model: str | Path, out: str | Path, *, format: str, checkpoint: str | Path | None = None,
           isr: ISRRatio | int | str = 'none', size: tuple[int, int] | None = None,
           labels: bool = False, int8: bool = False, calibrate: str | Path | None = None,
           images: str | Path | None = None, samples: int = 40,
           threads: int | None = None) -> Report:
    """Write a model for another runtime, once the file gives what PyTorch gives.

    It is written under another name, loaded again, compared, and takes its name last.

    Args:
        model: As of `Segmenter`.
        out: The file; its suffix is that of the format.
        format: One of `FORMATS`.
        checkpoint: As of `Segmenter`.
        isr: The ratio, which the file keeps.
        size: Height and width of all images; by default any.
        labels: Resize and take the largest class inside the graph.
        int8: Quantise, with the activations that the images of ``calibrate`` give.
        calibrate: A folder of such images, or a pattern: like those that it will see.
        images: What to compare on, also such; by default the config's test images, or else drawn
            ones.
        samples: Labelled test images at most, on which the mIoU is measured of float and of int8.
        threads: Of all runtimes; by default as many as PyTorch has.

    Raises:
        UserError: A package is missing, the arguments do not fit each other or the model, or the
            file is too far from PyTorch; nothing is written then.
    """
    out = Path(out)
    _check_arguments(out, format, int8, calibrate, size, samples, threads)
    segmenter = Segmenter(model, checkpoint, device='cpu', isr_ratio=isr)
    if size is None:
        _check_open_size(segmenter)
    deployed = Deployed(segmenter.model, labels)
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        return _export(segmenter, deployed, out, format, size, int8, calibrate,
                       Pictures(segmenter, Path(model), images, samples))
    finally:
        torch.set_num_threads(before)


def _export(segmenter: Segmenter, deployed: Deployed, out: Path, kind: str,
            size: tuple[int, int] | None, int8: bool, calibrate: str | Path | None,
            pictures: Pictures) -> Report:
    program, minimum = trace(deployed, size)
    told = describe(segmenter, deployed, size, minimum)
    inputs = pictures.inputs(size, minimum)
    calls: dict[str, Run] = {'PyTorch': lambda batch: reference(deployed, batch)}
    agreements: dict[str, Agreement] = {}
    with tempfile.TemporaryDirectory() as folder, placing(out) as place:
        plain = Path(folder) / out.name if int8 else place
        with quiet():
            FORMATS[kind].write(program, plain, json.dumps(told))
        name = f'{kind} float32' if int8 else kind
        calls[name], agreements[name] = check(plain, out, deployed, inputs, False)
        if int8:
            told['int8'], name = True, f'{kind} int8'
            quantise = FORMATS[kind].quantise
            assert calibrate is not None
            assert quantise is not None
            with quiet():
                quantise(plain, place, json.dumps(told), [
                    fit(image, size, minimum)[None] for image in read_images(
                        segmenter, calibrate, _CALIBRATED)])
            calls[name], agreements[name] = check(place, out, deployed, inputs, True)
        times = take_turns({name: bind(bind, call, inputs[0]) for name, call in
                            calls.items()}, torch.device('cpu'), repeats=30, seconds=20)
        quartiles = {name: statistics.quantiles([own / base for own, base in zip(
            times[name], times['PyTorch'])]) for name in calls}
        areas = pictures.areas(calls, size, minimum) if int8 else {}
        rows = tuple(Row(name, agreements.get(name), 1e3 * statistics.median(times[name]),
                         quartiles[name][1], (quartiles[name][0], quartiles[name][2]),
                         float(mean_iou(areas[name].sum(0))) if areas else None)
                     for name in calls)
        del calls
    return Report(out, told, rows, inputs[0].shape[1:3], len(areas['PyTorch']) if areas else 0,
                  torch.get_num_threads(), tuple(pictures.notes))


def _check_arguments(out: Path, kind: str, int8: bool, calibrate: str | Path | None,
                     size: tuple[int, int] | None, samples: int, threads: int | None) -> None:
    """See what can be seen before a model is loaded."""
    if kind not in FORMATS:
        raise ConfigError(f"format '{kind}' does not exist: use {', '.join(FORMATS)}")
    if out.suffix != FORMATS[kind].suffix:
        raise ConfigError(f'--out {out}: a file of the format {kind} ends in '
                          f'{FORMATS[kind].suffix}')
    if int8 and FORMATS[kind].quantise is None:
        raise ConfigError('--int8 is for onnx and openvino, whose runtimes compute in it')
    if int8 != (calibrate is not None):
        raise ConfigError('--int8 needs --calibrate FOLDER, with images like those that it will '
                          'see' if int8 else '--calibrate is for --int8: give both or none')
    for name, value in (('samples', samples), ('threads', threads)):
        if value is not None and value < 1:
            raise ConfigError(f'--{name} {value}: give 1 or more')
    if size is not None and min(size) < 32:
        raise ConfigError(f'--size {size[0]},{size[1]}: give height and width in pixels from 32 up')
    if Version(torch.__version__) < Version('2.9'):
        raise ConfigError(f'the export needs torch 2.9 or newer, this is {torch.__version__}')
    FORMATS[kind].check(*(['nncf'] if int8 and kind == 'openvino' else ()))
    if calibrate is not None:
        find_images(calibrate)
    with writing(out):
        write_file(out.with_name(f'.{out.name}.writable'), '')
        out.with_name(f'.{out.name}.writable').unlink()


def _check_open_size(segmenter: Segmenter) -> None:
    """See that the model predicts images of any size as one, with what a graph can tell."""
    model: Any = segmenter.model
    if segmenter.isr_ratio.auto:
        raise ConfigError('ISR auto follows the size of each image, a file keeps one ratio: give '
                          'the size that all have with --size H,W, or another --isr-ratio')
    if (getattr(model, 'test_cfg', None) or {}).get('mode') == 'slide':
        height, width = model.test_cfg.crop_size
        raise ConfigError('the config predicts with a sliding window, which no graph holds: export '
                          f'the network of one window with --size {height},{width}')
