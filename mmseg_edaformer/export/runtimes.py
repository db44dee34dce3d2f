"""The formats: how a file of each is written, quantised and run, on the CPU."""
import ast
import importlib.util
import io
import json
import logging
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.export import ExportedProgram

from ..compat import install_command
from ..errors import ConfigError
from ..files import replacing
from ..isr import ISRRatio, QueryRatio
from ..isr.ratio import NONE
from .graph import RUNTIME, images_of, multipliers

KEY = 'mmseg_edaformer'  # under which a file holds its metadata, as JSON
OPENVINO = '.xml'  # the graph, whose weights lie beside it in a .bin

Run = Callable[..., np.ndarray]
"""A function from images, N x H x W x 3, and ratios by name, to labels or logits."""


@dataclass(frozen=True)
class Format:
    """A format: ``write`` and ``quantise`` put metadata into the file, ``load`` returns them."""
    name: str
    suffix: str
    packages: tuple[str, ...]
    write: Callable[[ExportedProgram, Path, str], None]
    load: Callable[[Path, int], tuple[Run, str]]
    quantise: Callable[[Path, Path, str, list[dict[str, np.ndarray]]], None] | None = None

    def check(self, *more: str) -> None:
        """Raise ConfigError unless its packages, and ``more``, are installed."""
        missing = [name for name in (*self.packages, *more)
                   if importlib.util.find_spec(name) is None]
        if missing:
            raise ConfigError(f'{", ".join(missing)} is missing for the format {self.name}: run '
                              f'{install_command("export")}')


class Exported:
    """A file that `export` wrote, in its runtime on the CPU.

    Its ``metadata`` holds ``classes``, ``isr_ratio``, ``output`` and more.
    """

    def __init__(self, path: str | Path, threads: int | None = None) -> None:
        path = Path(path)
        kind = next((kind for kind in FORMATS.values() if kind.suffix == path.suffix), None)
        if kind is None or not path.is_file():
            raise ConfigError(f'{path} is not a file that ends in '
                              f'{", ".join(kind.suffix for kind in FORMATS.values())}')
        kind.check()
        self._run, text = kind.load(path, threads or torch.get_num_threads())
        if not text:
            raise ConfigError(f'{path} has no metadata: give a file that tools/export.py wrote')
        self.metadata: dict[str, Any] = json.loads(text)

    def __call__(self, images: np.ndarray, isr_ratio: ISRRatio | int | str | None = None,
                 query_ratio: QueryRatio | int | str | None = None) -> np.ndarray:
        """Return labels or logits of images, N x H x W x 3, uint8, RGB.

        ``isr_ratio`` and ``query_ratio``, what the `parse` of `ISRRatio` and `QueryRatio` read, are
        for files that take them as inputs; the default is none.
        """
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not len(images):
            raise ConfigError(f'{images.dtype} of {images.shape} are not images: give N x H x W x '
                              '3, uint8')
        size, (height, width) = self.metadata['size'], self.metadata['minimum']
        if list(images.shape[1:3]) != size if size else (
                images.shape[1] < height or images.shape[2] < width):
            raise ConfigError(f'the images have {images.shape[1]}x{images.shape[2]} pixels, the '
                              f'file is for {height}x{width}{"" if size else " and more"}: resize '
                              'them, or export it with another --size or --isr-ratio')
        return self._run(np.ascontiguousarray(images), **self.multipliers(isr_ratio, query_ratio))

    def multipliers(self, isr_ratio: ISRRatio | int | str | None = None,
                    query_ratio: QueryRatio | int | str | None = None) -> dict[str, np.ndarray]:
        """Return the inputs of the file that set a ratio: a multiplier for each of its stages."""
        ratio = ISRRatio.parse(1 if isr_ratio is None else isr_ratio).with_queries(query_ratio)
        if ratio.follows_size:
            raise ConfigError('a file cannot follow the size of images: give a ratio other than '
                              'auto')
        fewer_queries = query_ratio is not None or str(ratio.queries) != NONE
        inputs = {}
        for name, dial, given in (('isr_ratio', ratio, isr_ratio is not None),
                                  ('query_ratio', ratio.queries, fewer_queries)):
            if name in self.metadata.get('dials', ()):
                inputs[name] = np.array(multipliers(dial, self.metadata['isr_stages']))
            elif given:
                raise ConfigError(f'{name} {dial} cannot be set, because the file keeps ISR '
                                  f'{self.metadata["isr_ratio"]}: export it with '
                                  f'--{name.replace("_", "-")} {RUNTIME}')
        return inputs


