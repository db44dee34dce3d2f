"""Runs over folders and videos, what they write, and the command line."""
import json
import os
import re
import shutil
import sys

import cv2
import numpy as np
import pytest
from PIL import Image

from mmseg_edaformer.data.drawing import PALETTE, draw_scene
from mmseg_edaformer.errors import ConfigError, DataError
from mmseg_edaformer.predict import run as module, segmenter as limits
from mmseg_edaformer.predict.inputs import Video, find_images
from mmseg_edaformer.predict.outputs import describe_summary
from mmseg_edaformer.predict.run import predict_images, predict_video
from mmseg_edaformer.predict.segmenter import Segmenter
from tests.conftest import ROOT, run
from tests.predict.conftest import same, seen_sizes
from tests.processes import done, run_tool


@pytest.fixture
def photos(images, tmp_path):
    """A folder with a folder in it, two images of one name, a bad one, and other files."""
    folder = tmp_path / 'photos'
    (folder / 'more').mkdir(parents=True)
    (folder / '.hidden').mkdir()
    for name, path in zip(['a.png', 'more/b.png', '.hidden/c.png', '._a.png'], images):
        shutil.copy(path, folder / name)
    Image.open(images[3]).save(folder / 'a.jpg')
    (folder / 'bad.JPG').write_text('words')
    (folder / 'notes.txt').write_text('words')
    return folder


def written(out):
    return {str(path.relative_to(out)): (path.stat().st_ino, path.stat().st_mtime_ns)
            for kind in ('masks', 'overlays') for path in (out / kind).rglob('*.*')}


def interrupt(segmenter, number):
    """Interrupt the prediction of this number; returns a list that grows with each."""
    seen = seen_sizes(segmenter)
    predict = segmenter.model.predict_labels

    def interrupted(*args, **kwargs):
        if len(seen) == number - 1:
            seen.append(None)
            raise KeyboardInterrupt
        return predict(*args, **kwargs)
    segmenter.model.predict_labels = interrupted
    return seen


def test_a_folder(segmenter, photos):
    out = photos / 'results'  # within the input: not to be read again
    seconds = 0
    for kept in 0, 3:
        summary = predict_images(segmenter, [photos], out)
        assert sorted(written(out)) == [
            'masks/a.jpg.png', 'masks/a.png.png', 'masks/more/b.png',
            'overlays/a.jpg.jpg', 'overlays/a.png.jpg', 'overlays/more/b.jpg']
        assert summary['kept'] == kept
        assert list(summary['skipped']) == ['../bad.JPG']
        assert 'bad.JPG' in summary['skipped']['../bad.JPG']
        seconds = seconds or summary['seconds']
    assert summary['seconds'] == seconds  # of the run that predicted
    assert os.path.samefile(out / summary['checkpoint'], segmenter.source)
    assert json.loads((out / 'summary.json').read_text()) == summary
    entry = summary['images']['../more/b.png']
    found = segmenter(photos / 'more' / 'b.png')
    assert entry == dict(mask='masks/more/b.png', shares=found.shares)
    assert same(np.array(Image.open(out / entry['mask'])), found.labels)
    drawn = cv2.imread(str(out / 'overlays' / 'more' / 'b.jpg')).astype(int)
    assert np.abs(drawn - found.draw()).mean() < 5
    assert sum(summary['shares'].values()) == pytest.approx(1, abs=1e-4)
    assert summary['classes']['sky'] == '#6cb4ee'
    assert Image.open(out / 'legend.png').width > 60


def test_it_resumes_where_it_stopped(work, photos, tmp_path, capsys):
    segmenter, out = Segmenter(work, device='cpu'), tmp_path / 'out'
    whole = predict_images(segmenter, [photos], tmp_path / 'whole')
    calls = interrupt(segmenter, 3)
    with pytest.raises(KeyboardInterrupt):
        predict_images(segmenter, [photos], out)
    assert '2 of 4 images are done: run the same command again' in capsys.readouterr().err
    before = written(out)
    assert len(before) == 4
    summary = predict_images(segmenter, [photos], out)
    assert len(calls) == 4
    assert before.items() <= written(out).items()
    assert {**summary, 'kept': 0, 'seconds': 0} == {**whole, 'kept': 0, 'seconds': 0}
    # Another ratio, another image: predicted again.
    os.utime(photos / 'a.png', (1, 1))
    (out / 'summary.json').write_text(json.dumps(dict(summary, seconds=1e6)))
    more = predict_images(segmenter, [photos], out)
    assert more['kept'] == 2
    assert 1e6 < more['seconds'] < 2e6  # with those of the run before
    segmenter.isr_ratio = 2
    assert predict_images(segmenter, [photos], out)['kept'] == 0
    (out / 'masks' / 'a.png.png').write_bytes(b'damaged')
    assert predict_images(segmenter, [photos], out)['kept'] == 2


