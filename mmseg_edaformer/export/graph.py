"""The graph of a segmentor, as it goes into a file.

Shapes: N images of H x W pixels, C classes. The graph takes ``images``, N x H x W x 3, uint8, RGB;
it subtracts the mean and divides by the deviation itself. It gives ``labels``, N x H x W, uint8
(int16 for more than 256 classes), or ``logits``, N x C x h x w, float32, at the head's resolution.
"""
import copy
import hashlib
import json
import logging
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.config import ConfigDict
from mmseg.models import SegDataPreProcessor
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import __version__
from ..compat import swaps_channels
from ..errors import ConfigError, UserError
from ..isr.apply import find_located, isr
from ..isr.pooling import OpenRatio
from ..isr.ratio import LARGEST, NONE, ISRRatio, StageRatio
from ..models.segmentor import StreamedEncoderDecoder
from ..predict.foreign import Foreign, Preprocess
from ..predict.segmenter import Segmenter

RUNTIME = 'runtime'
"""The value of a ratio that becomes an input of the graph."""

DIALS = 'isr_ratio', 'query_ratio'
"""Ratios that can be inputs, int64, with a multiplier for each stage."""

_TRACED = (613, 741)  # several cells of every sensible pool; free, for nothing is computed


class Adapted(nn.Module):
    """A model of another library whose normalisation, too, can be part of a graph.

    Its interface is what the export needs of `StreamedEncoderDecoder`.

    Args:
        foreign: The model, which is copied.
        step: Its preprocessing, as a step of a pipeline.
        fused: Whether attention stays fused. torch.onnx cannot decompose that with a bias (torch
            2.13); a ratio that is an input cannot do without.

    Raises:
        ConfigError: The model predicts masks, or the processor does more than normalise.
    """
    streamable, align_corners = True, False

    def __init__(self, foreign: Foreign, step: dict[str, Any], fused: bool = False) -> None:
        super().__init__()
        if foreign.post_process is not None:
            raise ConfigError(f'a {type(foreign.network).__name__} cannot be exported, because its '
                              'labels are not the largest of logits per class: export another '
                              'model')
        processor = step['processor']
        foreign = copy.deepcopy(foreign)
        network: Any = foreign.network
        if not fused and hasattr(network, 'set_attn_implementation'):
            network.set_attn_implementation('eager')
        mean, std, is_bgr = Preprocess(**{key: step[key] for key in step if key != 'type'}
                                       ).normalisation()
        self.preprocessing = [json.loads(processor.to_json_string())] if (
            hasattr(processor, 'to_json_string')) else []
        self.foreign, self.note, self.test_cfg = foreign, foreign.note, ConfigDict(mode='whole')
        self.data_preprocessor = SegDataPreProcessor(
            mean=mean, std=std, bgr_to_rgb=not is_bgr,
            test_cfg=dict(size_divisor=foreign.divisor) if foreign.divisor > 1 else None)
        self.predict_labels = foreign.predict_labels

    def _forward(self, inputs: Tensor) -> Tensor:
        return self.foreign(inputs)


class Deployed(nn.Module):
    """A segmentor in plain operators, to labels at the size of the images or the head's logits."""

    def __init__(self, model: nn.Module, labels: bool, dials: Sequence[str] = ()) -> None:
        super().__init__()
        if not isinstance(model, (StreamedEncoderDecoder, Adapted)) or not model.streamable:
            head = type(getattr(model, 'decode_head', model)).__name__
            raise ConfigError(f'{type(model).__name__} with {head} cannot be exported, because its '
                              'labels are not the largest of logits per class: export another '
                              'model')
        padding: dict[str, Any] = dict(model.data_preprocessor.test_cfg or {})
        if padding.get('size') or (padding.get('size_divisor') and not labels):
            raise ConfigError('the images are padded' + (
                ' to data_preprocessor.test_cfg.size: replace it by size_divisor, which can be '
                'exported' if padding.get('size') else
                f' to a multiple of {padding["size_divisor"]}: export labels, which are cropped '
                'again, with --labels'))
        self.model = model.eval()
        self.labels = labels
        self.divisor: int = padding.get('size_divisor') or 1
        self.dials = tuple(dials)
        if dials:  # fail early where there is nothing to reduce
            with isr(model, 2, query_ratio=2 if 'query_ratio' in dials else None):
                pass
        self.stages = {f'{part.kind} {number}': layers for part in find_located(model).parts
                       for number, layers in part.stages.items()} if dials else {}

    def forward(self, images: Tensor, isr_ratio: Tensor | None = None,
                query_ratio: Tensor | None = None) -> Tensor:
        """Return labels or logits of images, N x H x W x 3, uint8, RGB.

        The ratios that are inputs, ``dials``, hold a multiplier for each of ``stages``. One below 1
        counts as 1.
        """
        settings = [(layer, layer.setting) for layers in self.stages.values() for layer in layers]
        try:
            for name, ratios in zip(DIALS, (isr_ratio, query_ratio)):
                if ratios is not None:
                    self._open(name, ratios)
            return self._predict(images)
        finally:
            for layer, setting in settings:
                layer.setting = setting

    def _open(self, name: str, ratios: Tensor) -> None:
        # A view, because a .pt2 does not check the length itself.
        values = ratios.view(len(self.stages)).clamp(1, LARGEST).unbind()
        for layers, value in zip(self.stages.values(), values):
            change: dict[str, Any] = {name: OpenRatio(value)}  # shared by the layers of a stage
            for layer in layers:
                layer.setting = replace(layer.setting, **change)

    def _predict(self, images: Tensor) -> Tensor:
        if not self.labels:
            return self.logits(images)
        logits = self.full_logits(images)
        return logits.argmax(1).to(torch.uint8 if logits.shape[1] <= 256 else torch.int16)

    def logits(self, images: Tensor) -> Tensor:
        """Return the head's logits, of the padded images if the model pads them."""
        preprocessor: Any = self.model.data_preprocessor
        x = images.permute(0, 3, 1, 2)
        if not swaps_channels(preprocessor):  # the model was trained on BGR
            x = x.flip(1)
        x = x.float()
        if preprocessor._enable_normalize:
            x = (x - preprocessor.mean) / preprocessor.std
        if self.divisor > 1:
            x = F.pad(x, (0, -x.shape[3] % self.divisor, 0, -x.shape[2] % self.divisor),
                      value=preprocessor.pad_val)
        return self.model._forward(x).float()

    def full_logits(self, images: Tensor) -> Tensor:
        """Return logits at the size of the images."""
        height, width = images.shape[1], images.shape[2]
        size = (height + -height % self.divisor, width + -width % self.divisor)
        logits = F.interpolate(self.logits(images), size, None, 'bilinear',
                               self.model.align_corners)
        return logits[..., :height, :width]