@contextmanager
def placing(out: Path) -> Iterator[Path]:
    """`replacing` for a file that may have its weights in another file beside it."""
    with replacing(out) as partial:
        if out.suffix != OPENVINO:
            yield partial
            return
        with replacing(out.with_suffix('.bin')):  # partial's name with that suffix
            yield partial
            # While the weights take their name, no graph stands beside those of another.
            out.unlink(missing_ok=True)


def _write_pt2(program: ExportedProgram, path: Path, metadata: str) -> None:
    content = io.BytesIO()  # torch would abort the process where a disk is full
    torch.export.save(program, content, extra_files={KEY: metadata})
    path.write_bytes(content.getbuffer())


def _load_pt2(path: Path, threads: int) -> tuple[Run, str]:
    files = {KEY: ''}
    # The guards of the trace refuse a batch of one to some models that can predict it.
    module = torch.export.load(path, extra_files=files).module(check_guards=False)

    def run(images: np.ndarray, **ratios: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return module(torch.from_numpy(images), **{
                name: torch.from_numpy(ratio) for name, ratio in ratios.items()}).numpy()
    return run, files[KEY]


def _to_onnx(program: ExportedProgram, metadata: str) -> Any:
    output = json.loads(metadata)['output']
    exported = torch.onnx.export(program, (), output_names=[output], dynamo=True, verbose=False)
    assert exported is not None
    model = exported.model_proto
    symbols = {str(side): name for side, name in zip(
        images_of(program).shape, ('batch', 'height', 'width')) if not isinstance(side, int)}
    del model.graph.value_info[:]  # sizes of what lies between, in those symbols
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(r'\w+', lambda name: symbols.get(name[0], name[0]),
                                       dim.dim_param)
    for node in model.graph.node:
        notes = {note.key: note.value for note in node.metadata_props}
        scopes = ast.literal_eval(notes.get('pkg.torch.onnx.name_scopes', '[]'))
        node.name = '/'.join([*filter(None, scopes[-2:-1]), node.name])
        del node.metadata_props[:]  # with paths of this machine
    _describe(model, metadata)
    return model


def _describe(model: Any, metadata: str) -> None:
    """Put metadata into an ONNX model, with its opset and its operators."""
    import onnx
    operators = sorted({node.op_type for node in model.graph.node})
    onnx.helper.set_model_props(model, {KEY: json.dumps(dict(
        json.loads(metadata), opset=model.opset_import[0].version, operators=operators))})


def _write_onnx(program: ExportedProgram, path: Path, metadata: str) -> None:
    import onnx
    model, data = _to_onnx(program, metadata), json.loads(metadata)
    if not data['size']:
        _refuse_small_images(model.graph, data['minimum'])
    onnx.save_model(model, path)


def _refuse_small_images(graph: Any, minimum: list[int]) -> None:
    """Make the graph fail on images below the minimum, whose labels would be wrong.

    ONNX cannot declare a smallest input. So the graph reshapes the images to their own size, or to
    the minimum where that is larger, which fails.
    """
    import onnx
    name = f'images_of_{minimum[0]}x{minimum[1]}_or_more'
    for node in graph.node:
        node.input[:] = [name if source == 'images' else source for source in node.input]
    graph.initializer.append(onnx.numpy_helper.from_array(
        np.array([1, *minimum, 3]), 'smallest_size'))
    for index, (kind, inputs, output) in enumerate((
            ('Shape', ['images'], 'image_size'),
            ('Max', ['image_size', 'smallest_size'], 'wanted_size'),
            ('Reshape', ['images', 'wanted_size'], name))):
        graph.node.insert(index, onnx.helper.make_node(kind, inputs, [output], name=output))
    graph.value_info.append(graph.input[0])
    graph.value_info[-1].name = name


def _load_onnx(path: Path, threads: int) -> tuple[Run, str]:
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Threads that wait in a loop would slow the runtimes that take turns with this one.
    options.add_session_config_entry('session.intra_op.allow_spinning', '0')
    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    return (lambda images, **ratios: session.run(None, {'images': images, **ratios})[0],
            session.get_modelmeta().custom_metadata_map.get(KEY, ''))


def _quantise_onnx(source: Path, target: Path, metadata: str,
                   inputs: list[dict[str, np.ndarray]]) -> None:
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        remaining = iter(inputs)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.remaining, None)

    folded = source.with_name('folded.onnx')  # computed weights become plain ones
    quant_pre_process(source, folded, skip_symbolic_shape=True)
    quantize_static(folded, target, Reader(), per_channel=True, weight_type=QuantType.QInt8,
                    activation_type=QuantType.QUInt8, op_types_to_quantize=['Conv', 'MatMul'],
                    reduce_range=True)  # 7 bits: sums of 8 saturate on CPUs without VNNI
    model = onnx.load(target)
    _describe(model, metadata)
    onnx.save_model(model, target)


