"""A web page on which the ISR ratio of a trained model is moved while its prediction is watched."""
import errno
import functools
import hashlib
import importlib
import os
import signal
import socket
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import cv2
import numpy as np
import torch
from mmseg.registry import TRANSFORMS

from ..compat import install_command
from ..cost import count_macs
from ..data.drawing import draw_scene
from ..errors import ConfigError, DataError, RatioError, UserError
from ..files import write_file
from ..isr import ISRRatio, isr
from ..isr.adapters import find_attention
from .inputs import scale_down
from .segmenter import Segmentation, Segmenter

MAX_SIDE = 1024
"""Pixels of the longer side that pictures are reduced to by default."""

_TRAINED = ISRRatio.parse('none')
_MOST = 8  # the largest multiplier on the sliders
_MAX_PIXELS = 2 ** 26  # of a file that is decoded
_ROUNDS, _SECONDS = 5, 1.  # so many timed turns at most, and none begins later than that
_KEPT = 8  # comparisons
_WAITING = 16  # requests
_AGE = 1800  # seconds that uploads are kept for
_HERE = '127.0.0.1'


@dataclass(frozen=True, eq=False)
class Comparison:
    """One picture at the trained ratio and at another.

    Pairs are before and after. ``milliseconds`` are medians of ``rounds`` whole predictions in
    turns, from the decoded picture to its labels; ``gmacs`` count what the network saw.
    """
    ratio: ISRRatio
    found: tuple[Segmentation, Segmentation]
    milliseconds: tuple[float, float]
    rounds: int
    gmacs: tuple[float, float]

    @property
    def changed(self) -> float:
        """The share of the pixels whose class is another one."""
        before, after = self.found
        return float((before.labels != after.labels).mean())


