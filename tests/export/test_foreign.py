"""Files of other libraries' models, against those libraries' own pipelines."""
import numpy as np
import pytest
import torch
from PIL import Image

transformers = pytest.importorskip('transformers', reason='this exports models of transformers')
pytest.importorskip('onnxruntime', reason='this runs ONNX files')

from mmseg_edaformer import export as package  # noqa: E402
from mmseg_edaformer.errors import ConfigError  # noqa: E402
from mmseg_edaformer.export import Exported, export  # noqa: E402
from mmseg_edaformer.predict.segmenter import Segmenter  # noqa: E402
from tests.predict.foreign_models import own_labels, save, scene  # noqa: E402


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch):
    take_turns, trial_ratios = package.take_turns, package.trial_ratios
    monkeypatch.setattr(package, '_TWINS', 0)
    monkeypatch.setattr(package, 'trial_ratios', lambda *args: trial_ratios(*args)[:2])
    monkeypatch.setattr(package, 'take_turns', lambda calls, device, **_: take_turns(
        calls, device, repeats=3))


@pytest.mark.parametrize(('name', 'kind', 'ratio', 'size'), [
    ('Segformer', 'onnx', '2', None), ('Segformer', 'onnx', 'runtime', None),
    ('Beit', 'onnx', '2', (64, 64)),
    ('MobileViT', 'pt2', 'none', (64, 64)), ('DPT', 'pt2', 'none', (64, 64))])
def test_labels_are_those_of_transformers(tmp_path, name, kind, ratio, size):
    """Normalisation inside the graph is the processor's, of RGB, or of BGR as MobileViT's is."""
    side = 64 if size else 128
    square = dict(height=side, width=side)
    cropped = dict(crop_size=square) if name == 'MobileViT' else {}
    model, processor = save(tmp_path, name, seed=0 if size else 1, size=square, **cropped)
    out, image = tmp_path / f'x.{kind}', scene(side, side)
    export(tmp_path, out, format=kind, isr_ratio=ratio, size=size, labels=True)
    file, given = Exported(out), {}
    if ratio == 'runtime':
        ratio, given = '2', dict(isr_ratio='2')
    expected = own_labels(model, processor, image) if ratio == 'none' else Segmenter(
        tmp_path, device='cpu', isr_ratio=ratio)(np.ascontiguousarray(image[..., ::-1])).labels
    labels = file(image[None], **given)[0]
    assert len(np.unique(labels)) > 2
    assert np.count_nonzero(labels != expected) <= 2
    assert file.metadata['sha256'] is None
    assert f'makes all images {side}x{side}' in file.metadata['note']
    assert file.metadata['pipeline'][0]['size'] == square
    if size is None:
        keeping = Segmenter(tmp_path, device='cpu', keep_ratio=True, isr_ratio=ratio)
        image = scene(128, 256)
        assert np.count_nonzero(file(image[None], **given)[0] != keeping(
            np.ascontiguousarray(image[..., ::-1])).labels) <= 4


def test_a_module_and_padding(tmp_path):
    smp = pytest.importorskip('segmentation_models_pytorch', reason='this exports models of smp')
    torch.manual_seed(0)
    model = smp.Linknet('resnet18', encoder_weights=None, classes=7).eval()
    settings = dict(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25), classes=list('abcdefg'))
    out, image = tmp_path / 'x.pt2', scene(70, 90)
    with pytest.raises(ConfigError, match='padded to a multiple of 32: export labels'):
        export(model, out, format='pt2', **settings)
    export(model, out, format='pt2', size=(70, 90), labels=True, **settings)
    expected = Segmenter(model, device='cpu', **settings)(np.ascontiguousarray(image[..., ::-1]))
    assert np.count_nonzero(Exported(out)(image[None])[0] != expected.labels) <= 4
    Image.fromarray(image).save(tmp_path / 'x.png')
    segmenter = Segmenter(model, device='cpu', **settings)
    segmenter.model = package.Adapted(segmenter.model, segmenter.description.pipeline[-1])
    assert (package.read_images(segmenter, tmp_path / 'x.png', 1)[0] == image).all()


def test_what_cannot_be_exported(tmp_path):
    class Squaring:
        """A processor that is no normalisation."""

        def __call__(self, images, **_):
            return dict(pixel_values=torch.from_numpy(images / 255.)[None].permute(0, 3, 1, 2) ** 2)

    save(tmp_path / 'masks', 'Mask2Former')
    save(tmp_path / 'windows', 'UperNet')
    save(tmp_path / 'colours', 'Segformer')
    segmenter = Segmenter(tmp_path / 'colours', device='cpu')
    for name, message in (('masks', 'a Mask2FormerForUniversalSegmentation cannot be exported'),
                          ('windows', 'windows of a Swin Transformer.*--size')):
        with pytest.raises(ConfigError, match=message):
            export(tmp_path / name, tmp_path / 'x.pt2', format='pt2')
    with pytest.raises(ConfigError, match='the Squaring changes colours otherwise than by a mean'):
        package.Adapted(segmenter.model, dict(type=object, processor=Squaring()))
    assert not (tmp_path / 'x.pt2').exists()
