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
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ..errors import ConfigError, RatioError, first_line
from ..files import write_file
from ..isr import ISRRatio
from ..predict.comparison import MAX_SIDE
from ..predict.page import draw_examples
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


def write_page(graph: Path, out: Path, runtime: Path | None = None) -> str:
    """Write the page of a model, as a whole or not at all.

    Args:
        graph: An ONNX file of open size whose ratio is an input, and which gives logits.
        out: The folder. It is replaced if it holds such a page, and refused if it holds other files.
        runtime: The unpacked package `RUNTIME`; by default npm gets it.

    Returns:
        What was written, and how near it is to the file.

    Raises:
        ConfigError: The model, the folder or npm cannot be used.
    """
    import onnx
    model = onnx.load(graph)
    metadata = json.loads({each.key: each.value for each in model.metadata_props}[KEY])
    if len(metadata['classes']) > 256:
        raise ConfigError(f'the model has {len(metadata["classes"])} classes, and the page can show '
                          '256: export another model')
    with _replacing_folder(out) as folder:
        shutil.copytree(_HERE / 'web', folder, dirs_exist_ok=True,
                        ignore=shutil.ignore_patterns('tsconfig.json'))
        shutil.copy(_HERE.with_name('predict') / 'page.css', folder)
        _copy_runtime(runtime or _get_runtime(), folder / 'ort')
        (folder / 'examples').mkdir()
        examples = draw_examples(folder / 'examples', suffix='.jpg')
        onnx.save_model(halve_weights(model), folder / 'model.onnx')
        equal = _compare(graph, folder / 'model.onnx', metadata, examples)
        if not equal >= LEAST_EQUAL[False]:
            raise ConfigError(f'{out} is not written: with weights of 16 bits, {100 * equal:.2f} % of '
                              f'the labels stay, and at least {100 * LEAST_EQUAL[False]:g} % are '
                              'required: use --format onnx')
        write_file(folder / 'model.json', json.dumps(describe_page(metadata, folder, examples)))
        size = sum(path.stat().st_size for path in folder.rglob('*') if path.is_file())
        weights = (folder / 'model.onnx').stat().st_size
    return (f'{out} ({size / 1e6:.1f} MB, model.onnx {weights / 1e6:.1f} MB): weights of 16 bits give '
            f'{100 * equal:.4f} % of the labels of 32 bits. To see the page:\n'
            f'python -m http.server --directory {out}')


def describe_page(metadata: dict[str, Any], folder: Path, examples: Sequence[str]
                  ) -> dict[str, Any]:
    """Return what the page needs to know of its model, as plain data."""
    stages = metadata['isr_stages']
    resize = {'scale': None, 'multiple': 1}
    for step in metadata['pipeline']:
        if 'Multiple' in step['type']:
            resize['multiple'] = step['size_divisor']
        elif 'Resize' in step['type'] and step.get('keep_ratio'):
            resize['scale'] = step['scale']
        elif step['type'] not in ('LoadSegLabels', 'LoadAnnotations'):
            raise ConfigError(f'the page cannot do what {step["type"]} of the test pipeline does to '
                              'images: export a model without it')
    return dict(
        checkpoint=metadata['checkpoint'], classes=metadata['classes'],
        palette=metadata['palette'], minimum=metadata['minimum'], stages=stages,
        encoder=sum(name.startswith('encoder') for name in stages), dial=list(_dial(stages)),
        resize=resize, side=MAX_SIDE, examples=[f'examples/{Path(path).name}' for path in examples],
        files={kind: {name: (folder / name).stat().st_size for name in (
            f'ort/{names[0]}', 'model.onnx')} for kind, names in _FILES.items()})


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


def _compare(one: Path, other: Path, metadata: dict[str, Any], examples: Sequence[str]) -> float:
    """Return the share of equal labels of two files on the examples."""
    import onnxruntime
    equal = []
    ratios = [np.array(position['ratio']) for position in _dial(metadata['isr_stages'])][:3]
    sessions = [onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
                for path in (one, other)]
    for path in examples:
        image = np.ascontiguousarray(cv2.imread(path)[None, ..., ::-1])
        for ratio in ratios:
            labels = [session.run(['logits'], dict(images=image, isr_ratio=ratio))[0].argmax(1)
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


@contextmanager
def _replacing_folder(out: Path) -> Iterator[Path]:
    """Give a folder to write to that takes the place of ``out`` when the block ends well."""
    if out.exists() and not (out / 'model.json').is_file() and (
            not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f'--out {out} holds other files: give a new folder for the page')
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f'.{out.name}.', dir=out.parent) as place:
        (Path(place) / 'new').mkdir()
        yield Path(place) / 'new'
        if out.exists():
            out.replace(Path(place) / 'old')
        (Path(place) / 'new').replace(out)
