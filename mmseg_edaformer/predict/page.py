"""A web page with sliders for the ISR ratio: the prediction as trained beside the reduced one."""
import functools
import hashlib
import importlib
import os
import signal
import socket
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import cv2
import numpy as np
import torch

from ..compat import install_command
from ..data.drawing import draw_scene
from ..errors import ConfigError, DataError, UserError
from ..files import templates, write_file
from ..listening import find_stranger, listen
from .comparison import MAX_SIDE, Comparer, Comparison
from .segmenter import Segmenter

_MOST = 8  # the largest multiplier on the sliders
_WAITING = 16  # requests
_AGE = 1800  # seconds that uploads are kept for
_HERE = '127.0.0.1'


def describe(comparison: Comparison) -> tuple[str, str]:
    """Return HTML with changed pixels and costs, and HTML with the classes and their shares."""
    trained, chosen = (result.shares for result in comparison.results)
    colours = dict(zip(comparison.results[0].classes, comparison.results[0].palette))
    names = sorted({**trained, **chosen}, key=lambda name: -trained.get(name, 0.))
    rows = [(name, colours[name], trained.get(name, 0.), chosen.get(name, 0.)) for name in names]
    return _fill('figures', made=comparison), _fill('classes', rows=rows)


def _fill(part: str, **values: Any) -> str:
    """Fill a macro of the template, which escapes the names of classes and files."""
    macros: Any = templates(Path(__file__).parent).get_template('page.html.jinja').module
    return str(getattr(macros, part)(**values))


def draw_examples(folder: Path, count: int = 4, suffix: str = '.png') -> list[str]:
    """Draw scenes into a folder, and return the paths of their files."""
    paths = []
    for index in range(count):
        image = draw_scene(np.random.default_rng(40 + index), (384, 512))[0]
        paths.append(str(folder / f'scene{index + 1}{suffix}'))
        write_file(paths[-1], cv2.imencode(suffix, image[..., ::-1])[1].tobytes())
    return paths