def test_the_summary_says_which_ratio_large_images_had(whole, work, images, tmp_path, monkeypatch):
    monkeypatch.setattr(limits, 'LARGE', 128 * 128)
    large = tmp_path / 'large.png'
    Image.fromarray(draw_scene(np.random.default_rng(3), (160, 256))[0]).save(large)
    out = tmp_path / 'out'
    segmenter = Segmenter(*whole, device='cpu')

    def outcome(*sources):
        summary = predict_images(segmenter, sources, out)
        return summary['kept'], summary['isr_ratio']
    assert outcome(images[0]) == (0, 'none')
    assert [outcome(large), outcome(large)] == [(0, 'auto'), (1, 'auto')]
    assert outcome(images[0], large) == (2, 'none, auto for 1 of 2')
    segmenter.isr_ratio = 'none'  # asked for: no mask of auto is taken for it
    assert outcome(large) == (0, 'none')
    segmenter = Segmenter(work, device='cpu')  # whose pipeline makes it small
    assert outcome(large) == (0, 'none')


def test_odd_names_and_entries_that_are_no_images(segmenter, photos, tmp_path):
    for name, target in ((b'gone.png', b'nowhere'), (b'dead\xe8.png', b'\xff')):
        (photos / os.fsdecode(name)).symlink_to(os.fsdecode(target))
    os.mkfifo(photos / 'pipe.png')
    for name in b'\xe9.png', b'n' * 251 + b'.png', b'n' * 250 + b'm.png', b'd' * 255 + b'/d.png':
        path = photos / os.fsdecode(name)
        path.parent.mkdir(exist_ok=True)
        shutil.copy(photos / 'a.png', path)
    out = tmp_path / 'out'
    for kept in 0, 7:
        summary = predict_images(segmenter, [photos], out)
        assert summary['kept'] == kept
    reasons = {os.path.basename(path): reason for path, reason in summary['skipped'].items()}
    for name, reason in {
            'gone.png': 'gone.png: it is a link to nowhere, which does not exist',
            'pipe.png': 'pipe.png is not a regular file', 'bad.JPG': 'bad.JPG (5 bytes)',
            'dead\\xe8.png': 'dead\\xe8.png: it is a link to \\xff, which does not exist'}.items():
        assert reason in reasons.pop(name)
    assert not reasons
    text = describe_summary(dict(summary, skipped=dict.fromkeys(range(9), 'why')),
                            os.fsdecode(b'\xff'))
    assert text.count('skipped: ') == 6
    assert text.endswith('are in \\xff')
    read = json.loads((out / 'summary.json').read_bytes().decode())  # without lone surrogates
    assert json.dumps(read, ensure_ascii=False).encode()
    assert read['images']['../photos/\\xe9.png']['mask'] == 'masks/\\xe9.png'
    names = os.listdir(os.fsencode(out / 'masks'))
    assert b'\xe9.png' in names
    assert len([name for name in names if name.startswith(b'nn') and len(name) <= 255]) == 2


def test_patterns_and_links_that_lead_back_up(photos):
    def names(pattern, without=None):
        return [name for _, name in find_images(photos / pattern, without)]
    (photos / 'a_loop').symlink_to('.')
    (photos / 'more' / 'up').symlink_to('..')
    for pattern in '**/**.png', '**/*.png':
        assert names(pattern) == ['a.png', 'more/b.png']
    assert len(names('**')) == 5
    assert names('**/.hidden/*') == ['.hidden/c.png']
    assert names('**/*.png', (photos / 'more').resolve()) == ['a.png']
    assert names('') == ['a.jpg', 'a.png', 'bad.JPG', 'more/b.png']
    assert names('*.[jp]*g') == ['a.jpg', 'a.png']
    assert find_images(photos / 'mo*' / 'b.png') == [(photos / 'more' / 'b.png', 'more/b.png')]


@pytest.mark.parametrize(('names', 'out', 'error', 'says'), [
    (['*.JPG'], 'out', DataError, 'no image can be read: .*bad.JPG'),
    (['a.png', '../a.png'], 'out', DataError, 'a.png and .*a.png would be written under one name'),
    (['a.png'], 'file/below', ConfigError, 'cannot be written to')])
def test_runs_that_end_in_a_message(segmenter, photos, tmp_path, names, out, error, says):
    shutil.copy(photos / 'a.png', tmp_path)
    (tmp_path / 'file').write_text('')
    with pytest.raises(error, match=says):
        predict_images(segmenter, [photos / name for name in names], tmp_path / out)


