"""Runs over images and videos: progress, results in a folder, resuming what was stopped."""
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import cv2
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from ..errors import DataError, shown
from ..files import replacing, shorten, write_file
from .inputs import LONGEST_NAME, Video, find_images, name_targets
from .outputs import (
    Summary,
    draw_legend,
    encode_png,
    make_note,
    open_video_writer,
    read_mask,
    read_summary,
    remove_leftovers,
    write_result,
    writing,
)
from .segmenter import Segmenter


def predict_images(segmenter: Segmenter, sources: Sequence[str | Path],
                   out: str | Path) -> dict[str, Any]:
    """Write masks and overlays of images to a folder, and return the summary.

    Re-running resumes where it stopped.

    A mask is a PNG of one channel in the colours of the classes. It is written last and whole, and
    notes its image, weights and ratio; a mask that would come out the same is kept. Of several
    images, those that cannot be read are skipped. Paths in the summary are relative to its folder.

    Args:
        segmenter: The model.
        sources: Files, folders and patterns, see `find_images`.
        out: Folder for ``masks``, ``overlays``, ``legend.png`` and ``summary.json``.

    Raises:
        DataError: There is no image, none can be read, or two would get the same name.
        ConfigError: The folder cannot be written to.
    """
    out = Path(out)
    files = [file for source in sources
             for file in find_images(source, Path(os.path.realpath(out)))]
    targets = name_targets(files)
    with writing(out):
        write_file(out / 'legend.png', encode_png(draw_legend(segmenter)))
        remove_leftovers(out)
    summary = Summary(segmenter, out)
    base = segmenter.fingerprint()
    notes = {path: make_note(base, path, target) for path, target in targets.items()}
    left = []
    for path, target in targets.items():
        labels = read_mask(out / 'masks' / f'{target}.png', notes[path])
        if labels is None:
            left.append(path)
        else:
            summary.add(path, target, labels)
    summary.kept = len(targets) - len(left)
    skipped = summary.skipped if len(targets) > 1 else None
    try:
        with writing(out), progress_bar('images', len(targets), summary.kept) as advance:
            paths = iter(left)
            for result in segmenter.stream(left, skipped):
                path = next(path for path in paths if str(path) not in summary.skipped)
                write_result(out, targets[path], result, notes[path])
                summary.add(path, targets[path], result.labels)
                advance(len(summary.images) + len(summary.skipped))
    except KeyboardInterrupt:
        print(f'{len(summary.images)} of {len(targets)} images are done: run the same command '
              'again to resume', file=sys.stderr)
        raise
    if not summary.images:
        raise DataError('no image can be read: ' + next(iter(summary.skipped.values())))
    return summary.write()


def predict_video(segmenter: Segmenter, source: str | Path, out: str | Path, *,
                  masks: bool = False) -> dict[str, Any]:
    """Write the overlays of a video to another one, and return the summary.

    The result has the same pace and no sound. It is written whole; a result that would come out the
    same is kept.

    Args:
        segmenter: The model.
        source: The video.
        out: Folder for a video named after it, ``legend.png`` and ``summary.json``.
        masks: Whether to write the mask of each frame to ``masks``.

    Raises:
        DataError: The video cannot be decoded.
        ConfigError: The folder cannot be written to.
    """
    out, video = Path(out), Video(source)
    name = shorten(video.path.stem, LONGEST_NAME)
    target = out / f'{name}_overlay.mp4'
    note = make_note(segmenter.fingerprint(), video.path, f'{target.name} {masks}')
    before = read_summary(out)
    if target.is_file() and before.get('note') == note:
        return before
    summary = Summary(segmenter, out)
    with writing(out):
        write_file(out / 'legend.png', encode_png(draw_legend(segmenter)))
    # While the video is being replaced, the old summary must not speak for the new one.
    (out / 'summary.json').unlink(missing_ok=True)
    count = 0
    with writing(out), replacing(target) as partial, \
            progress_bar('frames', video.frames) as advance:
        writer, codec = open_video_writer(partial, video.size, video.rate)
        try:
            for result in segmenter.stream(video):
                writer.write(cv2.resize(result.draw(), video.size))  # a video may change its size
                if masks:
                    write_file(out / 'masks' / name / f'{count:06}.png',
                               encode_png(result.mask))
                summary.count(result.labels)
                count += 1
                advance(count)
        finally:
            writer.release()
        try:
            written = Video(partial).frames
        except DataError:
            written = 0
        if written != count:  # the writer is silent about a full disk
            raise OSError(f'{written} of {count} frames were written')
    return summary.write(note=note, video=shown(target.name), codec=codec, frames=count,
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

    with Progress(TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(),
                  TaskProgressColumn(show_speed=True), TextColumn('left'), TimeRemainingColumn(),
                  disable=not on_terminal) as progress:
        task = progress.add_task(title, total=total, completed=done)
        yield advance
