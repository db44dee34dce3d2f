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

import numpy as np
from PIL import Image

from ..errors import ConfigError, RatioError, first_line
from ..files import write_file
from ..isr import ISRRatio
from ..predict.comparison import MAX_SIDE
from ..predict.outputs import writing
from ..predict.page import draw_examples
from . import export
from .graph import RUNTIME
from .runtimes import KEY

PACKAGE, SHA512 = 'onnxruntime-web@1.30.0', (
    'q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ==')
"""The package of npm, and the hash of its archive."""
_FILES = {'cpu': ('ort-wasm-simd-threaded.wasm', 'ort-wasm-simd-threaded.mjs', 'ort.wasm.min.mjs'),
          'gpu': ('ort-wasm-simd-threaded.jspi.wasm', 'ort-wasm-simd-threaded.jspi.mjs',
                  'ort.jspi.min.mjs')}
_DIAL = {'as trained': 'none', 'optimal': 'optimal', 'all 2': '2', 'all 3': '3', 'all 4': '4',
         'all 6': '6', 'all 8': '8'}
LEAST_EQUAL = 0.99
"""Share of the labels that must stay when large weights get 16 bits; of trained models more do."""
_LARGE = 1024  # numbers of a weight
_HERE = Path(__file__).parent


def export_page(model: str | Path, out: str | Path, *, checkpoint: str | Path | None = None,
                images: str | Path | None = None, threads: int | None = None,
                runtime: str | Path | None = None) -> str:
    """Export a model to ONNX with its ratio as an input, and write a page that runs it.

    Args:
        model, checkpoint, images, threads: See `export`.
        out: The folder. It is replaced if it holds such a page, and refused if it holds anything
            else.
        runtime: The unpacked package `PACKAGE`; by default npm gets it.

    Returns:
        What was written and measured.

    Raises:
        UserError: See `export`; or the folder or npm cannot be used. Nothing is written then.
    """
    out = Path(out)
    _check_folder(out)
    package = get_runtime() if runtime is None else Path(runtime)
    with tempfile.TemporaryDirectory() as place:
        graph = Path(place, 'model.onnx')
        report = export(model, graph, format='onnx', checkpoint=checkpoint, isr_ratio=RUNTIME,
                        images=images, threads=threads)
        text = write_page(graph, out, package)
    return f'{replace(report, path=out / graph.name)}\n{text}'


def write_page(graph: Path, out: Path, package: Path) -> str:
    """Write the page of an ONNX file whose ratio is an input, as `export_page` does."""
    import onnx
    model = onnx.load(graph)
    metadata = json.loads({entry.key: entry.value for entry in model.metadata_props}[KEY])
    if len(metadata['classes']) > 256:
        raise ConfigError(f'the model has {len(metadata["classes"])} classes, and the page can '
                          'show 256: export another model')
    resize, stages = _find_resize(metadata['pipeline']), metadata['isr_stages']
    dial = [*_positions(stages)]
    with _replacing_folder(out) as folder:
        shutil.copytree(_HERE / 'web', folder, dirs_exist_ok=True)
        shutil.copy(_HERE.with_name('predict') / 'page.css', folder)
        _copy_runtime(package, folder / 'ort')
        (folder / 'examples').mkdir()
        examples = draw_examples(folder / 'examples', suffix='.jpg')
        onnx.save_model(halve_weights(model), folder / 'model.onnx')
        equal = _compare(graph, folder / 'model.onnx', dial[:2], examples[:2])
        if not equal >= LEAST_EQUAL:
            raise ConfigError(f'{out} is not written: with weights of 16 bits, {100 * equal:.2f} % '
                              f'of the labels stay, and at least {100 * LEAST_EQUAL:g} % are '
                              'required: use --format onnx')
        write_file(folder / 'model.json', json.dumps(dict(
            {name: metadata[name] for name in ('checkpoint', 'classes', 'palette', 'minimum')},
            stages=stages, encoder=sum(name.startswith('encoder') for name in stages), dial=dial,
            resize=resize, side=MAX_SIDE,
            examples=[f'examples/{Path(path).name}' for path in examples],
            files={kind: {name: (folder / name).stat().st_size for name in (
                f'ort/{names[0]}', 'model.onnx')} for kind, names in _FILES.items()})))
        size = sum(path.stat().st_size for path in folder.rglob('*') if path.is_file())
    return (f'With weights of 16 bits, {100 * equal:.4f} % of the labels stay. To see the page '
            f'({size / 1e6:.1f} MB):\npython -m http.server --directory {out}')


