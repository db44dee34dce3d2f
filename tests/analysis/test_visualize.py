"""Attention, features and predictions as pictures: what is drawn is what the network computes."""
import math

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS
from PIL import Image
from torch import nn
from torch.overrides import _get_current_function_mode_stack

from mmseg_edaformer import register_isr
from mmseg_edaformer.analysis import sheets, visualize as subject
from mmseg_edaformer.analysis.attention import choose_layers, layer_names, look
from mmseg_edaformer.analysis.sheets import Projection, paint, relative_error
from mmseg_edaformer.analysis.visualize import choose_points, parse_point, visualize
from mmseg_edaformer.errors import CheckpointError, ConfigError, DataError, RatioError
from mmseg_edaformer.isr import isr
from mmseg_edaformer.predict.segmenter import Segmenter
from tests.conftest import ROOT, run, write_config

SIZE = (72, 104)  # ragged cells in most layers
POINTS = [(3., 5.), (60.5, 40.2), (103.9, 71.9)]


def save(config):
    """A work dir of a config with weights whose labels depend on the ratio."""
    init_default_scope('mmseg')
    torch.manual_seed(3)
    model = MODELS.build(Config.fromfile(config).model)
    model.init_weights()
    for module in model.modules():
        if isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
            nn.init.normal_(module.weight, 1, 0.5)
            nn.init.normal_(module.bias, 0, 0.5)
    nn.init.normal_(model.decode_head.conv_seg.weight, 0, 0.5)
    torch.save(dict(meta={}, state_dict=model.state_dict()), config.parent / 'best_mIoU_iter_4.pth')
    return config.parent


@pytest.fixture(scope='module')
def edaformer(scenes, tmp_path_factory):
    return save(write_config(tmp_path_factory.mktemp('edaformer'), scenes))


@pytest.fixture(scope='module')
def segformer(scenes, tmp_path_factory):
    config = tmp_path_factory.mktemp('segformer') / 'segformer.py'
    config.write_text(f'''
_base_ = ['{ROOT}/configs/segformer_b0_synthetic.py']
model = dict(data_preprocessor=dict(size=(64, 64)), backbone=dict(num_layers=[1, 1, 1, 1]))
''')
    return save(config)


@pytest.fixture(scope='module', params=['edaformer', 'segformer'])
def model(request):
    return Segmenter(request.getfixturevalue(request.param), device='cpu').model


@pytest.fixture
def picture(scenes):
    return scenes / 'images' / 'validation' / '00000.png'


@pytest.fixture
def mask(scenes):
    return scenes / 'annotations' / 'validation' / '00000.png'


def image():
    return torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(1))


def inputs_of(model, names, x):
    """What each layer is called with, and what it gives, by hooks."""
    calls, outs, handles = {}, {}, []
    modules = dict(model.named_modules())
    for name in names:
        handles += [
            modules[name].register_forward_pre_hook(
                lambda _, args, kwargs, name=name: calls.update({name: (args, kwargs)}),
                with_kwargs=True),
            modules[name].register_forward_hook(
                lambda _, args, out, name=name: outs.update({name: out}))]
    with torch.no_grad():
        logits = model(x)
    for handle in handles:
        handle.remove()
    return calls, outs, logits


def edaformer_softmax(module, args, kwargs, ratio):
    """The whole softmax, h x N x M, of embedding-free attention; rows and columns of its map."""
    x = args[0]
    kernel = [min(module.pool_ratio * ratio, side) for side in x.shape[2:]]
    pooled = module.kv(F.avg_pool2d(x, kernel))
    if module.kv_norm is not None:
        pooled = F.gelu(module.kv_norm(pooled))
    heads, dim = module.num_heads, x.shape[1] // module.num_heads
    q, k = (each[0].reshape(heads, dim, -1) for each in (x, pooled))
    return (torch.einsum('hdn,hdm->hnm', q, k) / math.sqrt(dim)).softmax(-1), x.shape[2:]


