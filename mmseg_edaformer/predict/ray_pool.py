"""Running workers with Ray Data, so that it keeps quiet and fails early."""
import os
import pickle
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from ..compat import install_command
from ..errors import ConfigError, UserError
from .shards import last_line


def import_ray() -> None:
    """Import Ray Data with settings that keep it quiet."""
    for setting in ('USAGE_STATS_ENABLED=0', 'DATA_LOG_LEVEL=CRITICAL', 'BACKEND_LOG_LEVEL=fatal',
                    'ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0'):
        os.environ.setdefault(*f'RAY_{setting}'.split('='))
    try:
        import ray.data  # noqa: F401
    except ImportError as error:
        raise ConfigError(f'Ray Data is not installed here ({error}): '
                          f'{install_command("cluster")}') from error


@contextmanager
def connect(address: str | None, cores: int | None) -> Iterator[None]:
    """Connect this process, unless it is, to the Ray at an address, or to one of its own.

    ``cores`` are those of its own Ray, by default all.
    """
    import ray
    if ray.is_initialized() and address is None:
        yield
        return
    settings: dict[str, Any] = dict(logging_level='ERROR', log_to_driver=False)
    if address is None:
        settings.update(num_cpus=cores, include_dashboard=False,
                        object_store_memory=2 ** 28)  # bytes, for images of shards
    try:
        if address is not None and ':' in address:  # Ray would wait for minutes
            host, _, port = address.removeprefix('ray://').rpartition(':')
            socket.create_connection((host, int(port)), 10.).close()
        with _silent_stderr():
            ray.init(address or 'local', **settings)
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f'no Ray answers at {address} ({last_line(error)}): start one with "ray start --head", '
            'or leave --address out' if address is not None else
            f'Ray cannot be started here: {last_line(error)}') from error
    try:
        yield
    finally:
        ray.shutdown()


def count_workers(workers: int | None, threads: int) -> tuple[int, int]:
    """Return the number of workers, and of GPUs if they get one each."""
    import ray
    resources = ray.cluster_resources()
    cores, gpus = int(resources.get('CPU', 0)), int(resources.get('GPU', 0))
    most = min(gpus, cores // threads) if gpus else cores // threads
    if not most or (workers or 0) > most:
        raise ConfigError(f'Ray has {cores} cores and {gpus} GPUs, room for {most} workers with '
                          f'{threads} threads each{" and a GPU" if gpus else ""}: ask for fewer')
    return workers or most, gpus


def run_workers(items: Sequence[Any], expand: Callable[[Any], Iterable[Any]] | None, worker: type,
                arguments: tuple[Any, ...], *, batch_size: int, workers: int,
                **resources: Any) -> Iterator[Any]:
    """Have workers map items; yields their results in the order of the items.

    Objects of the class ``worker``, each in a process, take and return lists of items. ``expand``
    makes many items of one before, in tasks of its own. A UserError of either is raised here.
    """
    import pyarrow
    import ray
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.target_max_block_size = 2 ** 21  # bytes
    step = batch_size if expand is None else 1
    dataset = ray.data.from_blocks([
        pyarrow.table(dict(row=[*map(pickle.dumps, items[start:start + step])]))
        for start in range(0, len(items), step)])
    if expand is not None:  # without cores, for all of them belong to the workers
        dataset = dataset.flat_map(partial(_expand, expand), num_cpus=0)
    dataset = dataset.map_batches(
        _Worker, fn_constructor_args=(worker, *arguments), batch_size=batch_size,
        compute=ray.data.ActorPoolStrategy(size=workers), **resources)
    try:
        for batch in dataset.iter_batches(batch_size=None):
            for row in map(pickle.loads, batch['row']):
                if isinstance(row, UserError):
                    raise row
                yield row
    except ray.exceptions.RayTaskError:
        raise  # a bug, whose traceback a report needs
    except ray.exceptions.RayError as error:
        raise ConfigError(
            f'the workers cannot be started or were lost ({last_line(error)}). All machines need '
            'mmseg_edaformer with the extra cluster, of one version, and memory for the model. '
            'Run again to resume') from error


def _expand(expand: Callable[[Any], Iterable[Any]], row: dict[str, bytes]
            ) -> Iterator[dict[str, bytes]]:
    """Yield the rows of an item; Ray Data would lose the class of an error, so that it is a row."""
    try:
        for item in expand(pickle.loads(row['row'])):
            yield dict(row=pickle.dumps(item))
    except UserError as error:
        yield dict(row=pickle.dumps(error))


class _Worker:
    """A worker whose rows, of the one column ``row``, are pickled items."""

    def __init__(self, worker: type, *arguments: Any) -> None:
        self.worker = worker(*arguments)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        items = [*map(pickle.loads, batch['row'])]
        errors: list[Any] = [item for item in items if isinstance(item, UserError)][:1]
        try:
            results = errors or self.worker(items)
        except UserError as error:
            results = [error]
        return dict(row=[*map(pickle.dumps, results)])


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Silence what Ray's C++ prints about its own log level; its errors are raised."""
    stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(null)
