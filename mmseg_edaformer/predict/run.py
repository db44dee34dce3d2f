"""Runs over images and videos: progress, results in a folder, resuming what was stopped."""
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import contextmanager
from datetime import timedelta
from itertools import chain, islice
from pathlib import Path
from typing import Any

import cv2
from rich.progress import MofNCompleteColumn, Progress

from ..errors import DataError, shown
from ..files import replacing, shorten
from .inputs import IMAGES, Video, find_images, name_targets
from .outputs import Outcome, Results, Summary, make_note, open_video_writer, writing
from .segmenter import Segmenter
from .shards import Sample


def predict_images(segmenter: Segmenter, sources: Sequence[str | Path],
                   out: str | Path) -> dict[str, Any]:
    """Write masks and overlays of images to a folder, and return the summary.

    Re-running resumes where it stopped: a mask notes its image, weights and ratio, and one that
    would come out the same is kept. Of several images, those that cannot be read are skipped.

    Args:
        segmenter: The model.
        sources: Files, folders and patterns, see `find_images`.
        out: Folder for the results, see docs/predict.md.
    """
    out = Path(out)
    samples = find_samples(sources, out)
    summary, results = Summary(segmenter, out), Results(segmenter, out)
    summary.begin()
    kept, left = [], []
    for sample in samples:
        outcome = results.find(sample)
        if outcome is None:
            left.append(sample)
        else:
            kept.append(outcome)
    predictions = segmenter.predict(sample.file for sample in left)
    predicted = (results.add(sample, result) for (_, result), sample in zip(predictions, left))
    entries: dict[str, Any] = {}
    collect(chain(kept, predicted), len(samples), summary, entries.__setitem__, len(kept))
    return summary.write(images={summary.place(path): entries[path] for path in sorted(entries)
                                 if path not in summary.skipped})


def find_samples(sources: Iterable[str | Path], out: Path, endings: Set[str] = IMAGES
                 ) -> list[Sample]:
    """Return what to predict into a folder: the images, or shards, of files, folders, patterns."""
    files = [file for source in sources
             for file in find_images(source, Path(os.path.realpath(out)), endings)]
    return [Sample(str(path), target, str(path)) for path, target in name_targets(files).items()]


def collect(outcomes: Iterable[Outcome], total: int | None, summary: Summary,
            take: Callable[[str, dict[str, Any]], None], kept: int = 0) -> None:
    """Add outcomes to a summary behind a progress bar; `take` gets the address and entry of each.

    Raises:
        DataError: No image can be read.
    """
    try:
        outcomes = iter(outcomes)
        with writing(summary.out):
            first = [*islice(outcomes, 1)]  # the models are loaded: time begins to count
            with progress_bar('images', total, kept) as advance:
                for outcome in chain(first, outcomes):
                    take(outcome.address, summary.add(outcome))
                    advance(summary.done + len(summary.skipped))
    except KeyboardInterrupt:
        known = '' if total is None else f' of {total}'
        print(f'{summary.done}{known} images are done: run the same command again to resume',
              file=sys.stderr)
        raise
    if not summary.done:
        raise DataError('no image can be read: ' + next(iter(summary.skipped.values())))


def predict_video(segmenter: Segmenter, source: str | Path, out: str | Path, *,
                  masks: bool = False) -> dict[str, Any]:
    """Write the overlays of a video, and with ``masks`` each frame's mask; return the summary.

    A result that would come out the same is kept.
    """
    out, video = Path(out), Video(source)
    name = shorten(video.path.stem)
    target = out / f'{name}_overlay.mp4'
    summary, results = Summary(segmenter, out), Results(segmenter, out, overlays=False)
    note = make_note(results.fingerprint, video.path, f'{target.name} {masks}')
    if target.is_file() and summary.before.get('note') == note:
        return summary.before
    summary.begin()
    # While the video is being replaced, the old summary must not speak for the new one.
    (out / 'summary.json').unlink(missing_ok=True)
    with writing(out), replacing(target) as partial, \
            progress_bar('frames', video.frames) as advance:
        writer, codec = open_video_writer(partial, video.size, video.rate)
        try:
            for result in segmenter(video):
                writer.write(cv2.resize(result.draw(), video.size))  # a video may change its size
                sample = Sample(str(source), f'{name}/{summary.done:06}', '')
                summary.add(results.add(sample, result) if masks else
                            results.count(sample, result.labels))
                advance(summary.done)
        finally:
            writer.release()
        try:
            written = Video(partial).frames
        except DataError:
            written = 0
        if written != summary.done:  # the writer is silent about a full disk
            raise OSError(f'{written} of {summary.done} frames were written')
    return summary.write(note=note, video=shown(target.name), codec=codec, frames=summary.done,
                         frames_expected=video.frames)


@contextmanager
def progress_bar(title: str, total: int | None, done: int = 0) -> Iterator[Any]:
    """Show a bar with the time left on a terminal; yields the function that moves it.

    Elsewhere, as in a log file, it prints lines to stderr: after 10 s, 20 s, 40 s and so on, then
    every five minutes.
    """
    log, on_terminal = sys.stderr, sys.stdout.isatty()
    plain = not (on_terminal and log.isatty())
    start = time.monotonic()
    due = start + 10

    def advance(completed: int) -> None:
        nonlocal due
        progress.update(task, completed=completed)
        now = time.monotonic()
        if plain and now >= due:
            due = now + min(now - start, 300)
            text = f'{title}: {completed}'
            if total is not None:
                left = (total - completed) * (now - start) / max(completed - done, 1)
                text += f' of {total}, {timedelta(seconds=max(round(left), 0))} left'
            print(text, file=log, flush=True)

    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(),
                  disable=not on_terminal) as progress:
        task = progress.add_task(title, total=total, completed=done)
        yield advance
