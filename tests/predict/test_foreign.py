"""Models of other libraries, against those libraries' own pipelines."""
import importlib
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.runner import CheckpointLoader
from mmseg.datasets import ADE20KDataset
from mmseg.registry import MODELS

transformers = pytest.importorskip('transformers', reason='this checks models of transformers')

from mmseg_edaformer import ISRRatio  # noqa: E402
from mmseg_edaformer.command_line import find_in_zoo  # noqa: E402
from mmseg_edaformer.errors import CheckpointError, ConfigError, UserError  # noqa: E402
from mmseg_edaformer.predict import foreign  # noqa: E402
from mmseg_edaformer.predict.segformer import convert_segformer  # noqa: E402
from mmseg_edaformer.predict.segmenter import Segmenter  # noqa: E402
from tests.conftest import run  # noqa: E402

from .foreign_models import (  # noqa: E402
    MASKS,
    NAMES,
    PER_PIXEL,
    change_json,
    make_processor,
    own_labels,
    save,
    scene,
)


def differing(segmenter, image, labels):
    """The number of pixels whose labels differ from the expected ones."""
    found = segmenter(np.ascontiguousarray(image[..., ::-1])).labels
    assert found.shape == labels.shape
    return np.count_nonzero(found != labels)


@pytest.fixture(scope='module')
def segformer(tmp_path_factory):
    """A folder of SegFormer; read-only."""
    folder = tmp_path_factory.mktemp('segformer')
    save(folder, 'Segformer')
    return folder


@pytest.mark.parametrize('name', [*PER_PIXEL, *MASKS])
def test_labels_are_those_of_transformers(name, tmp_path):
    """Of images that the processor squeezes, pads, crops, tiles, or takes as they are."""
    model, processor = save(tmp_path, name)
    segmenter = Segmenter(tmp_path, device='cpu')
    assert list(segmenter.classes) == NAMES
    for size in (64, 64), (70, 133), (150, 96):
        image = scene(*size)
        labels = own_labels(model, processor, image)
        assert len(np.unique(labels)) > (2 if name in PER_PIXEL else 1)
        assert differing(segmenter, image, labels) <= labels.size // 2000


def test_the_dial_comes_off_bit_for_bit(segformer, capfd):
    image = scene(70, 133)
    segmenter = Segmenter(segformer, device='cpu')
    assert 'Loading weights' not in capfd.readouterr().err
    assert transformers.logging.is_progress_bar_enabled()
    inputs = segmenter.load(image)[1]['inputs'][None]
    with torch.no_grad():
        trained = segmenter.model(inputs)
        segmenter.isr_ratio = 2
        assert not torch.equal(segmenter.model(inputs), trained)
        segmenter.isr_ratio = 'none'
        assert torch.equal(segmenter.model(inputs), trained)
    assert Segmenter(segformer, isr_ratio='auto').isr_ratio == ISRRatio.parse('auto')


def test_a_model_in_memory(segformer):
    """Its processor comes from where it was loaded from."""
    model = transformers.AutoModelForSemanticSegmentation.from_pretrained(segformer)
    image = scene(70, 133)
    segmenter = Segmenter(segformer, device='cpu')
    assert not differing(Segmenter(model, device='cpu'), image,
                         segmenter(image[..., ::-1].copy()).labels)
    assert Segmenter(model, device='cpu', classes=list('abcdefg')).classes == tuple('abcdefg')
    with pytest.raises(ConfigError, match='predicts 7 classes, and classes= names 2'):
        Segmenter(model, device='cpu', classes=['a', 'b'])
    with pytest.raises(ConfigError, match='has its own weights: leave'):
        Segmenter(segformer, 'x.pth', device='cpu')


def test_the_ratio_of_images_is_kept(segformer):
    image = scene(70, 133)
    squeezing = Segmenter(segformer, device='cpu')
    assert 'makes all images 64x64' in str(squeezing)
    assert squeezing.load(image)[1]['inputs'].shape == (3, 64, 64)
    keeping = Segmenter(segformer, device='cpu', keep_ratio=True)
    assert str(keeping).endswith('images keep their ratio, with 64 pixels on the shorter side')
    assert keeping.load(image)[1]['inputs'].shape == (3, 64, 128)
    assert keeping(image).labels.shape == (70, 133)
    capped = Segmenter(segformer, device='cpu', max_side=96)
    assert 'at most 96 on the longer one' in str(capped)
    assert capped.load(image)[1]['inputs'].shape == (3, 64, 96)
    assert capped.load(scene(32, 64))[1]['inputs'].shape == (3, 32, 64)
    assert len({one.fingerprint() for one in (squeezing, keeping, capped)}) == 3
    assert Segmenter(segformer, device='cpu').fingerprint() == squeezing.fingerprint()


