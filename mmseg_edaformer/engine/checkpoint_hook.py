"""Checkpoints that survive kills, full disks and moved folders.

mmengine writes in place and removes the old checkpoint first, so a kill can leave neither.
"""
import logging
import math
import os
import re
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.logging import print_log
from mmengine.registry import HOOKS, VISBACKENDS
from mmengine.runner import Runner
from mmengine.visualization import LocalVisBackend

from .. import __version__
from ..errors import CheckpointError, shown
from ..files import remove_partial_files, write_file
from .checkpoint_loading import CHECKPOINT_FORMAT, load_from_file


class SafeLocalBackend(LocalBackend):
    """mmengine's backend of local files, which writes a file whole or not at all."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        write_file(filepath, obj)

    def put_text(self, obj: str, filepath: str | Path, encoding: str = 'utf-8') -> None:
        write_file(filepath, obj.encode(encoding))


register_backend('safe_local', SafeLocalBackend)


@HOOKS.register_module()
class SafeCheckpointHook(CheckpointHook):
    """mmengine's CheckpointHook, which removes a checkpoint only after its successor is written.

    ``last_checkpoint`` holds a path relative to the work dir, so a work dir can be moved. When the
    disk is full, the run logs it, keeps the old checkpoint and tries again at the next interval.
    """

    keep_ckpt_ids: deque[int]
    backend_args: dict[str, Any] | None

    def before_train(self, runner: Runner) -> None:
        """Find the checkpoints of a resumed run, wherever its folder lies now."""
        if '://' not in str(self.out_dir or runner.work_dir):
            self.backend_args = self.backend_args or dict(backend='safe_local')
        super().before_train(runner)
        if is_main_process() and '://' not in self.out_dir:
            remove_partial_files(self.out_dir)
        self._best = {key: self._rebase(path) for key, path in self._best.items()}
        if runner.iter:  # a validation made up for may save a best one, which it has to record
            step = runner.epoch if self.by_epoch else runner.iter
            last = self._path(self.filename_tmpl.format(step))
            self.last_ckpt = last if self.file_backend.exists(last) else None

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Record the format, the version, and how many samples the run has drawn."""
        meta = checkpoint['meta']
        meta['mmseg_edaformer'] = dict(format=CHECKPOINT_FORMAT, version=__version__)
        samples_after = getattr(runner.train_loop, 'samples_after', None)
        if samples_after is not None:
            meta['mmseg_edaformer']['samples'] = samples_after(meta['iter'])

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Tell the loop where a resumed run takes up the data."""
        resume_at = getattr(runner._train_loop, 'resume_at', None)
        if runner._resume and resume_at is not None:
            meta = checkpoint['meta']
            resume_at(meta['iter'], meta.get('mmseg_edaformer', {}).get('samples'))

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float]) -> None:
        """Save the best checkpoint, and record that this validation is done."""
        runner.message_hub.update_info('iter_of_validation', runner.iter)
        super().after_val_epoch(runner, metrics)

    def save_now(self, runner: Runner, iterations: int) -> bool:
        """Save outside of the interval, unless the checkpoint of this iteration is saved already.

        Returns:
            Whether a run resumes from here; one that counts epochs resumes from the last epoch.
        """
        if self.by_epoch:
            return False
        name = self.filename_tmpl.format(iterations)
        if self.last_ckpt != self._path(name) and not self._save(
                runner, iterations, dict(epoch=runner.epoch, iter=iterations)):
            raise CheckpointError(f'{name} could not be written to {self.out_dir}; '
                                  f'{self._kept()}')
        return True

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict[str, Any]) -> None:
        if not self._save(runner, step, meta) and (
                step == (runner.max_epochs if self.by_epoch else runner.max_iters)):
            raise CheckpointError(
                f'the last checkpoint of this training could not be written to {self.out_dir}: '
                f'make room, or make it writable, and run it again with --resume; {self._kept()}')

    def _save(self, runner: Runner, step: int, meta: dict[str, Any]) -> bool:
        """Write the checkpoint of a step, then remove those that it replaces."""
        hub, name = runner.message_hub, self.filename_tmpl.format(step)
        kept = [old for old in self.keep_ckpt_ids if old != step] if self.max_keep_ckpts > 0 else []
        kept.append(step)
        # The list still holds what is about to be removed, so a run killed now can remove it later.
        hub.update_info('keep_ckpt_ids', kept)
        hub.update_info('last_ckpt', self._path(name))
        try:
            runner.save_checkpoint(
                self.out_dir, name, self.file_client_args, save_optimizer=self.save_optimizer,
                save_param_scheduler=self.save_param_scheduler, meta=meta, by_epoch=self.by_epoch,
                backend_args=self.backend_args, **self.args)
            path = self._path(name)
            if is_main_process():
                write_file(Path(runner.work_dir) / 'last_checkpoint',
                           path if '://' in path else os.path.relpath(path, runner.work_dir))
        except OSError as error:
            self._warn(runner, name, error)
            return False
        self.last_ckpt = path
        if self.max_keep_ckpts > 0:
            for old in kept[:-self.max_keep_ckpts]:
                self._remove(self._path(self.filename_tmpl.format(old)))
            self.keep_ckpt_ids = deque(kept[-self.max_keep_ckpts:], self.max_keep_ckpts)
            hub.update_info('keep_ckpt_ids', list(self.keep_ckpt_ids))
        return True

    def _save_best_checkpoint(self, runner: Runner, metrics: dict[str, float]) -> None:
        if not self.save_best:
            return
        before, hub = self._best, runner.message_hub.runtime_info
        info = dict(hub)
        self._best = dict.fromkeys(before)  # mmengine then removes nothing beforehand
        try:
            super()._save_best_checkpoint(runner, metrics)
        except OSError as error:
            self._warn(runner, 'the best checkpoint', error)
            hub.clear()
            hub.update(info)
            self._best = before
            return
        after = self._best
        self._best = {key: after[key] or path for key, path in before.items()}
        for key, path in before.items():
            if path and after[key] and path != after[key]:
                self._remove(path)

    @property
    def _best(self) -> dict[str, str | None]:
        if not self.save_best:
            return {}
        if len(self.key_indicators) == 1:
            return {'': self.best_ckpt_path}
        return {key: self.best_ckpt_path_dict.get(key) for key in self.key_indicators}

    @_best.setter
    def _best(self, paths: dict[str, str | None]) -> None:
        if '' in paths:
            self.best_ckpt_path = paths['']
        elif paths:
            self.best_ckpt_path_dict = paths

    def _rebase(self, path: str | None) -> str | None:
        name = re.split(r'[/\\]', path)[-1] if path else ''
        return self._path(name) if name.startswith('best_') else None

    def _path(self, name: str) -> str:
        return self.file_backend.join_path(self.out_dir, name)

    def _remove(self, path: str) -> None:
        if not is_main_process():
            return
        try:
            if self.file_backend.isfile(path):
                self.file_backend.remove(path)
            elif self.file_backend.isdir(path):  # DeepSpeed's are folders
                self.file_backend.rmtree(path)
        except OSError as error:
            print_log(f'{path} is no longer needed, but cannot be removed: {error}',
                      logger='current', level=logging.WARNING)

    def _kept(self) -> str:
        return f'{self.last_ckpt} is kept' if self.last_ckpt else 'there is no earlier one'

    def _warn(self, runner: Runner, name: str, error: OSError) -> None:
        runner.logger.error(
            f'{name} could not be written to {self.out_dir}: {error.strerror or error}. '
            f'{self._kept()}; the run continues and tries again at the next interval. Make room '
            'meanwhile, or make the folder writable')


@VISBACKENDS.register_module()
class SafeLocalVisBackend(LocalVisBackend):
    """mmengine's LocalVisBackend, which logs that it cannot write where mmengine's ends the run."""

    _failed = False

    def _dump(self, value_dict: dict[str, Any], file_path: str, file_format: str) -> None:
        try:
            super()._dump(value_dict, file_path, file_format)
            self._failed = False
        except OSError as error:
            if not self._failed:  # once, not at every interval
                print_log(f'Figures are lost, {file_path} cannot be written: '
                          f'{error.strerror or error}', logger='current', level=logging.ERROR)
            self._failed = True


def find_checkpoint(work_dir: str | Path, since: float = 0.) -> str | None:
    """Return the newest checkpoint of a run that loads and can be resumed, or None.

    It skips what does not load, and logs why. The folder may have been moved. Of several runs in
    one folder it takes the last one's, unless none of those loads. It ignores files that are older
    than ``since``, in seconds since 1970.
    """
    skipped = []
    for path in _candidates(Path(work_dir), since):
        try:
            content = load_from_file(path, map_location='cpu')
            if isinstance((content.get('meta') or {}).get('iter'), int) and 'optimizer' in content:
                return str(path)
            reason = f'{path} holds weights, but not the state of a training'
        except (CheckpointError, OSError) as error:
            reason = str(error)
        print_log(f'Not resumed: {reason}', logger='current', level=logging.WARNING)
        skipped.append(path)
    if skipped:
        raise CheckpointError(
            f'none of the {len(skipped)} checkpoints in {work_dir} can be resumed, see above: '
            'restore one, or start without --resume in another --work-dir')
    return None


def _candidates(work_dir: Path, since: float) -> Iterator[Path]:
    """Yield checkpoints of steps: those of the last run first, the newest first."""
    folders, last, written = [work_dir], math.inf, 0.
    pointed = _pointed(work_dir)
    if pointed is not None:
        folders.append(pointed.parent)
        last = _step(pointed) or last
        written = (work_dir / 'last_checkpoint').stat().st_mtime
    found: dict[str, tuple[bool, int, Path]] = {}
    for folder in folders:
        for path in folder.iterdir() if os.path.isdir(folder) else ():
            step, changed = _step(path), path.stat().st_mtime if os.path.isfile(path) else 0.
            if step is not None and changed >= since:
                # A later step is of an earlier run, unless a kill left last_checkpoint behind.
                of_last_run = step <= last or changed >= written
                found.setdefault(os.path.realpath(path), (of_last_run, step, path))
    return (path for *_, path in sorted(found.values(), reverse=True))


def _pointed(work_dir: Path) -> Path | None:
    """Return the checkpoint that last_checkpoint names; None, and a warning, if it names none."""
    pointer = work_dir / 'last_checkpoint'
    if not os.path.lexists(pointer):
        return None
    wrong = 'cannot be read'
    if os.path.isfile(pointer) and os.access(pointer, os.R_OK):
        with pointer.open('rb') as file:
            name = os.fsdecode(file.read(4096)).strip()  # as long as a path can be
        # checkpoint.out_dir may lie elsewhere; mmengine writes absolute paths, and folders move.
        for path in (work_dir / name, work_dir / os.path.basename(name)):
            if os.path.isfile(path) and _step(path) is not None and os.access(path.parent, os.R_OK):
                return path
        wrong = f'names "{shown(name[:200])}", which is no checkpoint here'
    print_log(f'{pointer} {wrong}: looking for the newest one that loads in {work_dir}',
              logger='current', level=logging.WARNING)
    return None


def _step(path: Path) -> int | None:
    """Return the iteration or epoch in the name of a checkpoint."""
    number = re.fullmatch(r'(?!best_|\.).*?(\d+)\.pth', path.name)
    return int(number[1]) if number else None