def test_progress_for_a_log_file(monkeypatch, capsys):
    now = 0.
    monkeypatch.setattr(module.time, 'monotonic', lambda: now)
    with module.progress_bar('predict', 1000, done=100) as advance:
        for step in range(1, 901):
            now = step * 2.
            advance(100 + step)
    with module.progress_bar('frames', None) as advance:
        now += 10
        advance(7)
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ['predict: 105 of 1000, 0:29:50 left', 'predict: 110 of 1000, 0:29:40 left']
    assert len(lines) == 11
    assert lines[-1] == 'frames: 7'


# Videos.

def write_video(path, frames, size=(96, 64), fourcc='mp4v'):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*fourcc), 12.5, size)
    for frame in frames:
        writer.write(cv2.resize(frame, size))
    writer.release()
    return path


@pytest.fixture
def clip(images, tmp_path):
    """A video of twelve frames, and the frames as they are decoded."""
    path = write_video(tmp_path / 'clip.mp4',
                       [cv2.imread(str(images[index // 3])) for index in range(12)])
    capture = cv2.VideoCapture(str(path))
    return path, [capture.read()[1] for _ in range(12)]


def test_a_video(segmenter, clip, tmp_path):
    path, frames = clip
    wanted = [segmenter(frame) for frame in frames]
    assert all(same(found.labels, result.labels)
               for found, result in zip(segmenter(path), wanted, strict=True))
    out = tmp_path / 'out'
    summary = predict_video(segmenter, path, out, masks=True)
    assert (summary['video'], summary['frames']) == ('clip_overlay.mp4', 12)
    overlays = Video(out / 'clip_overlay.mp4')
    assert (overlays.frames, overlays.size, overlays.rate) == (12, (96, 64), 12.5)
    for index, (overlay, result) in enumerate(zip(overlays, wanted, strict=True)):
        assert np.abs(overlay.astype(int) - result.draw()).mean() < 8
        mask = Image.open(out / 'masks' / 'clip' / f'{index:06}.png')
        assert same(np.array(mask), result.labels)
    inode = (out / 'clip_overlay.mp4').stat().st_ino
    assert predict_video(segmenter, path, out, masks=True) == summary
    assert (out / 'clip_overlay.mp4').stat().st_ino == inode
    assert predict_video(segmenter, path, out)['frames'] == 12  # asks for something else
    assert (out / 'clip_overlay.mp4').stat().st_ino != inode
    assert sorted(os.listdir(out)) == ['clip_overlay.mp4', 'legend.png', 'masks', 'summary.json']


@pytest.mark.skipif(not shutil.which('ffmpeg'), reason='needs ffmpeg')
def test_ffmpeg_writes_h264(segmenter, clip, tmp_path):
    path = write_video(tmp_path / 'odd.avi', clip[1], (97, 65), 'MJPG')
    summary = predict_video(segmenter, path, tmp_path / 'out')
    assert (summary['codec'], summary['frames']) == ('h264', 12)
    assert 'MPEG-4' not in describe_summary(summary, tmp_path / 'out')
    capture = cv2.VideoCapture(str(tmp_path / 'out' / summary['video']))
    assert int(capture.get(cv2.CAP_PROP_FOURCC)).to_bytes(4, 'little') in (b'avc1', b'h264')


@pytest.fixture
def ffmpeg(tmp_path, monkeypatch):
    """Give a function that puts a program, or none, in the place of ffmpeg; OpenCV has no H.264."""
    own = cv2.VideoWriter

    def writer(name, fourcc, *more):
        return own() if fourcc == own.fourcc(*'avc1') else own(name, fourcc, *more)
    writer.fourcc = own.fourcc
    monkeypatch.setattr(cv2, 'VideoWriter', writer)
    (tmp_path / 'bin').mkdir()
    monkeypatch.setenv('PATH', str(tmp_path / 'bin'))

    def put(text):
        (tmp_path / 'bin' / 'ffmpeg').write_text(f'#!{sys.executable}\nimport sys\n{text}')
        (tmp_path / 'bin' / 'ffmpeg').chmod(0o755)
    return put


@pytest.mark.parametrize('program', [None, 'sys.exit(1)'])
def test_without_h264_a_note_says_so(segmenter, clip, ffmpeg, tmp_path, program):
    if program is not None:
        ffmpeg(program)
    summary = predict_video(segmenter, clip[0], tmp_path / 'out')
    assert summary['codec'] == 'mpeg4'
    text = describe_summary(summary, tmp_path / 'out')
    assert text.count('MPEG-4 part 2, which browsers do not play: install ffmpeg') == 1
    assert Video(tmp_path / 'out' / summary['video']).frames == 12


def test_what_ends_half_way_leaves_no_half_video(work, clip, ffmpeg, tmp_path):
    segmenter = Segmenter(work, device='cpu')
    ffmpeg('if len(sys.stdin.buffer.read(3 * 64 * 96 * 3)) > 64 * 96 * 3: sys.exit(1)')
    with pytest.raises(ConfigError, match=r'out cannot be written to: ffmpeg ended too ea'):
        predict_video(segmenter, clip[0], tmp_path / 'out')
    (tmp_path / 'bin' / 'ffmpeg').unlink()
    interrupt(segmenter, 5)
    with pytest.raises(KeyboardInterrupt):
        predict_video(segmenter, clip[0], tmp_path / 'out')
    assert os.listdir(tmp_path / 'out') == ['legend.png']
    whole = clip[0].read_bytes()
    (tmp_path / 'cut.mp4').write_bytes(whole[:len(whole) // 2])  # its index is at the end
    with pytest.raises(DataError, match=r'video cannot be decoded: .*cut.mp4'):
        predict_video(segmenter, tmp_path / 'cut.mp4', tmp_path / 'none')
    with pytest.raises(DataError, match='no such video'):
        Video('http://localhost/clip.mp4')
    assert not (tmp_path / 'none').exists()


# The command lines.

@pytest.mark.slow
def test_labels_are_those_of_the_test_tool(work, images, photos, tmp_path):
    checkpoint = work / 'best_mIoU_iter_4.pth'
    done('tools/test.py', work / 'mini.py', checkpoint, '--isr-ratio', '2',
         '--out', tmp_path / 'test', '--work-dir', tmp_path / 'log')
    shutil.copy(photos / 'bad.JPG', tmp_path)
    _, output = run_tool(
        'tools/predict.py', images[0].parent, photos / 'bad.JPG', '--model', work / 'mini.py',
        '--checkpoint', checkpoint, '--out', tmp_path / 'out', '--isr-ratio', 2, '--device', 'cpu')
    lines = output.splitlines()
    assert lines[:2] == [f'{checkpoint}, 8 classes, on cpu',
                         '4 images at ISR ratio 2, 1 skipped']
    assert lines[2].startswith(f'skipped: image cannot be decoded: {photos}/bad.JPG')
    assert re.match(r'pixels: \w+ \d+\.\d%, .* more classes', lines[3])
    assert lines[4:] == [f'masks, overlays, legend.png and summary.json are in {tmp_path}/out']
    for path in images:
        ours, theirs = (Image.open(folder / path.name) for folder in (
            tmp_path / 'out' / 'masks', tmp_path / 'test'))
        assert same(np.array(ours), np.array(theirs))
        # As an image it has the colours of the classes.
        assert same(np.array(ours.convert('RGB')), np.array(PALETTE)[np.array(theirs)])


@pytest.mark.slow
def test_command_line_of_one_file_and_a_video(work, clip, tmp_path):
    single = tmp_path / 'one.safetensors'
    output = done('tools/convert_checkpoint.py', work / 'best_mIoU_iter_4.pth', single,
                  '--config', work / 'mini.py')
    assert f'predict with tools/predict.py INPUT --model {single}' in output
    output = done('tools/predict.py', clip[0], '--model', single, '--out',
                  tmp_path / 'out', '--masks', '--device', 'cpu')
    assert '12 frames at ISR ratio none\n' in output
    assert output.endswith(f'\n{tmp_path}/out/clip_overlay.mp4\n')
    for wrong, says in (([clip[0], clip[0]], 'one video at a time'),
                        ([work / 'mini.py', '--masks'], '--masks is for a video'),
                        ([work / 'mini.py', '--video'], 'video cannot be decoded')):
        code, output = run_tool('tools/predict.py', *wrong, '--model', single, '--out',
                                tmp_path / 'none', '--device', 'cpu')
        assert code == 1
        assert output.splitlines()[-1].startswith('error: ')
        assert says in output
    assert not (tmp_path / 'none').exists()


@pytest.mark.parametrize(('command', 'says'), [
    ('predict --help', 'Re-running resumes where it stopped'),
    ('predict gone.png --model {work} --out x', 'error: no such file or folder'),
    ('predict setup.py --model gone --out x', 'error: no such model: gone: give'),
    ('demo --model {work} --checkpoint gone', 'error: checkpoint not found: gone')])
def test_help_and_wrong_paths_are_answered_at_once(work, command, says):
    words = command.format(work=work).split()
    done = run('-c', f'import runpy, sys; sys.argv = {words}; '
               'sys.modules.update(torch=None, cv2=None, numpy=None); '
               f'runpy.run_path("{ROOT}/tools/{words[0]}.py", run_name="__main__")', check=False)
    assert says in done.stdout + done.stderr
