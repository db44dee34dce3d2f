"""A training loop whose steps depend on the seed and their number alone."""
import logging
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from mmengine.dist import broadcast, get_dist_info
from mmengine.logging import print_log
from mmengine.registry import LOOPS
from mmengine.runner import IterBasedTrainLoop, Runner
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Sampler

from ..errors import DataError

_ORDER, _SAMPLE, _STEP = range(3)  # what the random numbers are for
_LOADER_SETTINGS = ('num_workers', 'collate_fn', 'pin_memory', 'timeout', 'worker_init_fn',
                    'multiprocessing_context', 'generator', 'prefetch_factor',
                    'persistent_workers')


def seed_all(*key: int) -> None:
    """Seed Python, numpy and torch, on all devices, from numbers that name what follows."""
    first, second, *third = np.random.SeedSequence(key).generate_state(4).tolist()
    random.seed(first)
    np.random.seed(second)
    torch.manual_seed(third[0] << 32 | third[1])


class SeededIndices(list[int]):
    """The indices of a batch, which seed all generators before a worker reads each sample.

    So the augmentation of a sample depends on its number in the run, not on the worker.
    """

    def __init__(self, indices: Sequence[int], keys: Sequence[tuple[int, ...]]) -> None:
        super().__init__(indices)
        self.keys = keys

    def __iter__(self) -> Iterator[int]:
        for key, index in zip(self.keys, super().__iter__()):
            seed_all(*key)
            yield index

    def __reduce__(self) -> tuple[Any, ...]:
        return SeededIndices, (list(super().__iter__()), self.keys)


class CountedBatches(Sampler):
    """Repeats the batch sampler of a rank without end, from any batch on, and numbers the samples.

    The samples of the ranks alternate in the numbering. Starting at a later batch reads no data.
    """

    def __init__(self, batches: Sampler, rank: int, world_size: int) -> None:
        self.batches, self.rank, self.world_size = batches, rank, world_size
        self.seed = self.start = 0

    @property
    def sampler(self) -> Sampler | None:
        """The sampler of single images, which mmengine's hooks read."""
        return getattr(self.batches, 'sampler', None)

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[SeededIndices]:
        number = samples = epoch = 0
        sources: tuple[Any, ...] = self.batches, self.sampler
        for source in sources:
            if hasattr(source, 'seed'):
                source.seed = self.seed  # a resumed run was built with another seed
        while True:
            for source in sources:
                if hasattr(source, 'set_epoch'):
                    source.set_epoch(epoch)
            seed_all(self.seed, _ORDER, epoch)  # for samplers that draw from torch's generator
            before = number
            for indices in self.batches:
                if number >= self.start:
                    yield SeededIndices(indices, [
                        (self.seed, _SAMPLE, (samples + place) * self.world_size + self.rank)
                        for place in range(len(indices))])
                samples += len(indices)
                number += 1
            if number == before:
                raise DataError('the training set has fewer images than one batch: lower '
                                'train_dataloader.batch_size')
            epoch += 1


class CountedLoader(DataLoader):
    """A DataLoader of `CountedBatches`, whose workers start with the first batch that is drawn."""

    def __init__(self, loader: DataLoader, rank: int, world_size: int) -> None:
        self.samples_per_step = world_size * (
            getattr(loader.batch_sampler, 'batch_size', None) or 0)
        super().__init__(
            loader.dataset,
            batch_sampler=CountedBatches(loader.batch_sampler, rank, world_size),  # type: ignore
            **{name: getattr(loader, name) for name in _LOADER_SETTINGS})

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # mmengine makes the iterator before it knows where the run resumes.
        yield from super().__iter__()


@LOOPS.register_module()
class ExactTrainLoop(IterBasedTrainLoop):
    """mmengine's IterBasedTrainLoop, in which a resumed run equals one that was not interrupted.

    All random numbers of a step come from the run's seed and the step's number, those of a sample
    from the seed and the sample's number. So no state of generators has to be saved, a resumed run
    draws the same numbers with any number of workers, and no past batch is read again. A validation
    that was due when the run ended is made up for.

    A data set that can only be read from its start (IterableDataset) is replayed, as in mmengine.
    """

    def __init__(self, runner: Runner, dataloader: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(dataloader, dict):
            dataloader = runner.build_dataloader(
                dataloader, seed=runner.seed,
                diff_rank_seed=runner._randomness_cfg.get('diff_rank_seed', False))
        self.counted = not isinstance(dataloader.dataset, IterableDataset)
        if self.counted:
            dataloader = CountedLoader(dataloader, *get_dist_info())
        super().__init__(runner, dataloader, *args, **kwargs)
        self._resumed: dict[str, int] = {}

    def samples_after(self, iterations: int) -> int:
        """Return the number of samples that all ranks have drawn after so many iterations."""
        done = self._resumed.get('samples', 0)
        return done + (iterations - self._resumed.get('iter', 0)) * self.samples_per_step

    @property
    def samples_per_step(self) -> int:
        """Number of samples of one iteration, of all ranks; 0 where batches differ in size."""
        return self.dataloader.samples_per_step if self.counted else 0

    def resume_at(self, iterations: int, samples: int | None) -> None:
        """Resume the data after so many iterations, in which the run drew so many samples.

        ``samples`` tells of batches of another size; without it all batches count as equal.
        """
        if samples is None or not self.samples_per_step:
            samples = iterations * self.samples_per_step
        elif samples != iterations * self.samples_per_step:
            print_log(f'{self.samples_per_step} images per step now, {samples / iterations:g} '
                      f'before: the data continues after image {samples}', logger='current',
                      level=logging.WARNING)
        self._resumed = dict(iter=iterations, samples=samples)

    def run(self) -> nn.Module:
        runner, rank = self.runner, get_dist_info()[0]
        seed: int = runner.seed
        if runner._randomness_cfg.get('diff_rank_seed', False):
            seed -= rank  # the same on all ranks
        runner.call_hook('before_train')
        runner.call_hook('before_train_epoch')
        if self.counted:
            batches = self.dataloader.batch_sampler
            batches.seed = seed
            batches.start = (self.samples_after(self._iter) // self.samples_per_step
                             if self.samples_per_step else self._iter)
        else:
            for _ in range(self._iter):
                next(self.dataloader_iterator)
        if self._iter:
            self._validate(unless=runner.message_hub.runtime_info.get('iter_of_validation'))
        while self._iter < self._max_iters and not self.stop_training:
            runner.model.train()
            data_batch = next(self.dataloader_iterator)
            seed_all(seed, _STEP, self._iter, rank)
            self.run_iter(data_batch)
            self._validate()
        # End the workers here: the garbage collector would wait for each in vain.
        self.dataloader_iterator._iterator = self.dataloader._iterator = None
        runner.call_hook('after_train_epoch')
        runner.call_hook('after_train')
        return runner.model

    def _validate(self, unless: int | None = None) -> None:
        """Validate if it is due, except after the iteration ``unless``."""
        self._decide_current_val_interval()
        if (self.runner.val_loop is not None and self._iter >= self.val_begin and
                self._iter != unless and
                (self._iter % self.val_interval == 0 or self._iter == self._max_iters)):
            # Without SyncBN, ranks have batch statistics of their own; those of rank 0 are saved.
            for buffer in self.runner.model.buffers():
                broadcast(buffer)
            self.runner.val_loop.run()
