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
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..command_line import is_foreign
from ..errors import ConfigError, RatioError, first_line
from ..files import write_file
from ..predict.comparison import MAX_SIDE
from ..predict.outputs import writing
from ..predict.page import draw_examples
from . import export
from .graph import RUNTIME
from .runtimes import Exported

PACKAGE, SHA512 = 'onnxruntime-web@1.30.0', (
    'q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ==')
"""The package of npm, and the hash of its archive."""
_FILES = {'cpu': ('ort-wasm-simd-threaded.wasm', 'ort-wasm-simd-threaded.mjs', 'ort.wasm.min.mjs'),
          'gpu': ('ort-wasm-simd-threaded.jspi.wasm', 'ort-wasm-simd-threaded.jspi.mjs',
                  'ort.jspi.min.mjs')}
_DIAL = {'as trained': 'none', 'optimal': 'optimal', 'all 2': '2', 'all 3': '3', 'all 4': '4',
         'all 6': '6', 'all 8': '8'}
LEAST_KEPT = 0.99
"""Share of the labels that must stay when large weights get 16 bits; of trained models more do."""
_LARGE = 1024  # numbers of a weight
_HERE = Path(__file__).parent
_LICENCES = 'LICENSE', 'ThirdPartyNotices.txt'
_NAMES = {*(path.name for path in (_HERE / 'web').iterdir()), 'page.css', 'ort', 'examples',
          'model.onnx', 'model.json', *(f'ort/{name}' for names in (*_FILES.values(), _LICENCES)
                                        for name in names)}  # in the folder, without the examples


def export_page(model: str | Path, out: str | Path, *, checkpoint: str | Path | None = None,
                images: str | Path | None = None, threads: int | None = None,
                runtime: str | Path | None = None) -> str:
    """Export a model to ONNX with its ratio as an input, and write a page that runs it.

    Args:
        model, checkpoint, images, threads: See `export`.
        out: The folder. It is replaced if it holds such a page alone, and refused if it holds
            anything else.
        runtime: The unpacked package `PACKAGE`; by default npm gets it.

    Returns:
        What was written and measured.

    Raises:
        UserError: See `export`; or the folder or npm cannot be used. Nothing is written then.
    """
    out = Path(out)
    _check_folder(out)
    if not isinstance(model, (str, Path)) or is_foreign(model):
        name = model if isinstance(model, (str, Path)) else type(model).__name__
        raise ConfigError('the page is for models of this package and mmsegmentation: '
                          f'{name} is none, so use --format onnx')
    package = get_runtime() if runtime is None else Path(runtime)
    _check_package(package)
    with tempfile.TemporaryDirectory() as place:
        graph = Path(place, 'model.onnx')
        try:
            report = export(model, graph, format='onnx', checkpoint=checkpoint, isr_ratio=RUNTIME,
                            images=images, threads=threads)
        except ConfigError as error:
            reason = first_line(error).removeprefix(f'{graph} is not written: ')
            raise ConfigError(f'{out} is not written: the page needs an ONNX file that takes any '
                              f'size and ratio, and its export failed: {reason}') from error
        text = write_page(graph, out, package)
    return f'{replace(report, path=out / graph.name)}\n{text}'


