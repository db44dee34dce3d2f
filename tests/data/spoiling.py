"""Ways to spoil a drawn data set, and what an audit finds then."""
import numpy as np
from PIL import Image

from mmseg_edaformer.data.audit import audit
from mmseg_edaformer.data.drawing import PALETTE

IMAGES, MASKS = 'images/training', 'annotations/training'


def found(cfg, *splits, **kwargs):
    """What was found: the names of the files, or classes, by split and check."""
    done = audit(cfg, splits or ('train', 'val', 'test'), workers=1, **kwargs)
    return {(finding.split, finding.check): {'/'.join(name.split('/')[-2:])
                                             for name, _ in finding.items}
            for finding in done.findings}


def array(path):
    return np.array(Image.open(path))


def save(path, content):
    Image.fromarray(content).save(path)


def relabel(folder, change):
    for path in folder.iterdir():
        save(path, change(array(path)).astype(np.uint8))


def colours(path):
    save(path, np.array(PALETTE, np.uint8)[array(path)])


def recoloured(path):
    """A palette that holds the right colours, in the opposite order."""
    image = Image.fromarray(7 - array(path))
    image.putpalette(np.array(PALETTE[::-1], np.uint8).tobytes())
    image.save(path)


def turned(path):
    """As a phone saves it: pixels as its sensor has them, and a note."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(path).save(path, exif=exif)


def deep(path):
    Image.fromarray(array(path).astype(np.uint16)).save(path)


def cut(path):
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def smaller(path):
    save(path, array(path)[:-1])


def out_of_range(path):
    labels = array(path)
    labels[3, 4:6] = 9
    save(path, labels)


def unlabelled(path):
    save(path, np.full((64, 96), 255, np.uint8))


def names(folder, *indices):
    return {f'{folder.split("/")[-1]}/{index:05d}.png' for index in indices}


def binary(cfg, data):
    """Houses and the rest, stored as a drawing program stores them."""
    for folder in ('training', 'validation'):
        relabel(data / 'annotations' / folder, lambda labels: 255 * (labels == 3))
    cfg.model.decode_head.num_classes = 2
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.dataset.update(type='BaseSegDataset', img_suffix='.png', metainfo=dict(
            classes=('rest', 'house'), palette=PALETTE[:2]))
        loader.dataset.pipeline[1].num_classes = 2