def test_a_processor_that_keeps_the_ratio(tmp_path):
    processor = make_processor('Segformer', do_resize=False)
    model, _ = save(tmp_path, 'Segformer', processor=processor)
    segmenter = Segmenter(tmp_path, device='cpu', keep_ratio=True)
    assert '\n' not in str(segmenter)
    image = scene(96, 160)
    assert differing(segmenter, image, own_labels(model, processor, image)) <= 8
    save(tmp_path / 'masks', 'Mask2Former')
    with pytest.raises(ConfigError, match='chooses the size of images itself'):
        Segmenter(tmp_path / 'masks', device='cpu', max_side=64)


def test_large_images_in_little_memory(segformer):
    """150 classes at 24 megapixels take 14 GiB as logits of full size."""
    config = transformers.SegformerConfig(num_labels=150)
    model = foreign.Foreign(transformers.SegformerForSemanticSegmentation(config).eval())
    sample = SimpleNamespace(metainfo=dict(ori_shape=(4000, 6000), img_shape=(128, 128)))
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        labels = model.predict_labels(torch.randn(1, 3, 64, 64), [sample])
    assert labels[0].shape == (4000, 6000)
    sizes = [event.nbytes() for event in profile.profiler.kineto_results.events()
             if event.name() == '[memory]']
    total = peak = 0
    for size in sizes:
        total += size
        peak = max(peak, total)
    assert 24e6 <= peak < 2 ** 30


def test_colours_are_those_of_a_known_data_set(tmp_path):
    names = [f'{name} , or so' for name in ADE20KDataset.METAINFO['classes'][:149]] + ['thing']
    save(tmp_path, 'Segformer')
    model = transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(
        num_labels=150, id2label=dict(enumerate(names)), hidden_sizes=[8, 16, 32, 64],
        num_attention_heads=[1, 2, 4, 8], depths=[1, 1, 1, 1], decoder_hidden_size=16))
    model.save_pretrained(tmp_path)
    segmenter = Segmenter(tmp_path, device='cpu')
    assert list(segmenter.classes) == names
    assert [list(colour) for colour in segmenter.description.palette] == (
        ADE20KDataset.METAINFO['palette'])


def test_made_up_colours_differ(segformer):
    palette = np.array(Segmenter(segformer, device='cpu').description.palette)
    apart = np.abs(palette[:, None] - palette).sum(-1) + 999 * np.eye(len(NAMES), dtype=int)
    assert apart.min() > 60


def test_old_weights(segformer, tmp_path):
    """A pytorch_model.bin is read without unpickling anything else."""
    shutil.copytree(segformer, tmp_path / 'old')
    model = transformers.AutoModelForSemanticSegmentation.from_pretrained(segformer)
    (tmp_path / 'old' / 'model.safetensors').unlink()
    torch.save(model.state_dict(), tmp_path / 'old' / 'pytorch_model.bin')
    image = scene(70, 133)
    expected = Segmenter(segformer, device='cpu')(image).labels
    assert (Segmenter(tmp_path / 'old', device='cpu')(image).labels == expected).all()

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'owned'),)
    torch.save(dict(model.state_dict(), evil=Evil()), tmp_path / 'old' / 'pytorch_model.bin')
    with pytest.raises(CheckpointError, match='cannot be loaded by transformers'):
        Segmenter(tmp_path / 'old', device='cpu')
    assert not (tmp_path / 'owned').exists()


def without(name):
    return lambda folder: (folder / name).unlink()


def changed(name, **values):
    return lambda folder: change_json(folder / name, **values)


@pytest.mark.parametrize(('spoil', 'says'), [
    (without('config.json'), 'is not the work dir of a training: it holds no config, nor the '
     r'config\.json'),
    (without('model.safetensors'), r'cannot be loaded by transformers .*model\.safetensors'),
    (lambda folder: (folder / 'config.json').write_text('{'), r'config\.json is damaged .*: copy'),
    (without('preprocessor_config.json'), r'lacks preprocessor_config\.json'),
    (lambda folder: (folder / 'model.safetensors').write_bytes(b'x' * 99), 'cannot be loaded by'),
    (changed('config.json', id2label={'0': 'a', '1': 'b'}, label2id={}),
     r'are not those of a SegformerForSemanticSegmentation with 2 classes: decode_head\.'),
    (changed('config.json', model_type='vit'), 'no model for semantic segmentation'),
    (changed('config.json', model_type='mine', auto_map={'AutoConfig': 'mine.Config'}),
     'asks for code of its own, which is never run'),
    (changed('config.json', model_type='mine'), 'is a mine, which transformers .* does not know'),
    (changed('preprocessor_config.json', image_processor_type='CLIPImageProcessor'),
     'the processor of .*, a CLIPImageProcessor, cannot make label maps of a SegformerFor'),
    (changed('preprocessor_config.json', image_processor_type='MaskFormerImageProcessor'),
     'the processor of .*, a MaskFormerImageProcessor, cannot make label maps'),
])
def test_folders_that_do_not_fit(spoil, says, segformer, tmp_path):
    shutil.copytree(segformer, tmp_path / 'model')
    spoil(tmp_path / 'model')
    with pytest.raises(UserError, match=says) as caught:
        Segmenter(tmp_path / 'model', device='cpu')
    assert '\n' not in str(caught.value)
    assert len(str(caught.value)) < 700


