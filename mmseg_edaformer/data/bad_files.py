"""Continuing without the files that cannot be read, and listing them."""
import copy
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dist import barrier, is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ..errors import ConfigError, DataError

_IN_A_ROW = 100  # this many unreadable files one after the other suggest a broken disk or path

# Transforms that read files, and the class that can skip them.
_LOADERS = {'LoadImageFromFile': 'LoadSegImage', 'LoadSegImage': 'LoadSegImage',
            'LoadAnnotations': 'LoadSegLabels', 'LoadSegLabels': 'LoadSegLabels'}
_SHOWN = 10
_SHARE = 0.1  # largest share of bad samples, once 100 were drawn
_INTERVAL = 50  # iterations between two looks at the list


class SkipList:
    """A text file of bad files, to which any number of processes append.

    A line is the file's path, a tab, and the reason. One write per line keeps lines whole. A
    process lists a file once, however often it is drawn; several processes may list the same one.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.listed: set[str] = set()
        self.in_a_row = 0

    def add(self, file: str, error: DataError) -> None:
        """List a file.

        Raises:
            DataError: A hundred files were bad, and none was good in between.
        """
        self.in_a_row += 1
        if file not in self.listed:
            self.listed.add(file)
            line = '\t'.join(' '.join(part.split()) for part in (file, str(error))) + '\n'
            Path(self.path).parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, 'ab', buffering=0) as listing:
                listing.write(os.fsencode(line))
        if self.in_a_row >= _IN_A_ROW:
            raise DataError(f'{self.in_a_row} files in a row could not be read, which suggests a '
                            f'broken disk or path: see {self.path}. The last: {error}')


def skip_bad_files(cfg: Config, work_dir: str, run: str = 'train') -> None:
    """Let a run continue where an image or a mask cannot be read.

    In training another sample is drawn in its place. In validation and test a blank image without
    labels takes its place, so that the sample counts for nothing in the IoU and all processes keep
    their number of samples. Call it after all other changes of the config.

    Args:
        cfg: The config of the run, changed in place.
        work_dir: Folder for the list of skipped files.
        run: Name of the run; the list is ``skipped_<run>.txt``.

    Raises:
        ConfigError: Predictions are written or painted, and a blank image would be among them.
    """
    for evaluators in (cfg.get('val_evaluator'), cfg.get('test_evaluator')):
        for evaluator in evaluators if isinstance(evaluators, Sequence) else [evaluators or {}]:
            if evaluator.get('output_dir'):
                raise ConfigError('--skip-bad-files and --out (output_dir of an evaluator) do not '
                                  'go together: a label map would be written for a skipped image. '
                                  'Fix or remove the bad files, or leave one of the two out')
    if ((cfg.get('default_hooks') or {}).get('visualization') or {}).get('draw'):
        raise ConfigError('--skip-bad-files and --show or --show-dir do not go together: a '
                          'skipped image cannot be painted. Leave one of the two out')
    path = os.path.join(work_dir, f'skipped_{run}.txt')
    for name in ('train_dataloader', 'val_dataloader', 'test_dataloader', 'tta_pipeline'):
        part = copy.deepcopy(cfg.get(name))  # configs share pipelines and whole dataloaders
        for step in _loaders(part):
            step.update(type=_LOADERS[step['type']], skip_list=path,
                        blank=name != 'train_dataloader')
        if part is not None:
            cfg[name] = part
    cfg.custom_hooks = [hook for hook in cfg.get('custom_hooks') or []
                        if hook['type'] != 'SkippedFilesHook'] + [
                            dict(type='SkippedFilesHook', skip_list=path)]


def _loaders(part: Any) -> Iterator[Any]:
    """Yield the steps of pipelines that read files, at any depth of a config."""
    if isinstance(part, dict):
        if part.get('type') in _LOADERS:
            yield part
        part = [*part.values()]
    if isinstance(part, (list, tuple)):
        for value in part:
            yield from _loaders(value)


@HOOKS.register_module()
class SkippedFilesHook(Hook):
    """Logs the files that are skipped, and stops a run that skips too many.

    A new run starts a new list, a resumed one continues its own.

    Args:
        skip_list: Text file that the transforms write, see `SkipList`.

    Raises:
        DataError: More than a tenth of the samples are bad.
    """

    def __init__(self, skip_list: str) -> None:
        self.skip_list = skip_list
        self.files: dict[str, str] = {}
        self.earlier = self.samples = 0

    def before_run(self, runner: Runner) -> None:
        """Start the list, before any process reads a file."""
        if is_main_process():
            if runner.cfg.get('resume'):
                self._read()
                self.earlier = len(self.files)
            else:
                Path(self.skip_list).unlink(missing_ok=True)
        barrier()

    def _after_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None,
                    outputs: Any = None, mode: str = 'train') -> None:
        images = data_batch['inputs']
        if isinstance(images[0], (list, tuple)):  # test-time augmentation: views of a batch
            images = images[0]
        self.samples += len(images) * runner.world_size
        if self.every_n_inner_iters(batch_idx, _INTERVAL):
            self._log_new(runner)

    def after_train(self, runner: Runner) -> None:
        """Log how many files were skipped."""
        self._log_new(runner)
        if self.files:
            runner.logger.warning(
                f'{len(self.files)} file{"s were" if len(self.files) > 1 else " was"} skipped, '
                f'listed in {self.skip_list}')

    after_test = after_train

    def _log_new(self, runner: Runner) -> None:
        if not is_main_process():
            return
        new = self._read()
        for reason in new[:_SHOWN]:
            runner.logger.warning(f'skipped: {reason}')
        if len(new) > _SHOWN:
            runner.logger.warning(f'skipped: {len(new) - _SHOWN} more, see {self.skip_list}')
        bad = len(self.files) - self.earlier
        if self.samples >= 100 and bad > _SHARE * self.samples:
            raise DataError(f'{bad} files were skipped in {self.samples} samples, more than '
                            f'{_SHARE:.0%}: see {self.skip_list}, and check the disk and the '
                            'paths of the config')

    after_val = _log_new

    def _read(self) -> list[str]:
        """Return the reasons of the files that are new in the list."""
        path = Path(self.skip_list)
        content = path.read_bytes() if path.is_file() else b''
        lines = content[:content.rfind(b'\n') + 1].splitlines()
        listed = dict(os.fsdecode(line).split('\t', 1) for line in lines)
        new = {file: reason for file, reason in listed.items() if file not in self.files}
        self.files.update(new)
        return list(new.values())