class Comparer:
    """Predicts pictures at the trained ratio and at another, for one request at a time.

    Args:
        segmenter: What predicts. Its ratio is set by each comparison.
        max_side: Pictures whose longer side has more pixels are reduced to that before.

    Attributes:
        stages: Numbers of the stages whose keys can be reduced, by 'encoder' and 'decoder'.

    Raises:
        RatioError: The model holds no attention that ISR can reduce.
        ConfigError: ``max_side`` is below 32.
    """

    def __init__(self, segmenter: Segmenter, max_side: int = MAX_SIDE) -> None:
        if max_side < 32:
            raise ConfigError(f'--max-side {max_side}: give 32 or more pixels')
        self.segmenter, self.max_side = segmenter, max_side
        with isr(segmenter.model, 1):
            pass
        self.stages: dict[str, tuple[int, ...]] = {}
        for part in find_attention(segmenter.model).parts:
            if len(part.stages) != len(self.stages.setdefault(part.kind, tuple(part.stages))):
                self.stages[part.kind] = (0,)  # one multiplier for all is what fits
        self._read: Any = TRANSFORMS.build(
            {**segmenter.description.pipeline[0], 'max_pixels': _MAX_PIXELS})
        self._lock = threading.Lock()
        self._gmacs: dict[tuple[ISRRatio, tuple[int, ...]], float] = {}
        self.compare = functools.lru_cache(_KEPT)(self._compare)

    def ratio(self, multipliers: Sequence[int]) -> ISRRatio:
        """The ratio of multipliers, one for each of the `stages`, the encoder's first."""
        rest = iter(multipliers)
        parts = {kind: tuple(int(next(rest)) for _ in numbers)
                 for kind, numbers in sorted(self.stages.items(), reverse=True)}
        if {*multipliers} == {1}:
            return _TRAINED
        return ISRRatio(parts.get('encoder', (1,)), parts.get('decoder', (1,)))

    def multipliers(self, ratio: ISRRatio | int | str) -> list[int] | None:
        """What `ratio` reads: the multiplier of each stage; None if the ratio does not fit."""
        ratio = ISRRatio.parse(ratio)
        try:
            return [each for kind, numbers in sorted(self.stages.items(), reverse=True)
                    for each in ratio.for_stages(kind, len(numbers))]
        except RatioError:
            return None

    def _compare(self, path: str, ratio: ISRRatio) -> Comparison:
        """Predict a picture at both ratios; the last few comparisons are kept as ``compare``.

        Raises:
            DataError: It cannot be read, or is too large.
        """
        picture = self._picture(path)
        turns = tuple(dict.fromkeys((_TRAINED, ratio)))
        found: dict[ISRRatio, Segmentation] = {}
        gmacs: dict[ISRRatio, float] = {}
        seconds: dict[ISRRatio, list[float]] = defaultdict(list)
        with self._lock:
            for each in turns:  # the first prediction of a size may compile or allocate
                self.segmenter.isr_ratio = each
                with self._watch() as shapes:
                    found[each] = self.segmenter(picture)
                gmacs[each] = sum(self._count(each, shape) for shape in shapes)
            start = time.perf_counter()
            while not seconds or (len(seconds[ratio]) < _ROUNDS and
                                  time.perf_counter() - start < _SECONDS):
                for each in turns:
                    self.segmenter.isr_ratio = each
                    begin = time.perf_counter()
                    self.segmenter(picture)
                    seconds[each].append(time.perf_counter() - begin)
        return Comparison(ratio, (found[_TRAINED], found[ratio]),
                          (1e3 * statistics.median(seconds[_TRAINED]),
                           1e3 * statistics.median(seconds[ratio])),
                          len(seconds[ratio]), (gmacs[_TRAINED], gmacs[ratio]))

    def _picture(self, path: str) -> np.ndarray:
        """Decode a file as the model's pipeline does, H x W x 3, BGR, and reduce it."""
        try:
            image = self._read(dict(img_path=path))['img']
        except DataError as error:  # people know the file by the name that they gave it
            raise DataError(str(error).replace(path, Path(path).name).replace(
                ' (max_pixels of the transform)', '')) from error
        if image.dtype != np.uint8:
            image = image.astype(np.uint8)
        return scale_down(image, self.max_side)

    @contextmanager
    def _watch(self) -> Iterator[list[tuple[int, ...]]]:
        """Collect the shapes, N x 3 x H x W, of what the network is given."""
        shapes: list[tuple[int, ...]] = []
        backbone: Any = self.segmenter.model.backbone
        hook = backbone.register_forward_pre_hook(
            lambda module, inputs: shapes.append(tuple(inputs[0].shape)))
        try:
            yield shapes
        finally:
            hook.remove()

    def _count(self, ratio: ISRRatio, shape: tuple[int, ...]) -> float:
        """GMACs of a pass at the ratio that is set."""
        key = ratio, shape[2:]
        if key not in self._gmacs:
            if len(self._gmacs) >= 4096:
                self._gmacs.clear()
            self._gmacs[key] = count_macs(self.segmenter.model, (shape[2], shape[3])) / 1e9
        return shape[0] * self._gmacs[key]


def describe_figures(comparison: Comparison) -> str:
    """HTML: how many pixels changed, and what both ratios cost."""
    gmacs, milliseconds = comparison.gmacs, comparison.milliseconds
    height, width = comparison.found[0].labels.shape
    cards = ''.join(_card(*each) for each in (
        ('changed', 'pixels changed', f'{comparison.changed:.2%}',
         f'of {width} x {height}'),
        ('gmacs', 'GMACs', f'{gmacs[0]:.3g} → <b>{gmacs[1]:.3g}</b>', _change(*gmacs)),
        ('ms', 'milliseconds', f'{milliseconds[0]:.0f} → <b>{milliseconds[1]:.0f}</b>',
         f'{_change(*milliseconds)}, median of {comparison.rounds}')))
    name = 'none' if comparison.ratio == _TRAINED else str(comparison.ratio)
    return (f'<div class="eda-cards">{cards}</div><p class="eda-note">Ratio of the right side: '
            f'<code>--isr-ratio {name}</code></p>')