def test_names_of_the_hub(monkeypatch, segformer):
    """They are downloaded by the library; here nothing can be."""
    hub = pytest.importorskip('huggingface_hub')
    monkeypatch.setattr(hub.constants, 'HF_HUB_OFFLINE', True)
    with pytest.raises(CheckpointError, match='no such model: nobody/nothing: it is no folder or '
                       'file here, and the hub does not give'):
        Segmenter('nobody/nothing', device='cpu')
    asked = []

    def download(name, file):
        asked.append((name, file))
        return str(segformer / file)
    monkeypatch.setattr(hub, 'hf_hub_download', download)
    with pytest.raises(CheckpointError, match='nobody/nothing cannot be loaded by transformers'):
        Segmenter('nobody/nothing', device='cpu')
    assert set(asked) == {('nobody/nothing', 'config.json')}


@pytest.fixture(scope='module')
def smp():
    return pytest.importorskip('segmentation_models_pytorch', reason='this checks models of smp')


@pytest.fixture(autouse=True)
def _known_encoders(request, monkeypatch):
    """The settings of encoders, which smp downloads."""
    if 'smp' in request.fixturenames:
        smp = request.getfixturevalue('smp')
        monkeypatch.setattr(smp.encoders, 'get_preprocessing_params', lambda name: dict(
            input_space='BGR', input_range=[0, 255], mean=[103., 116., 123.], std=[50., 60., 70.]))


def save_smp(smp, folder, architecture='Unet', classes=7, **settings):
    """A model with weights that see several classes; saved."""
    torch.manual_seed(0)
    model = getattr(smp, architecture)('resnet18', encoder_weights=None, classes=classes,
                                       **settings).eval()
    last = model.segmentation_head[0]
    torch.nn.init.normal_(last.weight)
    with torch.no_grad():
        inputs = smp_inputs(smp, model, scene(64, 96))
        last.bias -= last(model.decoder(model.encoder(inputs))).mean((0, 2, 3))
    model.save_pretrained(folder)
    return model


def smp_inputs(smp, model, image):
    """What smp's own function makes of an image, padded where the model asks for it."""
    encoders = importlib.import_module('segmentation_models_pytorch.encoders._preprocessing')
    inputs = encoders.preprocess_input(image, **smp.encoders.get_preprocessing_params('resnet18'))
    inputs = torch.from_numpy(inputs).permute(2, 0, 1)[None].float()
    if not model.requires_divisible_input_shape:
        return inputs
    height, width = image.shape[:2]
    return F.pad(inputs, (0, -width % 32, 0, -height % 32))


def own_smp_labels(smp, model, image):
    """The labels of an image by smp."""
    logits = model(smp_inputs(smp, model, image))
    logits = (logits[0] if isinstance(logits, tuple) else logits)[
        ..., :image.shape[0], :image.shape[1]]
    if logits.shape[1] == 1:
        return (logits[0, 0] > (0.5 if model.config.get('activation') else 0)).numpy()
    return logits[0].argmax(0).numpy()


@pytest.mark.parametrize('settings', [
    dict(classes=7), dict(classes=1), dict(classes=1, activation='sigmoid'),
    dict(architecture='Linknet', aux_params=dict(classes=3))], ids=str)
def test_labels_are_those_of_smp(settings, smp, tmp_path, capsys):
    model = save_smp(smp, tmp_path, **settings)
    segmenter = Segmenter(tmp_path, device='cpu')
    assert len(segmenter.classes) == max(2, settings.get('classes', 7))
    for size in (64, 96), (70, 133):
        image = scene(*size)
        with torch.no_grad():
            labels = own_smp_labels(smp, model, image)
        assert len(np.unique(labels)) > 1
        assert differing(segmenter, image, labels) <= labels.size // 2000
    smaller = Segmenter(tmp_path, device='cpu', max_side=96)
    assert smaller(scene(100, 200)).labels.shape == (100, 200)
    assert Segmenter(model, device='cpu').classes == segmenter.classes


