"""A folder of static files: a page that runs a model in the browser, with its ratio on a slider."""
import base64
import hashlib
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ..errors import ConfigError, RatioError, first_line
from ..files import write_file
from ..isr import ISRRatio
from ..predict.comparison import MAX_SIDE
from ..predict.outputs import writing
from ..predict.page import draw_examples
from . import export
from .parity import LEAST_EQUAL
from .runtimes import KEY

RUNTIME, INTEGRITY = 'onnxruntime-web@1.30.0', (
    'q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ==')
"""The package of npm, and the SHA-512 of its archive."""
_FILES = {'cpu': ('ort-wasm-simd-threaded.wasm', 'ort-wasm-simd-threaded.mjs', 'ort.wasm.min.mjs'),
          'gpu': ('ort-wasm-simd-threaded.jspi.wasm', 'ort-wasm-simd-threaded.jspi.mjs',
                  'ort.jspi.min.mjs')}
_DIAL = {'as trained': 'none', 'optimal': 'optimal', 'all 2': 2, 'all 3': 3, 'all 4': 4, 'all 6': 6,
         'all 8': 8}
_HERE = Path(__file__).parent


def export_page(model: str | Path, out: str | Path, *, checkpoint: str | Path | None = None,
                images: str | Path | None = None, threads: int | None = None,
                runtime: str | Path | None = None) -> str:
    """Export a model to ONNX with its ratio as an input, and write a page that runs it.

    Args:
        model, checkpoint, images, threads: See `export`.
        out: The folder. It is replaced if it holds such a page, and refused if it holds other files.
        runtime: The unpacked package `RUNTIME`; by default npm gets it.

    Returns:
        What was written and measured.

    Raises:
        UserError: See `export`; or the folder or npm cannot be used. Nothing is written then.
    """
    out = Path(out)
    _check_folder(out)
    package = _get_runtime() if runtime is None else Path(runtime)
    with tempfile.TemporaryDirectory() as place:
        graph = Path(place, 'model.onnx')
        report = export(model, graph, format='onnx', checkpoint=checkpoint, isr_ratio='runtime',
                        images=images, threads=threads)
        text = write_page(graph, out, package)
    return f'{replace(report, path=out / "model.onnx")}\n{text}'


def write_page(graph: Path, out: Path, package: Path) -> str:
    """Write the page of an ONNX file whose ratio is an input, as `export_page` does."""
    import onnx
    model = onnx.load(graph)
    metadata = json.loads({each.key: each.value for each in model.metadata_props}[KEY])
    if len(metadata['classes']) > 256:
        raise ConfigError(f'the model has {len(metadata["classes"])} classes, and the page can show '
                          '256: export another model')
    stages, resize = metadata['isr_stages'], _find_resize(metadata['pipeline'])
    dial = list(_dial(stages))
    with _replacing_folder(out) as folder:
        shutil.copytree(_HERE / 'web', folder, dirs_exist_ok=True,
                        ignore=shutil.ignore_patterns('tsconfig.json'))
        shutil.copy(_HERE.with_name('predict') / 'page.css', folder)
        _copy_runtime(package, folder / 'ort')
        (folder / 'examples').mkdir()
        examples = draw_examples(folder / 'examples', suffix='.jpg')
        onnx.save_model(halve_weights(model), folder / 'model.onnx')
        equal = _compare(graph, folder / 'model.onnx', [position['ratio'] for position in dial[:3]], examples)
        if not equal >= LEAST_EQUAL[False]:
            raise ConfigError(f'{out} is not written: with weights of 16 bits, {100 * equal:.2f} % of '
                              f'the labels stay, and at least {100 * LEAST_EQUAL[False]:g} % are '
                              'required: use --format onnx')
        write_file(folder / 'model.json', json.dumps(dict(
            checkpoint=metadata['checkpoint'], classes=metadata['classes'],
            palette=metadata['palette'], minimum=metadata['minimum'], stages=stages,
            encoder=sum(name.startswith('encoder') for name in stages), dial=dial,
            resize=resize, side=MAX_SIDE,
            examples=[f'examples/{Path(path).name}' for path in examples],
            files={kind: {name: (folder / name).stat().st_size for name in (
                f'ort/{names[0]}', 'model.onnx')} for kind, names in _FILES.items()})))
        size = sum(path.stat().st_size for path in folder.rglob('*') if path.is_file())
    return (f'With weights of 16 bits, {100 * equal:.4f} % of the labels stay. To see the page, '
            f'{size / 1e6:.1f} MB:\npython -m http.server --directory {out}')


