"""Damaged, foreign and odd files: read rightly or named."""
import io
import os
import re
import struct
import zlib
from pathlib import Path

import cv2
import mmcv
import numpy as np
import pytest
import torch
from mmcv.transforms import Compose, LoadImageFromFile
from mmengine.config import Config, ConfigDict
from mmengine.dataset import pseudo_collate
from mmseg.registry import TRANSFORMS
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import ImageFileDirectory_v2

import mmseg_edaformer.data.transforms as transforms
from mmseg_edaformer.data import LoadSegImage, LoadSegLabels
from mmseg_edaformer.errors import DataError
from tests.conftest import ROOT

SEED = 0


@pytest.fixture(scope='module')
def picture(scenes):
    return Image.open(scenes / 'images' / 'training' / '00000.png').convert('RGB')


def encoded(image, format, **options):
    """The bytes of an image."""
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def png(width, height, data=b'', depth=8):
    """A PNG of any claimed size."""
    def chunk(name, content):
        return (struct.pack('>I', len(content)) + name + content +
                struct.pack('>I', zlib.crc32(name + content)))
    return (b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, depth, 0,
                                                              0, 0, 0)) +
            chunk(b'IDAT', zlib.compress(data or b'\0' * 999)) + chunk(b'IEND', b''))


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def deep(image):
    """The image in 16 bits."""
    return np.array(image).astype(np.uint16) * 256 + 57


def good_images(picture):
    """Names and bytes of what must be read."""
    grey = picture.convert('L')
    for format in ('JPEG', 'PNG', 'BMP', 'TIFF', 'WEBP', 'PPM', 'JPEG2000'):
        yield format, encoded(picture, format)
    for mode in ('1', 'L', 'LA', 'P', 'RGBA'):
        for format in ('PNG', 'TIFF'):
            yield f'{mode} {format}', encoded(picture.convert(mode), format)
    yield 'P transparent', encoded(picture.convert('P'), 'PNG', transparency=3)
    yield 'L JPEG', encoded(grey, 'JPEG')
    yield 'CMYK JPEG', encoded(picture.convert('CMYK'), 'JPEG')
    yield 'progressive', encoded(picture, 'JPEG', progressive=True)
    yield 'interlaced', cv2.imencode('.png', np.array(picture)[..., ::-1])[1].tobytes()
    for format in ('PNG', 'TIFF'):
        yield f'grey16 {format}', encoded(Image.fromarray(deep(grey)), format)
        suffix = format.lower()
        yield f'rgb16 {suffix}', cv2.imencode(f'.{suffix}', deep(picture)[..., ::-1])[1].tobytes()
    for orientation in range(1, 9):
        yield f'turned{orientation} JPEG', encoded(picture, 'JPEG', exif=turned(orientation))
    yield 'turned6 PNG', encoded(picture, 'PNG', exif=turned(6))
    yield 'trailing JPEG', encoded(picture, 'JPEG') + b'\xff\xdamore' * 9
    yield 'two JPEGs', encoded(picture, 'MPO', save_all=True, append_images=[picture.rotate(180)])
    small, preview = picture.resize((8, 8)), ImageFileDirectory_v2()
    preview[254] = 1
    small.encoderinfo = dict(tiffinfo=preview)
    yield 'previews TIFF', encoded(picture, 'TIFF', save_all=True, append_images=[small])
    for size in ((1, 1), (1, 20000), (20000, 1), (2, 3)):
        for format in ('PNG', 'JPEG'):
            yield f'{size} {format}', encoded(picture.resize(size), format)