def write_page(graph: Path, out: Path, package: Path) -> str:
    """Write the page of an ONNX file whose ratio is an input, as `export_page` does."""
    import onnx
    file = Exported(graph)
    metadata = file.metadata
    if len(metadata['classes']) > 256:
        raise ConfigError(f'the model has {len(metadata["classes"])} classes, and the page can '
                          'show 256: export another model')
    if metadata['align_corners']:
        raise ConfigError('the model resizes its logits with align_corners=True, and the page '
                          'cannot: use --format onnx')
    resize, dial = _find_resize(metadata['pipeline']), []
    for name, ratio in _DIAL.items():
        with suppress(RatioError):  # optimal does not fit all numbers of stages
            dial.append(dict(name=name, ratio=file.multipliers(ratio)['isr_ratio'].tolist()))
    with _replacing_folder(out) as folder:
        shutil.copytree(_HERE / 'web', folder, dirs_exist_ok=True)
        shutil.copy(_HERE.with_name('predict') / 'page.css', folder)
        _copy_runtime(package, folder / 'ort')
        (folder / 'examples').mkdir()
        examples = draw_examples(folder / 'examples', suffix='.jpg')
        onnx.save_model(halve_weights(onnx.load(graph)), folder / 'model.onnx')
        equal = _share_kept((file, Exported(folder / 'model.onnx')),
                            [_DIAL[position['name']] for position in dial[:2]], examples[:2])
        if not equal >= LEAST_KEPT:
            raise ConfigError(f'{out} is not written: with weights of 16 bits, {100 * equal:.2f} % '
                              f'of the labels stay, and at least {100 * LEAST_KEPT:g} % are '
                              'required: use --format onnx')
        write_file(folder / 'model.json', json.dumps(dict(
            {name: metadata[name] for name in ('checkpoint', 'classes', 'palette', 'minimum')},
            stages=metadata['isr_stages'], dial=dial, resize=resize, side=MAX_SIDE,
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
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as place:
            done = subprocess.run(['npm', 'pack', '--loglevel=error', PACKAGE], cwd=place,
                                  text=True, capture_output=True, stdin=subprocess.DEVNULL,
                                  check=False)
            archives = [*Path(place).glob('*.tgz')]
            if done.returncode or not archives:
                raise ConfigError(f'npm cannot get {PACKAGE}: {done.stderr.strip()[:300]}. Try '
                                  f'again with a network, or {other}')
            digest = hashlib.sha512(archives[0].read_bytes()).digest()
            if base64.b64encode(digest).decode() != SHA512:
                raise ConfigError(f'npm sent another archive for {PACKAGE} than is known here: do '
                                  f'not use its registry, or {other}')
            with tarfile.open(archives[0]) as archive:
                archive.extractall(Path(place, 'unpacked'), filter='data')
            try:
                Path(place, 'unpacked').replace(folder)
            except OSError:
                if not folder.is_dir():  # which another process may have made meanwhile
                    raise
    except OSError as error:
        raise ConfigError(f'{cache} cannot take {PACKAGE} ({first_line(error)}): free some space, '
                          f'or {other}') from error
    return folder / 'package'


def _find_resize(pipeline: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what a test pipeline does to the size of images, for networkSize in pixels.js."""
    resize = dict(scale=None, multiple=1)
    for step in pipeline:
        kind = step.get('type', 'one step')
        if 'Multiple' in kind and 'size_divisor' in step:
            resize['multiple'] = step['size_divisor']
        elif 'Resize' in kind and step.get('keep_ratio') and isinstance(step.get('scale'), list):
            resize['scale'] = step['scale']
        elif kind not in ('LoadSegLabels', 'LoadAnnotations'):
            raise ConfigError(f'the page cannot do what {kind} of the test pipeline does to '
                              'images: export a model without it, or a SegResize with scale and '
                              'keep_ratio or a ResizeToMultiple with size_divisor in its place')
    return resize


def _share_kept(files: Sequence[Exported], ratios: Sequence[str], examples: Sequence[str]) -> float:
    """Return the share of equal labels of two files on the examples."""
    equal = []
    for path, ratio in product(examples, ratios):
        image = np.array(Image.open(path))[None]
        one, other = (file(image, isr_ratio=ratio).argmax(1) for file in files)
        equal.append((one == other).mean())
    return float(np.mean(equal))


def _check_package(package: Path) -> None:
    try:
        found = json.loads((package / 'package.json').read_text(encoding='utf-8'))
        name = f'{found["name"]}@{found["version"]}'
        for file in (file for files in _FILES.values() for file in files):
            (package / 'dist' / file).stat()
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f'{package} is not the unpacked package {PACKAGE} ({first_line(error)}): '
                          f'unpack what `npm pack {PACKAGE}` writes') from error
    if name != PACKAGE:
        raise ConfigError(f'{package} is {name}: the page needs {PACKAGE}')


def _copy_runtime(package: Path, target: Path) -> None:
    """Copy what the page needs of the package, and the licences, which its archive lacks."""
    import onnxruntime
    target.mkdir()
    for file in (file for files in _FILES.values() for file in files):
        shutil.copy(package / 'dist' / file, target)
    for name in _LICENCES:
        shutil.copy(Path(onnxruntime.__file__).with_name(name), target)


def _check_folder(out: Path) -> None:
    if Path.cwd().is_relative_to(out.resolve()):
        raise ConfigError(f'--out {out} would replace the folder that you are in: give a new one')
    if out.exists() and not _is_page(out) and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f'--out {out} is not the folder of a page, or it holds other files too: '
                          'give a new one')


def _is_page(folder: Path) -> bool:
    """Return whether a folder holds a page and nothing beside it."""
    try:
        model = json.loads((folder / 'model.json').read_text(encoding='utf-8'))
        return 'dial' in model and {*_NAMES, *model['examples']} >= {
            path.relative_to(folder).as_posix() for path in folder.rglob('*')}
    except (OSError, ValueError, KeyError, TypeError):
        return False


@contextmanager
def _replacing_folder(out: Path) -> Iterator[Path]:
    """Give a folder to write to that takes the place of ``out`` when the block ends well."""
    _check_folder(out)
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f'.{out.name}.', dir=out.parent) as place:
            new, old = Path(place, 'new'), Path(place, 'old')
            new.mkdir()
            yield new
            if out.exists():
                out.replace(old)
            try:
                new.replace(out)
            finally:
                if old.exists() and not out.exists():
                    old.replace(out)