def _find_resize(pipeline: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what a test pipeline does to the size of images, as networkSize in pixels.js takes it."""
    resize = {'scale': None, 'multiple': 1}
    for step in pipeline:
        if 'Multiple' in step['type']:
            resize['multiple'] = step['size_divisor']
        elif 'Resize' in step['type'] and step.get('keep_ratio'):
            resize['scale'] = step['scale']
        elif step['type'] not in ('LoadSegLabels', 'LoadAnnotations'):
            raise ConfigError(f'the page cannot do what {step["type"]} of the test pipeline does to '
                              'images: export a model without it')
    return resize


def _dial(stages: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the positions of the slider: names, and a multiplier for each stage."""
    counts = {part: sum(name.startswith(part) for name in stages) for part in ('encoder', 'decoder')}
    for name, text in _DIAL.items():
        ratio = ISRRatio.parse(text)
        try:
            yield dict(name=name, ratio=[value for part, count in counts.items() if count
                                         for value in ratio.for_stages(part, count)])
        except RatioError:  # optimal is for EDAFormer's stages
            continue


def halve_weights(model: Any) -> Any:
    """Store large weights in float16, with casts in front; the arithmetic stays in float32.

    Runtimes compute the casts once, when they load the file. Notes of the exporter are removed.
    """
    import onnx
    graph, casts = model.graph, []
    for node in graph.node:
        del node.metadata_props[:]
        node.ClearField('doc_string')
    del graph.value_info[:], graph.metadata_props[:]
    for weight in graph.initializer:
        del weight.metadata_props[:]
        if weight.data_type != onnx.TensorProto.FLOAT or np.prod(weight.dims) < 1024:
            continue
        values, name = onnx.numpy_helper.to_array(weight), weight.name
        if np.abs(values).max() < np.finfo(np.float16).max:
            weight.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float16), f'{name}_16'))
            casts.append(onnx.helper.make_node('Cast', [f'{name}_16'], [name], name=f'{name}_32',
                                               to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    return model


def _compare(one: Path, other: Path, ratios: Sequence[Sequence[int]], examples: Sequence[str]
             ) -> float:
    """Return the share of equal labels of two files on the examples."""
    import onnxruntime
    equal = []
    sessions = [onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
                for path in (one, other)]
    for path in examples:
        image = np.ascontiguousarray(cv2.imread(path)[None, ..., ::-1])
        for ratio in ratios:
            labels = [session.run(['logits'], dict(images=image, isr_ratio=np.array(ratio)))[0].argmax(1)
                      for session in sessions]
            equal.append((labels[0] == labels[1]).mean())
    return float(np.mean(equal))


def _get_runtime() -> Path:
    """Return the unpacked package of npm, from a cache or from its registry."""
    cache = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache', 'mmseg_edaformer')
    folder = cache / RUNTIME
    if folder.is_dir():
        return folder / 'package'
    if shutil.which('npm') is None:
        raise ConfigError(f'the page needs {RUNTIME}, which npm gets, and npm is not installed: '
                          'install Node.js, or give the unpacked package with --runtime FOLDER')
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as place:
        done = subprocess.run(['npm', 'pack', '--silent', RUNTIME], cwd=place, text=True,
                              capture_output=True, stdin=subprocess.DEVNULL, check=False)
        archives = [*Path(place).glob('*.tgz')]
        if done.returncode or not archives:
            raise ConfigError(f'npm cannot get {RUNTIME}: {done.stderr.strip()[:300]}. Try again with '
                              'a network, or give the unpacked package with --runtime FOLDER')
        digest = base64.b64encode(hashlib.sha512(archives[0].read_bytes()).digest()).decode()
        if digest != INTEGRITY:
            raise ConfigError(f'npm sent another archive for {RUNTIME} than is known here (SHA-512 '
                              f'{digest}): do not use it, and ask the registry in use')
        with tarfile.open(archives[0]) as archive:
            archive.extractall(Path(place, 'unpacked'), filter='data')
        Path(place, 'unpacked').replace(folder)
    return folder / 'package'


def _copy_runtime(package: Path, target: Path) -> None:
    """Copy what the page needs of the package, and the licences, which its own archive lacks."""
    import onnxruntime
    try:
        found = json.loads((package / 'package.json').read_text(encoding='utf-8'))
        if f'{found["name"]}@{found["version"]}' != RUNTIME:
            raise ConfigError(f'{package} is {found["name"]}@{found["version"]}: the page needs '
                              f'{RUNTIME}')
        target.mkdir()
        for name in (name for names in _FILES.values() for name in names):
            shutil.copy(package / 'dist' / name, target)
    except (OSError, KeyError, json.JSONDecodeError) as error:
        raise ConfigError(f'{package} is not the unpacked package {RUNTIME} ({first_line(error)}): '
                          'unpack what `npm pack` writes') from error
    for name in 'LICENSE', 'ThirdPartyNotices.txt':
        shutil.copy(Path(onnxruntime.__file__).with_name(name), target)


def _check_folder(out: Path) -> None:
    if out.exists() and not (out / 'model.json').is_file() and (
            not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f'--out {out} is not the folder of a page: give a new one')


@contextmanager
def _replacing_folder(out: Path) -> Iterator[Path]:
    """Give a folder to write to that takes the place of ``out`` when the block ends well."""
    _check_folder(out)
    with writing(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
    with writing(out), tempfile.TemporaryDirectory(prefix=f'.{out.name}.', dir=out.parent) as place:
        (Path(place) / 'new').mkdir()
        yield Path(place) / 'new'
        if out.exists():
            out.replace(Path(place) / 'old')
        (Path(place) / 'new').replace(out)