def describe_classes(comparison: Comparison) -> str:
    """HTML: the colours and names of the classes that were found, and their shares."""
    before, after = (found.shares for found in comparison.found)
    colours = dict(zip(comparison.found[0].classes, comparison.found[0].palette))
    names = sorted({**before, **after}, key=lambda name: -before.get(name, 0.))
    rows = ''.join(
        f'<tr><td><span style="background:rgb{colours[name]}"></span></td>'
        f'<th scope="row">{escape(name)}</th><td>{_share(before.get(name, 0.))}</td>'
        f'<td>{_share(after.get(name, 0.))}</td></tr>' for name in names)
    return ('<div class="eda-classes"><table><thead><tr><td></td><th>class</th><th>trained</th>'
            f'<th>chosen</th></tr></thead><tbody>{rows}</tbody></table></div>')


def draw_examples(folder: Path, count: int = 4) -> list[str]:
    """Draw scenes into a folder; returns the paths of their files."""
    paths = []
    for index in range(count):
        image = draw_scene(np.random.default_rng(40 + index), (384, 512))[0]
        paths.append(str(folder / f'scene{index + 1}.png'))
        write_file(paths[-1], cv2.imencode('.png', image[..., ::-1])[1].tobytes())
    return paths


def build_page(comparer: Comparer, examples: Sequence[str]) -> Any:
    """The page, as gradio's Blocks.

    Args:
        comparer: What predicts.
        examples: Paths of pictures to begin with; the first one is shown.
    """
    gr = _gradio()

    segmenter = comparer.segmenter
    where = torch.cuda.get_device_name(segmenter.device) if segmenter.device.type == 'cuda' else (
        f'CPU, {torch.get_num_threads()} thread{"s" * (torch.get_num_threads() != 1)}')

    def say(text: str) -> tuple[Any, str, str, Any]:
        return None, '', '', gr.update(value=text, visible=True)

    def show(path: str | None, *values: Any) -> tuple[Any, str, str, Any]:
        if path is None:
            return say('<p class="eda-note">Choose a picture, or one of the drawn scenes.</p>')
        try:
            strength, *multipliers = map(_read_slider, (opacity, *sliders), values)
            found = comparer.compare(path, comparer.ratio([int(each) for each in multipliers]))
        except UserError as error:
            return say(f'<p class="eda-problem" role="alert">{escape(str(error))}</p>')
        pictures = tuple(_store(each.draw(strength)) for each in found.found)
        return (pictures, describe_figures(found), describe_classes(found),
                gr.update(value='', visible=False))

    with gr.Blocks(title='One model, adjustable cost', analytics_enabled=False,
                   delete_cache=(_AGE // 3, _AGE)) as page:
        gr.HTML(_introduction(segmenter, where, comparer.max_side), padding=False)
        with gr.Row():
            with gr.Column(scale=4, min_width=320):
                picture = gr.Image(
                    examples[0] if examples else None, type='filepath', image_mode=None,
                    sources=['upload', 'webcam', 'clipboard'], label='Picture', height=280,
                    elem_id='eda-picture', buttons=[])
                if examples:
                    gr.Examples([[path] for path in examples], picture, label='Drawn scenes')
                start = iter(comparer.multipliers('optimal') or comparer.multipliers(2) or ())
                sliders: list[Any] = []
                with gr.Row(elem_classes='eda-stages'):
                    for kind, numbers in sorted(comparer.stages.items(), reverse=True):
                        for number in numbers:
                            name = f'{kind} {number or ""}'.strip()
                            sliders.append(gr.Slider(
                                1, _MOST, next(start), step=1, label=name, min_width=100,
                                buttons=[], elem_id=f'eda-{name.replace(" ", "-")}'))
                with gr.Row():
                    quick = [(gr.Button(label, size='sm', min_width=60, elem_id=f'eda-{ratio}'),
                              multipliers)
                             for ratio, label in (('none', 'as trained'), ('optimal', 'optimal'),
                                                  ('2', 'all 2'), ('4', 'all 4'))
                             if (multipliers := comparer.multipliers(ratio)) is not None]
            with gr.Column(scale=6, min_width=320):
                message = gr.HTML(elem_id='eda-message', visible=False, padding=False)
                result = gr.ImageSlider(label='Left: as trained. Right: the chosen ratio',
                                        interactive=False, max_height=480,
                                        elem_id='eda-result', buttons=['fullscreen'])
                opacity = gr.Slider(0, 1, 0.5, step=0.05, label='opacity of the mask', buttons=[],
                                    elem_id='eda-opacity')
                figures = gr.HTML(elem_id='eda-figures', padding=False)
                classes = gr.HTML(elem_id='eda-classes', padding=False)
        inputs, outputs = [picture, opacity, *sliders], [result, figures, classes, message]
        for slider in opacity, *sliders:  # _read_slider says what is wrong on the page
            slider.preprocess = lambda value: value
        settings: dict[str, Any] = dict(
            fn=show, inputs=inputs, outputs=outputs, trigger_mode='always_last',
            show_progress='minimal', show_progress_on=result, api_visibility='private',
            concurrency_limit=1, concurrency_id='predict')
        ask = gr.Button(elem_id='eda-ask')
        ask.click(**settings)
        gr.on([page.load, picture.change, opacity.input, *(each.input for each in sliders)],
              js=_ASK_SOON, api_visibility='private')
        for button, multipliers in quick:
            button.click(_giver(multipliers), None, sliders, api_visibility='private',
                         queue=False, show_progress='hidden').then(
                             js=_ASK_SOON, api_visibility='private')
    _guard(gr, page, picture)
    return page.queue(max_size=_WAITING, api_open=False)


def serve(segmenter: Segmenter, *, host: str = _HERE, port: int = 7860, names: Sequence[str] = (),
          max_upload: float = 20., max_side: int = MAX_SIDE) -> None:
    """Serve the page until SIGINT or SIGTERM.

    Uploads and examples lie in a folder of their own, which is removed at the end.

    Args:
        segmenter: What predicts.
        host: The address to listen on; others than that of this machine let others in.
        port: 0 for one that is free.
        names: Further host names that browsers reach the page by, such as that of a proxy.
        max_upload: Files with more MiB are refused.
        max_side: As of `Comparer`.

    Raises:
        ConfigError: gradio is missing, the port is taken, or a limit makes no sense.
        RatioError: The model holds no attention that ISR can reduce.
    """
    if not max_upload > 0:
        raise ConfigError(f'--max-upload {max_upload:g}: give a number of megabytes above 0')
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the folder is removed
    with _own_folder() as folder:
        gr = _gradio()
        comparer = Comparer(segmenter, max_side)
        with _listen(host, port) as listening:
            page = build_page(comparer, draw_examples(folder))
            fastapi, uvicorn = (importlib.import_module(name) for name in ('fastapi', 'uvicorn'))
            app = gr.mount_gradio_app(
                fastapi.FastAPI(openapi_url=None), page, '/', allowed_paths=[], show_error=False,
                max_file_size=round(max_upload * 2 ** 20), footer_links=[], run_history=False,
                ssr_mode=False, pwa=False, mcp_server=False, enable_monitoring=False,
                theme=gr.themes.Default(font=('system-ui', 'sans-serif'),
                                        font_mono=('ui-monospace', 'monospace')), css=_CSS)
            guarded = _refuse_strangers(app, {'localhost', '127.0.0.1', '::1', *(
                name.lower() for name in (host, socket.gethostname(), *names))})
            server = uvicorn.Server(uvicorn.Config(guarded, log_level='warning',
                                                   timeout_graceful_shutdown=2))
            address, number = listening.getsockname()[:2]
            if not address.startswith('127.') and address != '::1':
                print('Everyone who can reach this machine can use this page, without a password '
                      'and unencrypted; without --host it is for this machine alone.')
                address = {'0.0.0.0': socket.gethostname(), '::': socket.gethostname()}.get(
                    address, address)
            print(f'http://{_url_host(address)}:{number}   (Ctrl-C ends it)', flush=True)
            with suppress(KeyboardInterrupt):  # raised again after the server has ended
                server.run(sockets=[listening])


@contextmanager
def _own_folder() -> Iterator[Path]:
    """A temporary folder, in ``uploads`` of which gradio puts what it stores."""
    before = os.environ.get('GRADIO_TEMP_DIR')
    with tempfile.TemporaryDirectory(prefix='mmseg_edaformer_demo_') as folder:
        os.environ['GRADIO_TEMP_DIR'] = os.path.join(folder, 'uploads')
        try:
            yield Path(folder)
        finally:
            del os.environ['GRADIO_TEMP_DIR']
            if before is not None:
                os.environ['GRADIO_TEMP_DIR'] = before


def _gradio() -> Any:
    """gradio, without what it would tell or fetch.

    Raises:
        ConfigError: It is not installed.
    """
    os.environ['GRADIO_ANALYTICS_ENABLED'] = 'False'
    os.environ['HF_HUB_OFFLINE'] = '1'
    try:
        return importlib.import_module('gradio')
    except ImportError as error:
        raise ConfigError(f'the page needs gradio, which cannot be imported ({error}): '
                          f'{install_command("demo")}') from error


def _guard(gr: Any, page: Any, picture: Any) -> None:
    """Have requests name no files but those in the folder of uploads, and no addresses.

    gradio looks after that in apps that it launches itself, not in those that are mounted, and it
    fetches public addresses. The picture comes as it was uploaded, however broken: gradio would
    open it, without the limits that hold here. Not in a subclass, beside which gradio would write
    a .pyi file.
    """
    folder = Path(os.environ['GRADIO_TEMP_DIR']).resolve()

    def check(path: Any) -> str:
        if '://' in str(path) or folder not in Path(path).resolve().parents:
            raise gr.Error('this is no uploaded picture', print_exception=False)
        return str(path)

    def checked(move: Callable[[Any], Any]) -> Callable[[Any], Any]:
        async def move_checked(path: Any) -> str | None:
            return await move(None if path is None else check(path))
        return move_checked

    for block in page.blocks.values():
        block.async_move_resource_to_block_cache = checked(
            block.async_move_resource_to_block_cache)
    picture.preprocess = lambda payload: payload and check(payload.path)


def _refuse_strangers(app: Any, names: set[str]) -> Any:
    """An ASGI app that answers requests to the names alone, and none of another site's pages.

    Without it, a site whose name is made to lead to this machine, and with gradio every site where
    the machine is reached by a name of its own, could read what lies on this page.
    """
    responses = importlib.import_module('fastapi.responses')

    async def guarded(scope: Any, receive: Any, send: Any) -> None:
        answer = app
        if scope['type'] != 'lifespan':
            headers = {name: value.decode('latin-1') for name, value in scope['headers']}
            host = headers.get(b'host', '')
            try:
                name = urlsplit(f'//{host}').hostname
            except ValueError:
                name = None
            if name not in names and name != scope['server'][0]:
                answer = responses.PlainTextResponse(
                    'This page is not served under this host name. Where it should be, name it '
                    'with --allow-host when the server is started.', 403)
            elif headers.get(b'origin', f'http://{host}') not in (
                    f'http://{host}', f'https://{host}'):
                answer = responses.PlainTextResponse(
                    'This server answers no requests from pages of other sites. A proxy has to '
                    'pass the Host header on as it gets it.', 403)
            elif scope['path'].endswith('/openapi.json'):
                answer = responses.PlainTextResponse('Not Found', 404)
        await answer(scope, receive, send)
    return guarded


def _listen(host: str, port: int) -> socket.socket:
    """A socket that is bound to the address.

    Raises:
        ConfigError: It cannot be.
    """
    try:
        return socket.create_server(
            (host, port), family=socket.AF_INET6 if ':' in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise ConfigError(f'port {port} of {host} is taken: give another --port, or 0 for '
                              'one that is free') from error
        raise ConfigError(f'--host {host} --port {port} cannot be listened on: {error}') from error


def _url_host(address: str) -> str:
    return f'[{address}]' if ':' in address else address


def _giver(values: list[int]) -> Callable[[], Any]:
    """A function that gives these values, or the one alone."""
    return lambda: values if len(values) > 1 else values[0]


def _read_slider(slider: Any, value: Any) -> float:
    """The number of a slider: the nearest one that it has, the lowest if it was deleted.

    Raises:
        DataError: The value is not a number.
    """
    if value is None:
        return float(slider.minimum)
    if not isinstance(value, (int, float)) or value != value:
        raise DataError(f'{slider.label}: {repr(value)[:40]} is not a number: give one from '
                        f'{slider.minimum} to {slider.maximum}')
    return float(min(max(value, slider.minimum), slider.maximum))


def _store(picture: np.ndarray) -> str:
    """Write a picture, H x W x 3, BGR, for the page; returns the path of its file.

    Equal pictures have one file, which never stands half-written: gradio would write into it while
    it is sent, and a browser that gets such a file shows nothing.
    """
    content = cv2.imencode('.jpg', picture)[1].tobytes()
    path = Path(os.environ['GRADIO_TEMP_DIR'], f'{hashlib.sha256(content).hexdigest()}.jpg')
    write_file(path, content)
    return str(path)


def _change(before: float, after: float) -> str:
    return 'no change' if before == after else f'{after / before - 1:+.0%}'


def _share(share: float) -> str:
    return '&lt; 0.1%' if 0 < share < 0.0005 else f'{share:.1%}'


def _card(name: str, title: str, value: str, note: str) -> str:
    return (f'<div class="eda-{name}"><span>{title}</span><span class="eda-value">{value}</span>'
            f'<span>{note}</span></div>')


def _introduction(segmenter: Segmenter, where: str, max_side: int) -> str:
    source = escape(os.path.join(*Path(segmenter.source).parts[-2:]))
    return f'''<div class="eda-introduction"><h1>One model, adjustable cost</h1>
<p>Inference spatial reduction (ISR) merges neighbouring keys of the attention of a trained model.
Each slider says by how much more than in training, in height and width, one stage of the network
merges them: 1 is the model as trained. The weights stay as they are. Move a slider and watch what
the prediction loses and what it costs.</p>
<p class="eda-note">{source}, {len(segmenter.classes)} classes, on {escape(where)}. Pictures are
reduced to {max_side} pixels at the longer side. Milliseconds are medians of whole predictions at
both ratios in turns, from the decoded picture to the labels; GMACs are counted.</p></div>'''


_ASK_SOON = '''() => {
  clearTimeout(window.edaSoon);
  window.edaSoon = setTimeout(() => document.querySelector('#eda-ask').click(), 100);
}'''
"""Asks once for what changes at once: gradio may answer two requests in the other order."""

_CSS = '''
#eda-ask { display: none; }
.gradio-container { width: 100% !important; max-width: 1280px !important; margin: 0 auto; }
.gradio-container .html-container { padding: 0; }
.eda-introduction h1 { font-size: 1.7rem; font-weight: 650; margin: .4rem 0 .3rem; }
.eda-introduction p { margin: 0 0 .4rem; max-width: 62rem; line-height: 1.45; }
.eda-note, .eda-cards span, .eda-classes thead th { font-size: .85rem; opacity: .75; }
.eda-introduction .eda-note { font-size: .85rem; }
.eda-cards + .eda-note { margin: .5rem 0 0; }
.eda-stages > .form { display: grid; width: 100%; background: var(--block-background-fill);
  grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); }
.eda-problem { border-left: 4px solid var(--error-border-color); padding: .6rem .9rem;
  background: var(--error-background-fill); border-radius: 4px; overflow-wrap: anywhere; }
.eda-cards { display: grid; gap: .6rem;
  grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); }
.eda-cards > div { display: flex; flex-direction: column; padding: .6rem .8rem;
  border: 1px solid var(--border-color-primary); border-radius: 8px;
  background: var(--block-background-fill); }
.eda-cards .eda-value { font-size: 1.25rem; opacity: 1; font-variant-numeric: tabular-nums; }
.eda-classes { max-height: 22rem; overflow-y: auto; }
.eda-classes table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
.eda-classes th, .eda-classes td { padding: .2rem .5rem; text-align: right; font-weight: 400;
  border: 0 !important; white-space: nowrap; }
.eda-classes th:nth-child(2) { text-align: left; width: 100%; white-space: normal;
  overflow-wrap: anywhere; }
.eda-classes table { border: 0 !important; }
.eda-classes tr { border: 0 solid var(--border-color-primary) !important; }
.eda-classes tbody tr { border-top-width: 1px !important; }
.eda-classes td > span { display: inline-block; width: 1.6rem; height: 1rem; border-radius: 3px;
  vertical-align: middle; border: 1px solid rgba(128, 128, 128, .4); }
'''