def halve_weights(model: Any) -> Any:
    """Store large weights in float16, with casts in front; the arithmetic stays in float32.

    Runtimes compute the casts once, when they load the file.
    """
    import onnx
    casts = []
    for weight in model.graph.initializer:
        if weight.data_type != onnx.TensorProto.FLOAT or np.prod(weight.dims) < _LARGE:
            continue
        values, name = onnx.numpy_helper.to_array(weight), weight.name
        if np.abs(values).max() < np.finfo(np.float16).max:
            weight.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float16), f'{name}_16'))
            casts.append(onnx.helper.make_node('Cast', [f'{name}_16'], [name], name=f'{name}_32',
                                               to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def get_runtime() -> Path:
    """Return the unpacked package of npm, from a cache or from its registry."""
    cache = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache', 'mmseg_edaformer')
    folder = cache / PACKAGE
    if folder.is_dir():
        return folder / 'package'
    other = 'give the unpacked package with --runtime FOLDER'
    if shutil.which('npm') is None:
        raise ConfigError(f'the page needs {PACKAGE}, which npm gets, and npm is not installed: '
                          f'install Node.js, or {other}')
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as place:
        done = subprocess.run(['npm', 'pack', '--silent', PACKAGE], cwd=place, text=True,
                              capture_output=True, stdin=subprocess.DEVNULL, check=False)
        archives = [*Path(place).glob('*.tgz')]
        if done.returncode or not archives:
            raise ConfigError(f'npm cannot get {PACKAGE}: {done.stderr.strip()[:300]}. Try again '
                              f'with a network, or {other}')
        digest = hashlib.sha512(archives[0].read_bytes()).digest()
        if base64.b64encode(digest).decode() != SHA512:
            raise ConfigError(f'npm sent another archive for {PACKAGE} than is known here: do not '
                              f'use its registry, or {other}')
        with tarfile.open(archives[0]) as archive:
            archive.extractall(Path(place, 'unpacked'), filter='data')
        Path(place, 'unpacked').replace(folder)
    return folder / 'package'


def _find_resize(pipeline: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what a test pipeline does to the size of images, for networkSize in pixels.js."""
    resize = dict(scale=None, multiple=1)
    for step in pipeline:
        if 'Multiple' in step['type']:
            resize['multiple'] = step['size_divisor']
        elif 'Resize' in step['type'] and step.get('keep_ratio'):
            resize['scale'] = step['scale']
        elif step['type'] not in ('LoadSegLabels', 'LoadAnnotations'):
            raise ConfigError(f'the page cannot do what {step["type"]} of the test pipeline does '
                              'to images: export a model without it')
    return resize


def _positions(stages: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the positions of the slider: names, and a multiplier for each stage."""
    parts = [name.partition(' ')[0] for name in stages]
    for name, text in _DIAL.items():
        try:
            yield dict(name=name, ratio=[
                multiplier for part in dict.fromkeys(parts)
                for multiplier in ISRRatio.parse(text).for_stages(part, parts.count(part))])
        except RatioError:  # optimal is for EDAFormer's stages
            continue


def _compare(one: Path, other: Path, dial: Sequence[dict[str, Any]], examples: Sequence[str]
             ) -> float:
    """Return the share of equal labels of two files on the examples."""
    import onnxruntime
    sessions = [onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
                for path in (one, other)]
    equal = []
    for path in examples:
        image = np.array(Image.open(path))[None]
        for position in dial:
            labels = [session.run(['logits'], dict(images=image, isr_ratio=np.array(
                position['ratio'])))[0].argmax(1) for session in sessions]
            equal.append((labels[0] == labels[1]).mean())
    return float(np.mean(equal))


def _copy_runtime(package: Path, target: Path) -> None:
    """Copy what the page needs of the package, and the licences, which its archive lacks."""
    import onnxruntime
    try:
        found = json.loads((package / 'package.json').read_text(encoding='utf-8'))
        name = f'{found["name"]}@{found["version"]}'
        if name != PACKAGE:
            raise ConfigError(f'{package} is {name}: the page needs {PACKAGE}')
        target.mkdir()
        for file in (file for files in _FILES.values() for file in files):
            shutil.copy(package / 'dist' / file, target)
    except (OSError, KeyError, json.JSONDecodeError) as error:
        raise ConfigError(f'{package} is not the unpacked package {PACKAGE} ({first_line(error)}): '
                          f'unpack what `npm pack {PACKAGE}` writes') from error
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
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f'.{out.name}.', dir=out.parent) as place:
            new = Path(place, 'new')
            new.mkdir()
            yield new
            if out.exists():
                out.replace(Path(place, 'old'))
            new.replace(out)