def segformer_softmax(module, args, kwargs, ratio):
    """The same of mmseg's spatial reduction attention, whose cells may be ragged."""
    tokens, (rows, columns) = args[0], args[1]
    keys = tokens
    sides = rows, columns
    if module.sr_ratio > 1:
        maps = module.sr(tokens.transpose(1, 2).reshape(1, -1, rows, columns))
        sides = maps.shape[2:]
        keys = module.norm(maps.flatten(2).transpose(1, 2))
    width = tokens.shape[-1]
    heads = module.num_heads
    weight, bias = module.attn.in_proj_weight, module.attn.in_proj_bias
    q, k = tokens[0] @ weight[:width].T + bias[:width], keys[0] @ weight[width:2 * width].T + (
        bias[width:2 * width])
    k = k.reshape(*sides, width)
    cells = [k[y:y + ratio, x:x + ratio].reshape(-1, width)
             for y in range(0, sides[0], ratio) for x in range(0, sides[1], ratio)]
    k = torch.stack([cell.mean(0) for cell in cells])
    counts = torch.tensor([float(len(cell)) for cell in cells])
    q, k = (each.reshape(len(each), heads, -1).transpose(0, 1) for each in (q, k))
    scores = q @ k.transpose(1, 2) / math.sqrt(width // heads)
    return (scores + counts.log()).softmax(-1), (rows, columns)


@pytest.mark.filterwarnings('ignore:a feature map is smaller')
@pytest.mark.parametrize('ratio', [1, 2, 3])
def test_attention_is_that_of_a_plain_softmax(model, ratio):
    oracle = edaformer_softmax if 'EFT' in type(model.backbone).__name__ else segformer_softmax
    names = list(layer_names(model))
    with isr(model, ratio):
        calls, outs, _ = inputs_of(model, names, image())
        seen, reasons = look(model, image(), names, POINTS)
    assert not reasons
    assert list(seen) == names
    modules = dict(model.named_modules())
    for name, found in seen.items():
        with torch.no_grad():
            softmax, grid = oracle(modules[name], *calls[name], ratio)
        stride = 2 ** math.ceil(math.log2(SIZE[0] / grid[0]))
        for point, weights in zip(POINTS, found.weights, strict=True):
            index = int(point[1] / stride) * grid[1] + int(point[0] / stride)
            assert weights.shape == softmax[:, index].shape
            assert torch.allclose(weights, softmax[:, index], atol=1e-5)
        assert torch.allclose(found.weights.sum(-1), torch.ones(3, softmax.shape[0]), atol=1e-5)
        # Shared out over the area, it is 1 on average.
        rows, columns = (np.diff(edges) for edges in found.cells)
        areas = rows[:, None] * columns
        assert np.allclose((found.density() * areas).sum((1, 2)) / areas.sum(), 1, atol=1e-5)
        # The features are what a hook sees, as a map.
        out = outs[name][0]
        plain = out if out.dim() == 3 else out.T.reshape(-1, *grid)
        assert torch.equal(found.features, plain)
        assert [len(edges) - 1 for edges in found.tokens] == list(grid)


def test_cells_lie_where_the_tokens_of_the_keys_do(model):
    """Each cell of keys, in pixels: trained pools drop what fills none, ISR's cells do not."""
    names = list(layer_names(model))
    modules = dict(model.named_modules())
    for ratio in 1, 2:
        with isr(model, ratio):
            seen, _ = look(model, image(), names, POINTS)
        for name, found in seen.items():
            stride = found.tokens[0][1]
            for edges, side in zip(found.cells, SIZE):
                tokens = math.ceil(side / stride)
                own = hasattr(modules[name], 'pool_ratio')
                pool = modules[name].pool_ratio * ratio if own else modules[name].sr_ratio
                wanted = [i * pool for i in range(tokens // pool + 1)]
                if not own:
                    wanted = sorted({*wanted[::ratio], wanted[-1]})
                assert (edges / stride).tolist() == wanted


def test_looking_changes_nothing_and_leaves_nothing(model):
    names = list(layer_names(model))
    before = {name: (type(module), set(vars(module)), len(module._forward_hooks),
                     len(module._forward_pre_hooks)) for name, module in model.named_modules()}
    for ratio in 1, 2:
        with isr(model, ratio), torch.no_grad():
            wanted = model(image())
            got = []
            handle = model.register_forward_hook(lambda _, args, out: got.append(out))  # noqa: B023
            look(model, image(), names, POINTS)
            handle.remove()
            assert torch.equal(got[0], wanted)
            assert torch.equal(model(image()), wanted)
    assert before == {name: (type(module), set(vars(module)), len(module._forward_hooks),
                             len(module._forward_pre_hooks))
                      for name, module in model.named_modules()}
    with pytest.raises(RuntimeError):
        look(model, image()[:, :1], names, POINTS)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not _get_current_function_mode_stack()


class Fused(nn.Module):
    """Attention behind a class token, with a mask, by the fused operator or spelt out."""

    def __init__(self, explicit=False):
        super().__init__()
        self.qkv, self.explicit = nn.Linear(16, 48), explicit
        self.bias = nn.Parameter(torch.randn(1, 1, 25, 25))

    def forward(self, x, size):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        if not self.explicit:
            out = F.scaled_dot_product_attention(q, k, v, self.bias, scale=0.7)
        else:
            out = (q @ k.transpose(-2, -1) * 0.7 + self.bias).softmax(-1) @ v
        return out.transpose(1, 2).flatten(2)

    def softmax(self, x):
        q, k, _ = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return torch.softmax(torch.einsum('bhnd,bhmd->bhnm', q, k) * 0.7 + self.bias, -1)[0]


class Windows(Fused):
    """The same in four windows."""

    def forward(self, x, size):
        q, k, v = self.qkv(x[:, 1:]).unflatten(1, (4, 6)).unflatten(-1, (3, 16)).unbind(-2)
        out = F.scaled_dot_product_attention(*(each[0][:, None] for each in (q, k, v)))
        return torch.cat([x[:, :1], out[:, 0].flatten(0, 1)[None]], 1)


class Net(nn.Module):

    def __init__(self, attention):
        super().__init__()
        self.stem, self.attn = nn.Conv2d(3, 16, 16, 16), attention

    def forward(self, image):
        x = self.stem(image)
        tokens = torch.cat([x.mean((2, 3))[:, None], x.flatten(2).transpose(1, 2)], 1)
        return self.attn(tokens, tuple(x.shape[2:]))


@pytest.mark.parametrize('explicit', [False, True])
def test_other_attention_with_masks_and_single_tokens(explicit):
    register_isr(Fused, grid='size', prefix=1)
    net, x = Net(Fused(explicit)).eval(), torch.randn(1, 3, 64, 96)
    calls, outs, _ = inputs_of(net, ['attn'], x)
    seen, _ = look(net, x, ['attn'], [(33., 20.)])
    found = seen['attn']
    with torch.no_grad():
        wanted = net.attn.softmax(calls['attn'][0][0])
    assert torch.allclose(found.weights[0], wanted[:, 1 + 1 * 6 + 2], atol=1e-6)
    assert found.single == 1
    assert found.density().shape == (1, 4, 6)
    assert torch.equal(found.features, outs['attn'][0, 1:].T.reshape(16, 4, 6))


def test_what_lies_on_no_map_is_told():
    register_isr(Windows, grid='size', prefix=1)
    net = Net(Windows())
    seen, reasons = look(net, torch.randn(1, 3, 64, 96), ['attn'], POINTS)
    assert not seen
    assert reasons == {'attn': 'Windows: its queries lie in windows or groups, not on one map'}


def test_pixels_have_the_value_of_their_cell():
    values = np.arange(6.).reshape(2, 3)
    edges = np.array([0, 8, 12]), np.array([0, 4, 8, 9])
    found = paint(values, edges, (14, 20), (1., 0.5))
    for y in range(14):
        for x in range(20):
            row = next((i for i in range(2) if edges[0][i] <= y + 0.5 < edges[0][i + 1]), None)
            column = next((i for i in range(3)
                           if edges[1][i] <= 0.5 * (x + 0.5) < edges[1][i + 1]), None)
            if row is None or column is None:
                assert math.isnan(found[y, x])
            else:
                assert found[y, x] == values[row, column]


def test_one_projection_for_all():
    torch.manual_seed(0)
    direction = F.normalize(torch.randn(6), dim=0)
    along = torch.randn(5, 7) * 10
    features = direction[:, None, None] * along + torch.randn(6, 5, 7) * 0.01 + 3
    projection = Projection.of(features)
    view = projection.view(features)
    assert abs(np.corrcoef(view.ravel(), along.numpy().ravel())[0, 1]) > 0.9999
    assert np.allclose(projection.view(2 * features - features), view)
    assert float(projection.axis[projection.axis.abs().argmax()]) > 0
    assert relative_error(features * 1.1, features) == pytest.approx(0.1, rel=1e-4)
    assert relative_error(features, features) == 0
    # Squared differences add up to that of the whole.
    each = projection.difference(features * 1.1, features)
    assert math.sqrt((each ** 2).mean()) == pytest.approx(0.1, rel=1e-4)
    assert np.isfinite(Projection.of(torch.zeros(4, 2, 2)).view(torch.zeros(4, 2, 2))).all()


def test_points():
    assert parse_point('12,7', (10, 20)) == (12, 7)
    assert parse_point('0.5,0.25', (10, 20)) == (10, 2)
    assert parse_point('1.0,1.0', (10, 20)) == (19, 9)
    labels = np.zeros((30, 40), np.uint8)
    labels[:, 25:] = 2
    labels[:6, :8] = 1
    (x, y), (x2, y2), (x3, y3) = choose_points(labels)
    assert [labels[y, x], labels[y2, x2], labels[y3, x3]] == [0, 2, 1]
    assert (x2 - 32) ** 2 + (y2 - 15) ** 2 < 80
    alone = choose_points(np.zeros((30, 40), np.uint8))
    assert len({*alone}) == 3
    assert choose_points(np.zeros((1, 1), np.uint8)) == [(0, 0)] * 3


@pytest.mark.parametrize(('point', 'says'), [
    ('20,5', 'point 20,5 lies outside of x.png, which has columns 0 to 19 and rows 0 to 9'),
    ('5,10', 'outside of x.png'), ('-1,5', 'outside'), ('1.2,0.5', 'outside'),
    ('5', "point '5' is none: give column and row in pixels, 120,80"),
    ('a,b', "point 'a,b'"), ('1,2,3', "point '1,2,3'"), ('', "point ''"), ('.,1', "point '.,1'"),
])
def test_points_that_are_none(point, says):
    with pytest.raises(ConfigError, match=says):
        parse_point(point, (10, 20), 'x.png')


def silent(*args, **options):
    return visualize(*args, **{'say': lambda text: None, **options})


def test_sheets(edaformer, segformer, picture, mask, tmp_path):
    segmenter = Segmenter(edaformer, device='cpu')
    texts = []
    written = silent(segmenter, [picture], tmp_path, ratios=['none', '2', '2211-222'],
                     others=[('segformer', Segmenter(segformer, device='cpu'))], labels=mask,
                     points=['10,10', '0.9,0.9'], say=texts.append)
    assert [path.name for path in written] == [
        f'00000_{kind}.png' for kind in ('attention', 'features', 'predictions')]
    assert sorted(path.name for path in tmp_path.iterdir()) == [path.name for path in written]
    assert str(segmenter.isr_ratio) == '1'
    sizes = []
    for path in written:
        with Image.open(path) as sheet:
            sheet.load()
            sizes.append(sheet.size)
            assert np.array(sheet).std() > 20
    width, height = 300, 200  # a panel of the 96x64 picture
    assert sizes[0][0] == 40 + 220 + 2 * (3 * (width + 10) + 64) + 10
    assert sizes[1][0] == 40 + 220 + 5 * (width + 10) + 2 * 64 + 10
    assert sizes[2][0] == 40 + 4 * (440 + 10) - 10
    assert sizes[0][1] > 7 * height
    # The figures are those of the predictions.
    labels = {}
    for ratio in 'none', '2':
        segmenter.isr_ratio = ratio
        labels[ratio] = segmenter(picture).labels
    changed = (labels['2'] != labels['none']).mean()
    assert changed > 0
    line = next(line for line in texts[0].splitlines() if '| ISR 2 ' in line)
    assert line.split()[-2] == f'{changed:.1%}'
    assert 'segformer' in texts[0]
    assert f'point 1 at 10,10: {segmenter.classes[labels["none"][10, 10]]}' in texts[0]


def test_the_panels_are_what_they_say(edaformer, picture, mask, tmp_path):
    """Painted cells show in the sheet, and truth is that of the mask."""
    segmenter = Segmenter(edaformer, device='cpu')
    name = 'backbone.stages.0.blocks.0.attn'
    silent(segmenter, [picture], tmp_path, ratios=['none'], points=['40,20'], layers=[name],
           labels=mask)
    sheet = np.array(Image.open(tmp_path / '00000_attention.png'))
    one = subject._subject(segmenter, picture, ['40,20'], segmenter.isr_ratio)
    seen, _ = look(segmenter.model, one.inputs, [name], [one.to_inputs((40, 20))])
    density = seen[name].density()[0]
    panel = sheets._heat(one, density, seen[name].cells, (300, 200), float(density.max()))
    sheets._cross(panel, one, (40, 20))
    x, y = cv2.minMaxLoc(cv2.matchTemplate(sheet, np.array(panel), cv2.TM_SQDIFF))[2]
    assert (sheet[y:y + 200, x:x + 300] == np.array(panel)).all()
    truth = subject._read_labels(mask.parent, picture, (64, 96), 8, False)
    assert (truth == np.array(Image.open(mask))).all()
    zero = subject._read_labels(mask, picture, (64, 96), 8, True)
    assert ((zero == 255) == ((truth == 0) | (truth == 255))).all()


def test_segformer_at_every_ratio(segformer, picture, tmp_path):
    segmenter = Segmenter(segformer, device='cpu')
    assert choose_layers(segmenter.model) == [f'backbone.layers.{i}.1.0.attn' for i in range(4)]
    written = silent(segmenter, [picture], tmp_path, ratios=['none', '2211-222', 'auto'],
                     layers=['backbone.layers.[03]*'])
    assert len(written) == 3


def test_two_pictures_of_one_name_keep_apart(edaformer, picture, tmp_path):
    (tmp_path / 'a').mkdir()
    for name in 'x.png', 'x.jpg', 'a/x.png':
        Image.open(picture).save(tmp_path / name)
    written = silent(Segmenter(edaformer, device='cpu'), [tmp_path], tmp_path / 'out',
                     ratios=['none'], layers=['*stages.0*'], points=['1,1'])
    assert sorted({path.relative_to(tmp_path / 'out').as_posix() for path in written})[::3] == [
        'a/x_attention.png', 'x.jpg_attention.png', 'x.png_attention.png']


class NoAttention(nn.Module):
    """A segmentor without any."""


@pytest.mark.parametrize(('options', 'error', 'says'), [
    (dict(pictures=['none.png']), DataError, 'no such file or folder: .*none.png'),
    (dict(pictures=['text.png']), DataError, 'image cannot be decoded: .*text.png'),
    (dict(pictures=['a.png', 'b/a.png']), DataError, 'under one name'),
    (dict(points=['96,3']), ConfigError, 'point 96,3 lies outside of .*a.png.* columns 0 to 95'),
    (dict(layers=['nothing']), ConfigError, r'no attention layer is called nothing. There are: '
     r'backbone.stages.0.blocks.0.attn, .*decode_head.levels.2.2.attn'),
    (dict(ratios=['fast']), RatioError, "isr_ratio 'fast' means nothing"),
    (dict(ratios=['none', '22-222']), RatioError, '2 multipliers for the encoder'),
    (dict(out='text.png'), ConfigError, 'text.png cannot be written to'),
    (dict(out='text.png/below'), ConfigError, 'below cannot be written to'),
    (dict(labels='none.png'), DataError, 'mask not found: .*none.png'),
    (dict(labels='b'), DataError, 'mask .*a.png'),
    (dict(labels='void'), DataError, r'void holds 0 masks called a.\*, not one'),
    (dict(labels='a.png', pictures=['a.png', 'c.png']), ConfigError,
     'of several pictures, give the folder of their masks'),
])
def test_bad_input(edaformer, picture, tmp_path, options, error, says):
    (tmp_path / 'b').mkdir()
    (tmp_path / 'void').mkdir()
    (tmp_path / 'text.png').write_text('words')
    for name in 'a.png', 'b/a.png', 'c.png':
        Image.open(picture).save(tmp_path / name)
    options = dict(pictures=['a.png'], out='out') | options
    paths = [tmp_path / name for name in options.pop('pictures')]
    if 'labels' in options:
        options['labels'] = tmp_path / options['labels']
    with pytest.raises(error, match=says):
        silent(Segmenter(edaformer, device='cpu'), paths, tmp_path / options.pop('out'), **options)
    assert not list(tmp_path.glob('out/*'))


def test_models_that_do_not_fit(edaformer, segformer, picture, tmp_path):
    with pytest.raises(ConfigError, match=r'NoAttention holds no attention that can be shown'):
        choose_layers(NoAttention())
    with pytest.raises(CheckpointError, match='does not fit the model'):
        Segmenter(segformer / 'segformer.py', edaformer / 'best_mIoU_iter_4.pth', device='cpu')
    segmenter, other = (Segmenter(edaformer, device='cpu') for _ in range(2))
    object.__setattr__(other.description, 'classes', ('one', 'two'))
    with pytest.raises(ConfigError, match=r'cars predicts 2 classes that are not the 8 of '):
        silent(segmenter, [picture], tmp_path / 'out', others=[('cars', other)])


def test_command_line(edaformer, segformer, picture, tmp_path):
    checkpoint = segformer / 'best_mIoU_iter_4.pth'
    done = run('tools/visualize.py', picture, '--model', edaformer, '--out', tmp_path / 'out',
               '--with', f'{segformer / "segformer.py"}:{checkpoint}', '--isr-ratios', 'none', '2',
               '--layers', 'decode_head.*', '--device', 'cpu')
    assert len(list((tmp_path / 'out').iterdir())) == 3
    for text in 'decode_head.levels.2.2.attn', 'ISR 2', 'segformer', 'Written: ':
        assert text in done.stdout
    assert 'Warning' not in done.stderr
