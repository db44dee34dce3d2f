"""The HTTP side of the server: it checks requests, hands them to a replica and counts."""
import asyncio
import hmac
import logging
import math
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from ray.exceptions import RayActorError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.requests import ClientDisconnect

from ..errors import ConfigError
from ..listening import find_stranger
from .messages import Answer, Wish

_OPEN = '/healthz', '/readyz'  # which need no token
_RECEIVING, _ANSWERING = 10., 300.  # seconds
_LOG = logging.getLogger('ray.serve')
_BUCKETS = tuple(0.005 * 2 ** step for step in range(12))


class Front:
    """The routes, see docs/serve.md.

    Args:
        replicas: Handle of the deployment of `Replica`.
    """

    def __init__(self, replicas: DeploymentHandle) -> None:
        self.replicas, self.held = replicas, 0
        self.hosts: set[str] = set()
        self.registry = CollectorRegistry()
        self.requests = Counter('edaformer_requests', 'Requests for a mask', [
            'status', 'isr_ratio'], registry=self.registry)
        self.retries = Counter('edaformer_retries', 'Requests whose replica died',
                               registry=self.registry)
        self.seconds = Histogram('edaformer_seconds', 'Time of answers', ['part'],
                                 registry=self.registry, buckets=_BUCKETS)

    def reconfigure(self, settings: dict[str, Any]) -> None:
        """Take ``hosts``, ``token_file``, ``max_upload`` and ``in_flight`` of `serve.config`.

        Like `Replica`, a running one keeps what it has if they are wrong.
        """
        try:
            path, token = settings['token_file'], ''
            if path is not None:
                token = Path(path).read_text().strip()
                if not token:
                    raise ConfigError(f'{path} is empty: write the token into it')
        except (ConfigError, OSError) as error:
            if not self.hosts:
                raise
            _LOG.error('the new settings are not taken: %s', error)
            return
        self.token, self.hosts = token, {*map(str.lower, settings['hosts'])}
        self.most, self.in_flight = settings['max_upload'] * 2 ** 20, settings['in_flight']

    def __serve_build_asgi_app__(self) -> FastAPI:  # which Ray Serve asks for
        app = FastAPI(title='mmseg_edaformer', version=version('mmseg_edaformer'))
        app.middleware('http')(self._guard)
        for error in AnyHTTPException, RequestValidationError, Exception:
            app.exception_handler(error)(_tell)
        content = {'image/*': dict(schema=dict(type='string', format='binary'))}
        app.post('/segment', responses={200: dict(content={'image/png': {}})}, response_model=None,
                 openapi_extra=dict(requestBody=dict(required=True, content=content))
                 )(self.segment)
        for route in self.healthz, self.readyz, self.model, self.metrics:
            app.get(f'/{route.__name__}', response_model=None)(route)
        return app

    async def segment(self, request: Request, wish: Annotated[Wish, Query()]) -> Response:
        """Predict an image: the body, or the one file of a form.

        The answer is a PNG whose pixels are class indices, in the colours of the classes; with
        `Accept: application/json` it is the share of each class, and with `rle=true` also its mask
        as runs (COCO's uncompressed RLE).
        """
        since = time.time()
        figures = 'application/json' in request.headers.get('accept', '')
        if wish.rle and not figures:
            raise HTTPException(406, 'rle=true is for JSON: send Accept: application/json')
        if self.held >= self.in_flight:
            return _problem(503, 'too many requests: ask again later', 1.)
        self.held += 1
        try:
            async with asyncio.timeout(_RECEIVING):
                body = await self._read(request)
            async with asyncio.timeout(_ANSWERING):
                answer = await self._ask(body, wish, figures, since)
        except TimeoutError:
            raise HTTPException(408, f'the request took more than {_RECEIVING:g} s to come in, or '
                                f'its answer more than {_ANSWERING:g} s') from None
        finally:
            self.held -= 1
        if answer.status != 200:
            return _problem(answer.status, str(answer.content), answer.wait)
        times = dict(queue=answer.queue, compute=answer.compute, total=time.time() - since)
        for part, seconds in times.items():
            self.seconds.labels(part).observe(seconds)
        headers = {'ISR-Ratio': answer.isr_ratio, 'Server-Timing': ', '.join(
            f'{part};dur={1e3 * seconds:.1f}' for part, seconds in times.items())}
        if isinstance(answer.content, bytes):
            return Response(answer.content, media_type='image/png', headers=headers)
        return JSONResponse(answer.content, headers=headers)

    async def healthz(self) -> dict[str, str]:
        """Say that the server runs."""
        return dict(status='ok')

    async def readyz(self) -> Response:
        """Say whether a replica answers."""
        try:
            async with asyncio.timeout(2.):
                await self.model()
        except (TimeoutError, RayActorError, RayServeException):
            return _problem(503, 'no replica answers', 1.)
        return JSONResponse(dict(status='ok'))

    async def model(self) -> dict[str, Any]:
        """Describe the model: its classes, and what ratios cost on one of the replicas."""
        described: dict[str, Any] = await self.replicas.describe.remote()
        return described

    async def metrics(self) -> Response:
        """Give counts and times to Prometheus."""
        return Response(generate_latest(self.registry), media_type='text/plain; version=0.0.4')

    async def _ask(self, *question: Any) -> Answer:
        """Ask a replica, and another one if it dies meanwhile, once."""
        for _ in range(2):
            try:
                answer: Answer = await self.replicas.segment.remote(*question)
                return answer
            except RayActorError:
                self.retries.inc()
            except RayServeException:
                break
        return Answer(503, 'no replica answers: ask again later', wait=1.)

    async def _read(self, request: Request) -> bytes:
        """Return the image in a request, of which no more than allowed is read."""
        size = 0

        async def receive() -> Any:
            nonlocal size
            message = await request.receive()
            size += len(message.get('body', b''))
            if size > self.most:
                raise HTTPException(413, f'the request has more than {self.most / 2 ** 20:g} MB')
            return message

        limited = Request(request.scope, receive)
        if not request.headers.get('content-type', '').startswith('multipart/form-data'):
            return await limited.body()
        async with limited.form(max_files=1, max_fields=10) as form:
            for value in form.values():
                if not isinstance(value, str):
                    return await value.read()
        raise HTTPException(400, 'the form holds no file: send the image as one')

    async def _guard(self, request: Request, proceed: Callable[[Request], Any]) -> Response:
        """Refuse other host names, pages of other sites and wrong tokens; count the requests."""
        scheme, _, token = request.headers.get('authorization', '').partition(' ')
        stranger = find_stranger(request.headers.get('host', ''), request.headers.get('origin'),
                                 self.hosts)
        if stranger:
            response = _problem(421, stranger)
        elif self.token and request.url.path not in _OPEN and not (
                scheme.lower() == 'bearer' and hmac.compare_digest(
                    token.encode(), self.token.encode())):
            response = _problem(401, 'this server needs a token: send Authorization: Bearer TOKEN')
            response.headers['WWW-Authenticate'] = 'Bearer'
        else:
            try:
                response = await proceed(request)
            except ClientDisconnect:
                response = Response(status_code=499)
            except Exception:
                self._count(request, 500)
                raise
        self._count(request, response.status_code, response.headers.get('isr-ratio', ''))
        return response

    def _count(self, request: Request, status: int, ratio: str = '') -> None:
        if request.url.path == '/segment':
            self.requests.labels(status, ratio).inc()


def _problem(status: int, message: str, wait: float | None = None) -> Response:
    """Return an error in the one shape that all have."""
    return JSONResponse(dict(error=dict(status=status, message=message)), status,
                        None if wait is None else {'Retry-After': str(math.ceil(wait))})


async def _tell(_: Request, error: Any) -> Response:
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        return _problem(422, f'{first["loc"][-1]}: {first["msg"]}')
    if isinstance(error, AnyHTTPException):
        return _problem(error.status_code, str(error.detail))
    return _problem(500, 'a defect of the server, of which its log says more')
