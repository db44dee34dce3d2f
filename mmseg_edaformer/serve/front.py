"""The HTTP side of the server: it checks requests, hands them to a replica and counts."""
import asyncio
import hmac
import math
import time
from collections.abc import AsyncGenerator, Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.formparsers import MultiPartException, MultiPartParser

from ..errors import ConfigError
from .messages import Answer, Wish

_OPEN = '/healthz', '/readyz'  # which need no token
_RECEIVING = 10.  # seconds for a whole request to come in
_BUCKETS = tuple(0.005 * 2 ** step for step in range(12))


class Front:
    """The routes, see docs/serve.md.

    Args:
        replicas: Handle of the deployment of `Replica`.
        hosts: Names by which the server may be reached, all if there are none.
        token_file: A file with the token that requests need.
        body_mb: Largest body in megabytes.
    """

    def __init__(self, replicas: DeploymentHandle, hosts: tuple[str, ...] = (),
                 token_file: str | None = None, body_mb: float = 20.) -> None:
        self.replicas, self.hosts, self.most = replicas, {*map(str.lower, hosts)}, body_mb * 2 ** 20
        self.token = Path(token_file).read_text().strip() if token_file else ''
        if token_file and not self.token:
            raise ConfigError(f'{token_file} is empty: write the token into it')
        self.registry = CollectorRegistry()
        self.requests = Counter('edaformer_requests', 'Requests', ['status', 'isr_ratio'],
                                registry=self.registry)
        self.retries = Counter('edaformer_retries', 'Requests whose replica died',
                               registry=self.registry)
        self.seconds = Histogram('edaformer_seconds', 'Time of requests', ['part'],
                                 registry=self.registry, buckets=_BUCKETS)

    def __serve_build_asgi_app__(self) -> FastAPI:  # which Ray Serve asks for
        app = FastAPI(title='mmseg_edaformer', version=version('mmseg_edaformer'))
        app.middleware('http')(self._guard)
        for error in AnyHTTPException, RequestValidationError, Exception:
            app.exception_handler(error)(_tell)
        app.post('/segment', responses={200: dict(content={'image/png': {}})},
                 response_model=None, openapi_extra=dict(requestBody=dict(
                     required=True, content={'image/*': dict(schema=dict(
                         type='string', format='binary'))})))(self.segment)
        for route in self.healthz, self.readyz, self.model, self.metrics:
            app.get(f'/{route.__name__}', response_model=None)(route)
        return app

    async def segment(
            self, request: Request,
            isr_ratio: Annotated[str | None, Query(max_length=60)] = None,
            query_ratio: Annotated[str | None, Query(max_length=60)] = None,
            max_side: Annotated[int | None, Query(ge=32)] = None,
            deadline_ms: Annotated[float | None, Query(gt=0, le=3.6e6)] = None,
            rle: bool = False) -> Response:
        """Predict an image: its body, or the first file of a form.

        The answer is a PNG whose pixels are class indices, in the colours of the classes; with
        `Accept: application/json` it is the share of each class, and with `rle=true` also its mask
        as runs (COCO's uncompressed RLE).
        """
        start = time.monotonic()
        try:
            async with asyncio.timeout(_RECEIVING):
                body = await self._read(request)
        except TimeoutError:
            raise HTTPException(408, f'the request took more than {_RECEIVING:g} s to come in'
                                ) from None
        json = 'application/json' in request.headers.get('accept', '')
        if rle and not json:
            raise HTTPException(406, 'rle=true is for JSON: send Accept: application/json')
        wish = Wish(isr_ratio, query_ratio, max_side, deadline_ms, json, rle)
        try:
            answer: Answer = await self.replicas.segment.remote(
                body, wish, time.monotonic() - start)
        except RayActorError:  # it died meanwhile: another one is asked, once
            self.retries.inc()
            answer = await self.replicas.segment.remote(body, wish, time.monotonic() - start)
        self.requests.labels(answer.status, answer.isr_ratio).inc()
        if answer.status != 200:
            return _problem(answer.status, str(answer.content), answer.wait)
        times = dict(queue=answer.queue, compute=answer.compute, total=time.monotonic() - start)
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
        except (TimeoutError, RayActorError):
            return _problem(503, 'no replica answers yet', 1.)
        return JSONResponse(dict(status='ok'))

    async def model(self) -> dict[str, Any]:
        """Describe the model: its classes, and what ratios cost on one of the replicas."""
        described: dict[str, Any] = await self.replicas.describe.remote()
        return described

    async def metrics(self) -> Response:
        """Give counts and times to Prometheus."""
        return Response(generate_latest(self.registry), media_type='text/plain; version=0.0.4')

    async def _read(self, request: Request) -> bytes:
        """Return the image in a request's body, of which no more than allowed is read."""
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > self.most:
                raise HTTPException(413, f'the request has more than {self.most / 2 ** 20:g} MB')
        if not request.headers.get('content-type', '').startswith('multipart/form-data'):
            return bytes(body)

        async def stream() -> AsyncGenerator[bytes, None]:
            yield bytes(body)

        try:
            form = await MultiPartParser(request.headers, stream(), max_files=1, max_fields=10,
                                         max_part_size=2 ** 16).parse()
        except MultiPartException as error:
            raise HTTPException(400, f'the form cannot be read: {error.message}') from error
        for value in form.values():
            if not isinstance(value, str):
                return await value.read()
        raise HTTPException(400, 'the form holds no file: send the image as one')

    async def _guard(self, request: Request, proceed: Callable[[Request], Any]) -> Response:
        """Refuse other host names, so that no web page can reach the server, and wrong tokens."""
        if self.hosts and (request.url.hostname or '').lower() not in self.hosts:
            return _problem(421, 'this server is not known by this host name: start it with '
                            '--allow-host NAME')
        scheme, _, token = request.headers.get('authorization', '').partition(' ')
        if self.token and request.url.path not in _OPEN and not (
                scheme.lower() == 'bearer' and hmac.compare_digest(
                    token.encode(), self.token.encode())):
            return _problem(401, 'this server needs a token: send Authorization: Bearer TOKEN')
        response: Response = await proceed(request)
        return response


def _problem(status: int, message: str, wait: float | None = None) -> JSONResponse:
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