def bad_images(picture, rng):
    """Names and bytes of what must be refused."""
    yield 'empty', b''
    yield 'text', b'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n'
    yield 'page', b'<!DOCTYPE html><html><body>404</body></html>'
    yield 'zeros', bytes(5000)
    yield 'noise', rng.bytes(5000)
    yield 'bomb', png(60000, 60000)
    yield 'wide bomb', png(2 ** 31 - 1, 1)
    yield 'short data', png(300, 300)
    yield 'no pixels', png(0, 5)
    yield 'float', encoded(Image.fromarray(np.eye(9, dtype=np.float32)), 'TIFF')
    yield 'float rgb', cv2.imencode('.tiff', np.ones((9, 9, 3), np.float32))[1].tobytes()
    yield 'postscript', encoded(picture, 'EPS')
    moving = dict(save_all=True, append_images=[picture.rotate(180)])
    for format in ('GIF', 'TIFF', 'PNG', 'WEBP'):
        yield f'moving {format}', encoded(picture, format, **moving)
    thumbnail = Image.Exif()
    thumbnail[0x9c9b] = encoded(picture.resize((32, 16)), 'JPEG')  # ends as the image should
    for format, count, options in (
            ('JPEG', 16, {}), ('PNG', 10, {}), ('BMP', 3, {}), ('TIFF', 3, {}), ('WEBP', 3, {}),
            ('GIF', 3, {}), ('JPEG', 8, dict(exif=thumbnail)), ('JPEG', 4, dict(progressive=True))):
        whole = encoded(picture, format, **options)
        for cut in rng.integers(len(whole) // 2 if options else 1, len(whole) - 2, count):
            yield f'cut{cut} {format}', whole[:cut]


def masks(label, rng):
    """Names and bytes of masks, and whether they must be read."""
    array = np.array(label)
    paletted = Image.fromarray(array)
    paletted.putpalette(rng.bytes(768))
    for name, array_, format in (
            ('L', array, 'PNG'), ('1', array > 0, 'PNG'), ('16', array.astype(np.uint16), 'PNG'),
            ('32', array.astype(np.int32), 'TIFF'), ('float', array.astype(np.float32), 'TIFF'),
            ('L', array, 'BMP'), ('L', array, 'GIF'), ('L', array, 'TIFF')):
        yield f'{name} {format}', encoded(Image.fromarray(array_), format), True
    yield 'P', encoded(paletted, 'PNG'), True
    for size in ((1, 1), (1, 20000), (20000, 1)):
        yield f'{size}', encoded(label.resize(size), 'PNG'), True
    for mode in ('RGB', 'RGBA', 'LA'):
        yield mode, encoded(label.convert(mode), 'PNG'), False
    for name, array_, format in (
            ('16 large', array.astype(np.uint16) + 300, 'PNG'), ('no label', array + 40, 'PNG'),
            ('half', array.astype(np.float32) + .5, 'TIFF'),
            ('nan', np.full((4, 4), np.nan, np.float32), 'TIFF')):
        yield name, encoded(Image.fromarray(array_), format), False
    for name, content in (('bomb', png(60000, 60000)), ('empty', b''), ('page', b'<html>')):
        yield name, content, False
    for source, name in ((label, 'L'), (paletted, 'P')):
        whole = encoded(source, 'PNG')
        for cut in rng.integers(1, len(whole) - 12, 4):
            yield f'cut{cut} {name}', whole[:cut], False


def by_pillow(path):
    """Another reader: upright, 8 bits, BGR."""
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode.startswith('I'):
        image = Image.fromarray((np.array(image) // 256).astype(np.uint8))
    return np.array(image.convert('RGB'))[..., ::-1]


def read(kind, path):
    """What a transform makes of a file, or the message with which it refuses it."""
    results = dict(seg_map_path=path, img_path=path, seg_fields=[], reduce_zero_label=False)
    try:
        return (LoadSegImage().transform(results)['img'] if kind == 'image'
                else LoadSegLabels(num_classes=8).transform(results)['gt_seg_map'])
    except DataError as error:
        return str(error) if path in str(error) else pytest.fail(f'{path} is not named: {error}')


def test_files_are_read_rightly_or_named(picture, scenes, tmp_path):
    rng, path = np.random.default_rng(SEED), str(tmp_path / 'file.png')
    label = Image.open(scenes / 'annotations' / 'training' / '00000.png')
    files = [('image', *each, True) for each in good_images(picture)]
    files += [('image', *each, False) for each in bad_images(picture, rng)]
    files += [('mask', *each) for each in masks(label, rng)]
    for kind, name, content, loads in files:
        Path(path).write_bytes(content)
        got = read(kind, path)
        assert isinstance(got, str) != loads, (name, got)
        if not loads:
            continue
        if kind == 'mask':
            assert np.array_equal(got, np.array(Image.open(path))), name
            continue
        assert np.array_equal(got, LoadImageFromFile().transform(dict(img_path=path))['img']), name
        other = by_pillow(path).astype(int)
        assert got.shape == other.shape, name
        # JPEG's inverse transform and CMYK are rounded, and so are 16 bits in a TIFF.
        tolerance = 3 if any(word in name for word in ('JPEG', 'progr', 'WEBP', 'tiff')) else 0
        assert abs(got - other).max() <= tolerance, name


def test_no_bit_of_a_png_flips_unnoticed(scenes, tmp_path):
    """What is read in spite of it has the pixels of the whole file."""
    label = Image.open(scenes / 'annotations' / 'training' / '00000.png').resize((24, 16), 0)
    label.putpalette(bytes(range(256)) * 3)
    whole = encoded(label, 'PNG', dpi=(72, 72), exif=turned(6))
    path = tmp_path / 'file.png'
    path.write_bytes(whole)
    image, mask = read('image', str(path)), read('mask', str(path))
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1:])
        for kind, right in (('image', image), ('mask', mask)):
            got = read(kind, str(path))
            assert isinstance(got, str) or np.array_equal(got, right), place


def damaged(content, rng, count):
    """Copies of a JPEG of which a bit is another, a byte is missing, or a block is zeros."""
    scan = content.rfind(b'\xff\xda') + 14
    for number, place in enumerate(rng.integers(scan, len(content) - 2, count)):
        copy = bytearray(content)
        if number % 3 == 0:
            copy[place] ^= 1 << int(rng.integers(8))
        elif number % 3 == 1:
            del copy[place]
        else:
            part = copy[place:min(place + 512, len(copy) - 2)]
            copy[place:place + len(part)] = bytes(len(part))
        yield bytes(copy)


def test_damaged_jpegs(picture, tmp_path, monkeypatch):
    """Half are refused, and most of those with many wrong pixels: OpenCV reads every one."""
    pytest.importorskip('simplejpeg')
    path = tmp_path / 'file.jpg'
    noise = np.random.default_rng(SEED).normal(0, 20, (160, 240, 3))
    grainy = np.array(picture.resize((240, 160))) + noise
    whole = encoded(Image.fromarray(grainy.clip(0, 255).astype(np.uint8)), 'JPEG', quality=90)
    path.write_bytes(whole)
    right = read('image', str(path)).astype(int)
    counts = []
    for checked in (True, False):
        if not checked:
            monkeypatch.setattr(transforms, 'simplejpeg', None)
        refused = wrong = 0
        for content in damaged(whole, np.random.default_rng(SEED), 99):
            path.write_bytes(content)
            got = read('image', str(path))
            if isinstance(got, str):
                refused += 1
                assert re.search(r'it is damaged \(.+\): save it again if it looks right', got)
            else:
                wrong += (abs(got - right).max(-1) > 8).mean() > 0.2
        counts.append((refused, wrong))
    (refused, wrong), (before, wrong_before) = counts
    assert refused > 40 > before
    assert 3 * wrong < wrong_before


def test_sloppy_jpegs_are_read(picture, tmp_path):
    """What libjpeg warns of, but whose pixels are right."""
    path = tmp_path / 'file.jpg'
    whole = encoded(picture, 'JPEG')
    path.write_bytes(whole)
    right, table = read('image', str(path)), whole.index(b'\xff\xdb')
    for content in (whole + b'more' * 99, whole[:-2] + b'\0\0\xff\xd9',
                    whole[:table] + b'ab' + whole[table:], whole[:11] + b'\7' + whole[12:]):
        path.write_bytes(content)
        assert np.array_equal(read('image', str(path)), right)


@pytest.mark.parametrize('kind', ['image', 'mask'])
def test_what_is_no_file(kind, tmp_path):
    folder, pipe, link = tmp_path / 'x.png', tmp_path / 'pipe.png', tmp_path / 'link.png'
    folder.mkdir()
    os.mkfifo(pipe)
    link.symlink_to(tmp_path / 'gone.png')
    large = tmp_path / 'large.png'
    with large.open('wb') as file:
        file.truncate(2 ** 31)
    for path, message in ((folder, 'x.png is a folder'), (pipe, 'pipe.png is not a regular file'),
                          (link, 'not found: .*link.png: it is a link to .*gone.png'),
                          (large, 'has 2147483648 bytes, too many'),
                          (tmp_path / 'none.png', f'{kind} not found: .*none.png$'),
                          (large / 'below.png', 'cannot be read: .*below.png .Not a directory')):
        with pytest.raises(DataError, match=message):
            raise DataError(read(kind, str(path)))


def test_large_images_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    path = tmp_path / 'bomb.png'
    path.write_bytes(png(20000, 20000))
    monkeypatch.setattr(mmcv, 'imfrombytes', None)
    for kind in ('image', 'mask'):
        assert 'it has 20000x20000 pixels, more than 268435456 (max_pixels' in read(kind, str(path))
    monkeypatch.undo()
    # Pillow alone refuses 178,956,970 pixels.
    transforms.check_header('mask', '', png(15000, 13000), max_pixels=2 ** 28)


@pytest.mark.parametrize('orientation', [6, 3, 1])
def test_a_mask_that_was_not_turned_with_its_image(scenes, tmp_path, orientation):
    source, path = scenes / 'images' / 'training' / '00000.png', tmp_path / 'image.jpg'
    Image.open(source).save(path, exif=turned(orientation))
    results = dict(img_path=str(path), seg_fields=[], reduce_zero_label=False,
                   seg_map_path=str(scenes / 'annotations' / 'training' / '00000.png'))
    results = LoadSegImage().transform(results)
    if orientation < 5:  # the same size: nothing shows
        LoadSegLabels(num_classes=8).transform(results)
        results['ori_shape'] = (96, 64)
    message = ('is 96x64 pixels, its image 64x96: its EXIF orientation, 6, turns the image'
               if orientation == 6 else 'its image 64x96: they do not belong together')
    with pytest.raises(DataError, match=message):
        LoadSegLabels(num_classes=8).transform(dict(results, seg_fields=[]))


@pytest.mark.parametrize('size', [(1, 1), (20000, 1), (1, 20000)])
@pytest.mark.parametrize('name', ['ade', 'cityscapes'])
def test_thin_images_in_the_test_pipelines(name, size, segmentor, tmp_path):
    cfg = Config.fromfile(ROOT / 'configs' / f'edaformer_t_{name}.py')
    path = str(tmp_path / 'thin.png')
    Image.new('RGB', size, (90, 120, 30)).save(path)
    segmentor.test_cfg = cfg.model.get('test_cfg') or ConfigDict(mode='whole')
    steps = Compose([TRANSFORMS.build(step) for step in cfg.test_pipeline
                     if step['type'] != 'LoadAnnotations'])
    with torch.no_grad():
        [sample] = segmentor.test_step(pseudo_collate([steps(dict(img_path=path))]))
    assert sample.pred_sem_seg.data[0].shape == size[::-1]


@pytest.mark.soak
def test_50000_flips_and_cuts(picture, tmp_path):
    """Every reading ends in an image or a message; PNGs come out whole or not at all."""
    rng, path = np.random.default_rng(SEED), tmp_path / 'file'
    for format, options in (('PNG', {}), ('JPEG', {}), ('JPEG', dict(progressive=True)),
                            ('TIFF', dict(compression='tiff_deflate')), ('BMP', {}), ('WEBP', {}),
                            ('GIF', {}), ('JPEG2000', {}), ('PPM', {})):
        whole = encoded(picture, format, **options)
        path.write_bytes(whole)
        right = read('image', str(path))
        for place in rng.integers(0, len(whole), 5000):
            content = bytearray(whole)
            content[place] ^= 1 << int(rng.integers(8))
            path.write_bytes(content)
            got = read('image', str(path))
            if format == 'PNG':
                assert isinstance(got, str) or np.array_equal(got, right)
            read('mask', str(path))
        for cut in rng.integers(0, len(whole) - 2, 600):
            path.write_bytes(whole[:cut])
            assert isinstance(read('image', str(path)), str), (format, cut)
