"""Serve a model over HTTP with Ray Serve; the ratio follows the queue, so that answers are in time.

`config` says what to serve, and is what ``serve deploy`` reads; `run` serves it from this process.
"""
import logging
import os
import re
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ..compat import install_command
from ..errors import ConfigError
from ..listening import listen
from ..predict.ray_pool import connect, count_workers, import_ray

NAME = 'edaformer'
"""The application's name in Ray Serve."""

_MANY = 10 ** 4  # requests that Ray Serve passes on; `Front` limits them
_DRAIN = 30.  # seconds for the last answers


def config(model: Mapping[str, Any], policy: Mapping[str, Any], *,
           replicas: tuple[int, int] = (1, 1), threads: int = 1, host: str = '127.0.0.1',
           port: int = 8000, allow_host: Sequence[str] = (), token_file: str | None = None,
           max_upload: float = 20., in_flight: int = 64) -> dict[str, Any]:
    """Return what ``serve deploy`` reads, as YAML.

    Args:
        model: Arguments of `Segmenter`.
        policy: Those of `Policy`.
        replicas: Least and most of them; if they differ, Ray Serve chooses by the queues.
        threads: Cores of each replica.
        host, port: Where to listen.
        allow_host: Further names of this server.
        token_file: A file with the token that requests need.
        max_upload: Largest body in megabytes.
        in_flight: Most requests at once, times the most replicas.

    Raises:
        UserError: The policy makes no sense.
    """
    from ..isr import ISRRatio
    from .messages import Policy
    for ratio in Policy(**policy).isr_ratio:
        ISRRatio.parse(ratio)
    least, most = replicas
    number: dict[str, Any] = dict(num_replicas=least) if least == most else dict(
        autoscaling_config=dict(min_replicas=least, max_replicas=most, target_ongoing_requests=2))
    front = dict(hosts=[*dict.fromkeys([host, 'localhost', '127.0.0.1', *allow_host])],
                 token_file=token_file, max_upload=max_upload, in_flight=most * in_flight)
    changed = [os.path.getmtime(path) for path in (model['model'], model.get('checkpoint'))
               if path is not None and os.path.exists(path)]  # new weights are another config
    return dict(
        proxy_location='EveryNode', http_options=dict(host=host, port=port),
        applications=[dict(
            name=NAME, route_prefix='/', import_path=f'{__name__}:application',
            args=dict(model=dict(model), threads=threads, changed=changed),
            deployments=[dict(name='Replica', user_config=dict(policy), **number),
                         dict(name='Front', user_config=front)])])


def application(args: dict[str, Any]) -> Any:
    """Return the application of a `config` for Ray Serve, from its ``args``."""
    import ray
    from ray import serve

    from .front import Front
    model, threads, gpus = dict(args['model']), args['threads'], ray.cluster_resources().get('GPU')
    asked = str(model.get('device') or ('cuda' if gpus else 'cpu'))
    if asked != 'cpu' and not gpus:
        raise ConfigError(f'--device {asked}: Ray has no GPU here')
    model['device'] = asked.partition(':')[0]  # Ray gives each replica one of its own
    common: dict[str, Any] = dict(
        max_ongoing_requests=_MANY, graceful_shutdown_timeout_s=_DRAIN,
        graceful_shutdown_wait_loop_s=0.2, health_check_period_s=2.)
    replicas = serve.deployment(name='Replica', **common, ray_actor_options=dict(
        num_cpus=threads, num_gpus=int(asked != 'cpu')))
    front = serve.deployment(
        serve.ingress()(Front), name='Front', ray_actor_options=dict(num_cpus=0), **common)
    # By name, since importing it takes seconds, which only replicas need to spend.
    return front.bind(replicas(f'{__name__}.replica.Replica').bind(model, threads))


def run(settings: dict[str, Any], address: str | None = None) -> None:
    """Serve a `config` until SIGINT or SIGTERM, and then answer those that wait.

    With the ``address`` of a running Ray, it is deployed there in place of what this project serves
    there already, and goes on after this call.

    Raises:
        ConfigError: Ray Serve or the model cannot be started.
    """
    with started(settings, address):
        if address is None:
            stop = threading.Event()
            for number in signal.SIGINT, signal.SIGTERM:  # in place of Ray's own handlers
                signal.signal(number, lambda *_: stop.set())
            print('http://{host}:{port}/docs   (Ctrl-C ends it)'.format(
                **settings['http_options']), flush=True)
            stop.wait()


@contextmanager
def started(settings: dict[str, Any], address: str | None = None) -> Iterator[None]:
    """Serve a `config` meanwhile; at an ``address`` for longer."""
    import_ray()
    try:
        from ray import serve
    except ImportError as error:
        raise ConfigError(f'Ray Serve is not installed here ({error}): {install_command("serve")}'
                          ) from error
    os.environ.setdefault('RAY_worker_niceness', '0')  # 15 is for work that can wait
    logging.getLogger('ray.serve').setLevel(logging.WARNING)
    if address is None:
        listen(**settings['http_options']).close()  # which fails at once if others do
    app = settings['applications'][0]
    options = app['deployments'][0]
    with connect(address, None):
        count_workers(options.get('num_replicas') or options['autoscaling_config']['max_replicas'],
                      app['args']['threads'])
        serve.start(proxy_location=settings['proxy_location'],
                    http_options=settings['http_options'])
        try:
            deploy(settings)
            yield
        finally:
            if address is None:
                serve.delete(NAME)  # after the last answers


def deploy(settings: dict[str, Any]) -> None:
    """Serve a `config` in place of what is served there, with no more restarts than it needs."""
    from ray import serve
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    if others := {*serve.status().applications} - {NAME}:
        raise ConfigError(f'Ray serves {", ".join(others)} there, which this would end: add the '
                          'application of --yaml to their file')
    # As the command ``serve run FILE``; the function serve.run restarts all replicas each time.
    _get_global_client().deploy_apps(ServeDeploySchema.model_validate(settings))
    while (app := serve.status().applications[NAME]).status != 'RUNNING':
        if 'FAILED' in app.status or app.status == 'UNHEALTHY':
            text = '\n'.join([app.message, *(one.message for one in app.deployments.values())])
            found = re.findall(r'errors\.\w+: (.+)', text) or text.strip().splitlines()
            raise ConfigError(f'the model cannot be served: {found[-1]}')
        time.sleep(0.1)