def trace(deployed: Deployed, size: tuple[int, int] | None
          ) -> tuple[ExportedProgram, tuple[int, int]]:
    """Trace a model for any number of images, of one size or of any.

    Returns:
        The graph, and the smallest height and width: below these, pools of keys would shrink to
        their map, which a graph cannot express.
    """
    example = torch.zeros(2, *(size or _TRACED), 3, dtype=torch.uint8)
    free = Dim.DYNAMIC
    dynamic: dict[str, Any] = {'images': {0: free} if size else {0: free, 1: free, 2: free}}
    # A tensor each: one in two places would become one input.
    dials = {name: torch.full((len(deployed.stages),), 2) for name in deployed.dials}
    try:
        with torch.no_grad(), quiet():
            program = torch.export.export(
                deployed, (example,), dials, dynamic_shapes=dynamic | dict.fromkeys(dials))
    except UserError:
        raise
    except Exception as error:  # whatever a model's own code may raise
        reason = f'{type(error).__name__}: {(str(error).strip() or "-").splitlines()[0][:200]}'
        raise ConfigError(
            f'the model cannot be traced with a ratio that is an input ({reason}): give one ratio '
            f'in place of {RUNTIME}' if dials else
            f'the model cannot be traced for images of any size ({reason}): give one size with '
            '--size H,W' if size is None else
            f'torch.export cannot trace this model ({reason}): export another model, or try '
            'another --isr-ratio') from error
    shape = images_of(program).shape
    if size is not None:
        return program, size
    sides: tuple[Any, ...] = tuple(shape[1:3])
    symbols = [side.node.expr for side in sides]
    ranges = program.range_constraints
    highest = max((ranges[side] for side in symbols), key=lambda bounds: int(bounds.lower))
    ranges.update(dict.fromkeys(symbols, highest))  # a .pt2 checks them itself
    return program, (int(highest.lower), int(highest.lower))


def describe(segmenter: Segmenter, deployed: Deployed, size: tuple[int, int] | None,
             minimum: tuple[int, int]) -> dict[str, Any]:
    """Return the metadata of a file, as plain data."""
    preprocessor: Any = segmenter.model.data_preprocessor
    normalised = preprocessor._enable_normalize
    weights = Path(segmenter.source)
    return dict(
        version=__version__, torch=torch.__version__, checkpoint=weights.name,
        sha256=hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else None,
        isr_ratio=with_inputs(segmenter.isr_ratio, deployed.dials), dials=deployed.dials,
        isr_stages=list(deployed.stages),
        input='images: N x H x W x 3, uint8, RGB, 0 to 255; mean and std are inside',
        output='labels' if deployed.labels else 'logits',
        align_corners=bool(deployed.model.align_corners),
        classes=segmenter.classes, palette=segmenter.description.palette,
        mean=preprocessor.mean.flatten().tolist() if normalised else None,
        std=preprocessor.std.flatten().tolist() if normalised else None,
        size=size, minimum=minimum, int8=False,
        note=segmenter.note, pipeline=segmenter.model.preprocessing if isinstance(
            segmenter.model, Adapted) else [
            {name: value for name, value in step.items() if not callable(value)}
            for step in segmenter.description.pipeline[1:-1]])


def with_inputs(ratio: ISRRatio, dials: Sequence[str]) -> str:
    """Return the ratio of a file as text: runtime where it is an input, as in runtime+q2."""
    keys = RUNTIME if 'isr_ratio' in dials else str(ratio.with_queries(1))
    queries = RUNTIME if 'query_ratio' in dials else str(ratio.queries)
    return keys if queries == NONE else f'{keys}+q{queries}'


def multipliers(ratio: StageRatio, stages: Iterable[str]) -> list[int]:
    """Return a multiplier for each of the stages, like encoder 1; RatioError if it cannot fit."""
    kinds = [stage.partition(' ')[0] for stage in stages]
    return [value for kind in dict.fromkeys(kinds)
            for value in ratio.for_stages(kind, kinds.count(kind))]


def images_of(program: ExportedProgram) -> Tensor:
    """Return the input of a graph, whose sizes may be symbols."""
    return next(node.meta['val'] for node in program.graph.nodes
                if node.op == 'placeholder' and node.name == 'images')


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the logs and warnings of the exporters, and keep attention free of guards.

    The faster backends of ``scaled_dot_product_attention`` ask how many keys there are, which is
    open while a ratio is an input. The graph holds the function whatever the backend.
    """
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
            warnings.simplefilter('ignore')
            yield
    finally:
        logging.disable(level)