def test_smp_without_the_settings_of_its_encoder(smp, tmp_path, monkeypatch):
    def fail(name):
        raise OSError('no network')
    save_smp(smp, tmp_path)
    monkeypatch.setattr(smp.encoders, 'get_preprocessing_params', fail)
    assert "images are normalised as ImageNet's" in str(Segmenter(tmp_path, device='cpu'))
    change_json(tmp_path / 'config.json', classes=3)
    with pytest.raises(CheckpointError, match='cannot be loaded by segmentation_models_pytorch'):
        Segmenter(tmp_path, device='cpu')
    change_json(tmp_path / 'config.json', _model_class='os')
    with pytest.raises(CheckpointError, match='cannot be loaded by segmentation_models_pytorch'):
        Segmenter(tmp_path, device='cpu')


class Plain(torch.nn.Module):
    """Logits of a quarter of the image's size, from a convolution."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.layer = torch.nn.Conv2d(3, 4, 4, 4)

    def forward(self, images):
        return SimpleNamespace(logits=self.layer(images))


def test_a_module_of_your_own():
    model, image = Plain(), scene(72, 136)
    known = dict(classes=NAMES[:4], mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.1))
    inputs = (torch.from_numpy(image) / 255 - torch.tensor(known['mean'])) / torch.tensor(
        known['std'])
    with torch.no_grad():
        logits = F.interpolate(model(inputs.permute(2, 0, 1)[None]).logits, (72, 136), None,
                               'bilinear')
    labels = logits[0].argmax(0).numpy()
    assert len(np.unique(labels)) > 2
    segmenter = Segmenter(model, device='cpu', **known)
    assert differing(segmenter, image, labels) <= 4
    assert str(segmenter) == 'Plain, 4 classes, on cpu'
    for change, says in ((dict(classes=NAMES), 'predicts 4 classes, and classes= names 7'),
                         (dict(classes=None), 'give classes=, and mean= and std='),
                         (dict(std=None), 'give classes=, and mean= and std=')):
        with pytest.raises(ConfigError, match=says):
            Segmenter(model, device='cpu', **known | change)


def test_a_name_of_the_zoo(tmp_path, monkeypatch):
    """mmengine finds its config, and its weights where none are given."""
    name, asked = 'segformer_mit-b0_8xb2-160k_ade20k-512x512', []

    def download(url, *_):
        asked.append(url)
        raise OSError('no network')
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointLoader, 'load_checkpoint', download)
        with pytest.raises(OSError, match='no network'):
            Segmenter(name, device='cpu')
    assert asked[0].startswith('https://download.openmmlab.com/mmsegmentation/v0.5/segformer/')
    model = MODELS.build(Config.fromfile(find_in_zoo(name)).model)
    torch.save(dict(state_dict=model.state_dict(), meta={}), tmp_path / 'weights.pth')
    segmenter = Segmenter(name, tmp_path / 'weights.pth', device='cpu')
    assert len(segmenter.classes) == 150
    with pytest.raises(ConfigError, match='no such model: segformer_mit-b9'):
        Segmenter('segformer_mit-b9', device='cpu')
    with pytest.raises(ConfigError, match='keep_ratio is not for'):
        Segmenter(name, tmp_path / 'weights.pth', keep_ratio=True)


def test_half_a_normalisation_is_refused(segformer):
    for options in (dict(std=(1, 1, 1)), dict(mean=(0, 0, 0), std=(1, 1, 1))):
        with pytest.raises(ConfigError, match='mean= and std= go together'):
            Segmenter(segformer, device='cpu', **options)


def test_a_segformer_becomes_one_of_mmseg(segformer, tmp_path):
    """In a file that needs no other library, with the logits of transformers."""
    run('tools/convert_checkpoint.py', segformer, tmp_path / 'model.safetensors')
    own = Segmenter(tmp_path / 'model.safetensors', device='cpu')
    assert own.classes == tuple(NAMES)
    model = transformers.AutoModelForSemanticSegmentation.from_pretrained(segformer).eval()
    inputs = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected = model(inputs).logits
        assert expected.std() > 0.1
        torch.testing.assert_close(own.model._forward(inputs), expected)
    image = scene(300, 410)[..., ::-1].copy()  # which the processor squeezes
    assert (own(image).labels == Segmenter(segformer, device='cpu')(image).labels).mean() > 0.99
    save(tmp_path / 'dpt', 'DPT')
    with pytest.raises(CheckpointError, match='is a DPTForSemanticSegmentation, which is not conv'):
        convert_segformer(str(tmp_path / 'dpt'), tmp_path / 'dpt.safetensors')
