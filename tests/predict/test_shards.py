"""Reading the images of shards, whatever is in them."""
import io
import os
import tarfile

import pytest

from mmseg_edaformer.errors import DataError
from mmseg_edaformer.predict.inputs import IMAGES
from mmseg_edaformer.predict.shards import Sample, read_samples
from tests.conftest import run

pa = pytest.importorskip('pyarrow')
parquet = pytest.importorskip('pyarrow.parquet')


def write_tar(path, members, mode='w'):
    with tarfile.open(path, mode) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def write_parquet(path, images, **more):
    with open(path, 'wb') as file:  # for pyarrow takes no path that is not UTF-8
        parquet.write_table(pa.table(dict(image=images, **more)), file, row_group_size=5)


def read(path, column=None):
    """The images of a file: contents by targets, and reasons by addresses."""
    samples = list(read_samples(Sample(str(path), path.stem, str(path)), column, IMAGES))
    folder = f'{path.parent}/'
    assert all(folder in sample.reason for sample in samples if sample.reason)
    return ({sample.target: sample.content for sample in samples if not sample.reason},
            {sample.address.removeprefix(folder): sample.reason for sample in samples
             if sample.reason})


def test_a_tar(tmp_path):
    path = tmp_path / 'a.tar'
    write_tar(path, [('./one/0.cls', b'7'), ('./one/0.png', b'zero'), ('one/0.seg.png', b'mask'),
                     ('one/1.JPG', b'one'), ('.hidden.png', b'2')])
    assert read(path) == ({'a/one/0': b'zero', 'a/one/1': b'one'}, {})
    assert read(path, 'seg.png') == ({'a/one/0': b'mask'}, {})
    contents, reasons = read(path, 'webp')
    assert not contents
    assert 'a.tar holds no image that ends in .webp: name the ending' in reasons['a.tar']
    for name, target in ('b.tgz', 'b/0'), ('c.tar.gz', 'c.tar/0'):
        write_tar(tmp_path / name, [('0.png', b'zero')], 'w:gz')
        assert read(tmp_path / name) == ({target: b'zero'}, {})
    write_tar(tmp_path / 'two.tar', [('a.jpg', b'0'), ('a.png', b'0')])
    with pytest.raises(DataError, match=r'the sample a in .*two.tar has jpg and png: select one'):
        read(tmp_path / 'two.tar')
    assert list(read(tmp_path / 'two.tar', 'jpg')[0]) == ['two/a']


def test_a_parquet(tmp_path):
    path = tmp_path / 'b.parquet'
    write_parquet(path, [
        dict(bytes=b'0', path='0.png'), dict(bytes=None, path='1.png'), dict(bytes=b'2', path=None),
        dict(bytes=b'3', path='/abs/3.png'), dict(bytes=b'4', path='0.jpg'),
        dict(bytes=b'5', path='0.png'), *(dict(bytes=b'6', path=None) for _ in range(20))])
    contents, reasons = read(path)
    assert contents == {'b/0': b'0', 'b/000002': b'2', 'b/abs/3': b'3', 'b/0.jpg': b'4',
                        **{f'b/{row:06}': b'6' for row in range(6, 26)}}
    assert 'b.parquet#1: it holds no image' in reasons['b.parquet#1']
    assert 'another image in this shard has the same name' in reasons['b.parquet#5']
    path = tmp_path / os.fsdecode(b'\xe9.parquet')
    write_parquet(path, [b'0'], label=[0])
    assert read(path) == ({f'{path.stem}/000000': b'0'}, {})


@pytest.mark.parametrize(('columns', 'column', 'says'), [
    (dict(image=[1], one=[b''], other=[b'']), None, 'has several columns .* name one of one, oth'),
    (dict(image=[b'']), 'none', 'has no column none of encoded images, its columns are image: na'),
    (dict(image=['word']), None, r'x.parquet has no encoded images, its columns are image$'),
])
def test_a_column_that_does_not_fit(tmp_path, columns, column, says):
    parquet.write_table(pa.table(columns), tmp_path / 'x.parquet')
    with pytest.raises(DataError, match=says):
        read(tmp_path / 'x.parquet', column)


def test_damaged_shards(tmp_path):
    write_tar(tmp_path / 'cut.tar', [(f'{i}.png', bytes([65 + i]) * 3000) for i in range(3)])
    whole = (tmp_path / 'cut.tar').read_bytes()
    for size, images in (whole.index(b'C') + 2000, 2), (whole.index(b'2.png'), 2), (700, 0):
        (tmp_path / 'cut.tar').write_bytes(whole[:size])
        contents, reasons = read(tmp_path / 'cut.tar')
        assert len(contents) == images
        assert f'cut.tar is damaged after {images} images (' in reasons['cut.tar']
    write_tar(tmp_path / 'cut.tgz', [('0.png', os.urandom(9000))], 'w:gz')
    (tmp_path / 'cut.tgz').write_bytes((tmp_path / 'cut.tgz').read_bytes()[:5000])
    for name in 'a.tar', 'b.parquet', 'c.tgz':
        (tmp_path / name).write_text('words' * 300)
    (tmp_path / 'gone.tar').symlink_to('nowhere')
    os.mkfifo(tmp_path / 'pipe.parquet')
    for name, says in {
            'cut.tgz': 'is damaged after 0', 'a.tar': 'is damaged after 0', 'c.tgz': 'is damaged',
            'b.parquet': 'is damaged after 0', 'gone.tar': 'is a broken link',
            'pipe.parquet': 'is a broken link or no regular file'}.items():
        contents, reasons = read(tmp_path / name)
        assert not contents
        assert says in reasons[name]


def test_hostile_names_stay_within_the_results(tmp_path):
    write_tar(tmp_path / 'x.tar', [(name, b'0') for name in (
        '../../a.png', 'b/../../c.png', '/etc/d.png', 'f\x1b[2J.png', 'etc/d.png')])
    contents, reasons = read(tmp_path / 'x.tar')
    assert list(contents) == ['x/etc/d', 'x/f\x1b[2J']
    assert len(reasons) == 3
    write_parquet(tmp_path / 'y.parquet', [dict(bytes=b'0', path='a\0.png')])
    assert not read(tmp_path / 'y.parquet')[0]


def test_reading_needs_no_torch():
    run('-c', 'import sys, mmseg_edaformer.predict.shards; assert "torch" not in sys.modules')