def _openvino() -> Any:
    # OpenVINO and NNCF would send events to Google Analytics; without this package they do not.
    sys.modules.setdefault('openvino_telemetry', None)  # type: ignore[arg-type]
    import openvino
    return openvino


def _write_openvino(program: ExportedProgram, path: Path, metadata: str) -> None:
    openvino = _openvino()
    import onnx
    with tempfile.TemporaryDirectory() as folder:
        # As exact and as fast as from the program itself, and it keeps the names.
        onnx.save_model(_to_onnx(program, metadata), Path(folder) / 'model.onnx')
        model = openvino.convert_model(Path(folder) / 'model.onnx')
    data = json.loads(metadata)
    shapes = {}
    if not data['size']:  # OpenVINO then refuses smaller images
        shapes['images'] = [-1, *(openvino.Dimension(side, -1) for side in data['minimum']), 3]
    # Of a fixed length, a ratio that nobody has set would be whatever is in memory. Of an open one
    # it has no length, and neither has the output.
    length = len(data['isr_stages'])
    shapes |= {name: [openvino.Dimension(length, length + 1)] for name in data['dials']}
    model.reshape(shapes)
    _save_openvino(model, path, metadata)


def _save_openvino(model: Any, path: Path, metadata: str) -> None:
    openvino = _openvino()
    data = json.loads(metadata)
    if data.get('dials'):
        # OpenVINO 2026.4 keeps code for one key if the first image leaves an attention only one,
        # and then computes all that follow wrongly.
        data['openvino_config'] = dict(SNIPPETS_MODE='DISABLE')
    model.set_rt_info(json.dumps(data), KEY)
    try:
        openvino.save_model(model, path, compress_to_fp16=False)
    except RuntimeError as error:  # which does not say why
        raise ConfigError(f'OpenVINO cannot write to {path.parent} ({error}): free some space, or '
                          'write elsewhere') from error


def _load_openvino(path: Path, threads: int) -> tuple[Run, str]:
    openvino = _openvino()
    core = openvino.Core()
    model = core.read_model(path)
    metadata = model.get_rt_info(KEY).astype(str) if model.has_rt_info(KEY) else ''
    # Some processors would compute in bfloat16 by default.
    compiled = core.compile_model(model, 'CPU', {
        'INFERENCE_NUM_THREADS': threads, 'INFERENCE_PRECISION_HINT': 'f32',
        'PERFORMANCE_HINT': 'LATENCY', **json.loads(metadata or '{}').get('openvino_config', {})})
    return (lambda images, **ratios: compiled({'images': images, **ratios})[0].copy()), metadata


def _quantise_openvino(source: Path, target: Path, metadata: str,
                       inputs: list[dict[str, np.ndarray]]) -> None:
    openvino = _openvino()
    import nncf
    nncf.set_log_level(logging.ERROR)
    model = nncf.quantize(openvino.Core().read_model(source), nncf.Dataset(inputs),
                          preset=nncf.QuantizationPreset.MIXED,
                          model_type=nncf.ModelType.TRANSFORMER,
                          advanced_parameters=nncf.AdvancedQuantizationParameters(
                              overflow_fix=nncf.OverflowFix.ENABLE))  # as for ONNX
    _save_openvino(model, target, metadata)


FORMATS = {kind.name: kind for kind in (
    Format('onnx', '.onnx', ('onnx', 'onnxscript', 'onnxruntime'), _write_onnx, _load_onnx,
           _quantise_onnx),
    Format('openvino', OPENVINO, ('onnx', 'onnxscript', 'openvino'), _write_openvino,
           _load_openvino, _quantise_openvino),
    Format('pt2', '.pt2', (), _write_pt2, _load_pt2))}
"""The formats by name."""