def build_page(comparer: Comparer, examples: Sequence[str]) -> Any:
    """Return the page, as gradio's Blocks; the first of the examples is shown."""
    gr = _import_gradio()

    def tell(text: str) -> tuple[Any, ...]:
        return None, '', '', gr.update(value=text, visible=True)

    def show(path: str | None, *values: Any) -> tuple[Any, ...]:
        if path is None:
            return tell(_fill('notice'))
        try:
            strength, *multipliers = map(_nearest, (opacity, *sliders), values)
            comparison = comparer.compare(path, comparer.ratio([*map(int, multipliers)]))
        except UserError as error:
            return tell(_fill('problem', error=error))
        images = tuple(_store(result.draw(strength)) for result in comparison.results)
        return images, *describe(comparison), gr.update(value='', visible=False)

    with gr.Blocks(title='One model, adjustable cost', analytics_enabled=False,
                   delete_cache=(_AGE // 3, _AGE)) as page:
        gr.HTML(_introduce(comparer), padding=False)
        with gr.Row():
            with gr.Column(scale=4, min_width=320):
                image = gr.Image(
                    examples[0] if examples else None, type='filepath', image_mode=None,
                    sources=['upload', 'webcam', 'clipboard'], label='Image', height=280,
                    elem_id='eda-image', buttons=[])
                if examples:
                    gr.Examples([[path] for path in examples], image, label='Drawn scenes')
                start = iter(comparer.multipliers('optimal') or comparer.multipliers(2) or ())
                names = [f'{kind} {number or ""}'.strip()
                         for kind, numbers in comparer.stages.items() for number in numbers]
                with gr.Row(elem_classes='eda-stages'):
                    sliders = [gr.Slider(1, _MOST, next(start), step=1, label=name, min_width=100,
                                         buttons=[], elem_id=f'eda-{name.replace(" ", "-")}')
                               for name in names]
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
        for slider in opacity, *sliders:  # _nearest reports what is wrong on the page
            slider.preprocess = lambda value: value
        ask = gr.Button(elem_id='eda-ask')
        ask.click(show, [image, opacity, *sliders], [result, figures, classes, message],
                  trigger_mode='always_last', show_progress='minimal', show_progress_on=result,
                  api_visibility='private', concurrency_limit=1, concurrency_id='predict')
        gr.on([page.load, image.change, opacity.input, *(slider.input for slider in sliders)],
              js=_ASK_SOON, api_visibility='private')
        for button, multipliers in quick:
            values = multipliers if len(multipliers) > 1 else multipliers[0]
            button.click(functools.partial(lambda values: values, values), None, sliders,
                         api_visibility='private', queue=False, show_progress='hidden').then(
                             js=_ASK_SOON, api_visibility='private')
    _guard(gr, page, image)
    return page.queue(max_size=_WAITING, api_open=False)


def serve(segmenter: Segmenter, *, host: str = _HERE, port: int = 7860, names: Sequence[str] = (),
          max_upload: float = 20., max_side: int = MAX_SIDE) -> None:
    """Serve the page until SIGINT or SIGTERM; uploads lie in a temporary folder.

    Arguments are those of tools/demo.py, with ``names`` for ``--allow-host``.
    """
    if not max_upload > 0:
        raise ConfigError(f'--max-upload {max_upload:g}: give a number of megabytes above 0')
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the folder is removed
    with tempfile.TemporaryDirectory(prefix='mmseg_edaformer_demo_') as folder, \
            mock.patch.dict(os.environ, GRADIO_TEMP_DIR=os.path.join(folder, 'uploads')):
        gr = _import_gradio()
        comparer = Comparer(segmenter, max_side)
        with listen(host, port) as listening:
            page = build_page(comparer, draw_examples(Path(folder)))
            fastapi, uvicorn = (importlib.import_module(name) for name in ('fastapi', 'uvicorn'))
            app = gr.mount_gradio_app(
                fastapi.FastAPI(openapi_url=None), page, '/', allowed_paths=[], show_error=False,
                max_file_size=round(max_upload * 2 ** 20), footer_links=[], run_history=False,
                ssr_mode=False, pwa=False, mcp_server=False, enable_monitoring=False,
                theme=gr.themes.Default(font=('system-ui', 'sans-serif'),
                                        font_mono=('ui-monospace', 'monospace')),
                css_paths=Path(__file__).with_name('page.css'))
            guarded = _refuse_strangers(app, {'localhost', '127.0.0.1', '::1', *(
                name.lower() for name in (host, socket.gethostname(), *names))})
            server = uvicorn.Server(uvicorn.Config(guarded, log_level='warning',
                                                   timeout_graceful_shutdown=2))
            address, number = listening.getsockname()[:2]
            if not address.startswith('127.') and address != '::1':
                print('Everyone who can reach this machine can use this page, without a password '
                      'and unencrypted; without --host only this machine can.')
                address = socket.gethostname() if address in ('0.0.0.0', '::') else address
            address = f'[{address}]' if ':' in address else address
            print(f'http://{address}:{number}   (Ctrl-C ends it)', flush=True)
            with suppress(KeyboardInterrupt):  # raised again after the server has ended
                server.run(sockets=[listening])


def _import_gradio() -> Any:
    """Import gradio, without its statistics and downloads."""
    os.environ['GRADIO_ANALYTICS_ENABLED'] = 'False'
    os.environ['HF_HUB_OFFLINE'] = '1'
    try:
        return importlib.import_module('gradio')
    except ImportError as error:
        raise ConfigError(f'the page needs gradio, which cannot be imported ({error}): '
                          f'{install_command("demo")}') from error


def _guard(gr: Any, page: Any, image: Any) -> None:
    """Refuse requests that name addresses, or files outside the folder of uploads.

    gradio checks that in apps that it launches itself, not in mounted ones. The image comes as it
    was uploaded: gradio would open it without the limits that hold here.
    """
    folder = Path(os.environ['GRADIO_TEMP_DIR']).resolve()

    def check(path: Any) -> str:
        if '://' in str(path) or folder not in Path(path).resolve().parents:
            raise gr.Error('this is not an uploaded image', print_exception=False)
        return str(path)

    def checked(move: Callable[[Any], Any]) -> Callable[[Any], Any]:
        async def move_checked(path: Any) -> str | None:
            return await move(None if path is None else check(path))
        return move_checked

    for block in page.blocks.values():
        block.async_move_resource_to_block_cache = checked(
            block.async_move_resource_to_block_cache)
    image.preprocess = lambda payload: payload and check(payload.path)


def _refuse_strangers(app: Any, names: set[str]) -> Any:
    """Return an ASGI app that answers requests to these names, and none from pages of other sites.
    """
    responses = importlib.import_module('fastapi.responses')

    async def guarded(scope: Any, receive: Any, send: Any) -> None:
        answer = app
        if scope['type'] != 'lifespan':
            headers = {name: value.decode('latin-1') for name, value in scope['headers']}
            problem = find_stranger(headers.get(b'host', ''), headers.get(b'origin'),
                                    {*names, scope['server'][0]})
            if problem:
                answer = responses.PlainTextResponse(problem, 403)
            elif scope['path'].endswith('/openapi.json'):
                answer = responses.PlainTextResponse('Not Found', 404)
        await answer(scope, receive, send)
    return guarded


def _nearest(slider: Any, value: Any) -> float:
    """Return the nearest number that a slider has; its lowest if the value was deleted."""
    if not isinstance(value or 0, (int, float)) or value != value:
        raise DataError(f'{slider.label}: give a number')
    return float(min(max(value or 0, slider.minimum), slider.maximum))


def _store(image: np.ndarray) -> str:
    """Write an image for the page, whole: gradio would write into a file while it is sent."""
    content = cv2.imencode('.jpg', image)[1].tobytes()
    path = Path(os.environ['GRADIO_TEMP_DIR'], f'{hashlib.sha256(content).hexdigest()}.jpg')
    write_file(path, content)
    return str(path)


def _introduce(comparer: Comparer) -> str:
    segmenter, threads = comparer.segmenter, torch.get_num_threads()
    device = torch.cuda.get_device_name(segmenter.device) if segmenter.device.type == 'cuda' else (
        f'CPU, {threads} thread{"s" * (threads != 1)}')
    return _fill('introduction', source=os.path.join(*Path(segmenter.source).parts[-2:]),
                 classes=len(segmenter.classes), device=device, max_side=comparer.max_side,
                 note=segmenter.note)


_ASK_SOON = '''() => {
  clearTimeout(window.edaSoon);
  window.edaSoon = setTimeout(() => document.querySelector('#eda-ask').click(), 100);
}'''
"""Asks once for what changes at once: gradio may answer two requests in the other order."""
