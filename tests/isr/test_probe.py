"""Whose keys stand where is found out, not guessed: models that no table knows."""
import copy
import pickle
import types
import warnings

import pytest
import torch
from torch import nn

from mmseg_edaformer import apply_isr, isr, register_isr, remove_isr, report_isr
from mmseg_edaformer.errors import RatioError
from mmseg_edaformer.isr import Patches
from mmseg_edaformer.isr.registry import find_attention

from .check import check_adapter

WIDTH, SIZE, GRID = 32, (64, 80), (8, 10)


class Attention(nn.Module):
    """A ViT's, as it stands in many repositories."""

    def __init__(self):
        super().__init__()
        self.num_heads = 2
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(x).reshape(x.shape[0], -1, 3, 2, WIDTH // 2).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(WIDTH), Attention()
        self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU())

    def forward(self, x):
        x = x + self.attn(self.norm(x))
        return x + self.mlp(x)


class ViT(nn.Module):
    """Patches and other tokens; ``arrange`` says in which order."""
    img_size = SIZE

    def __init__(self, arrange, front=1, behind=0, channels=3):
        super().__init__()
        self.arrange = arrange
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(channels, WIDTH, 8, 8)
        self.front = nn.Parameter(torch.randn(1, front, WIDTH))
        self.behind = nn.Parameter(torch.randn(1, behind, WIDTH))
        self.local = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
        self.blocks = nn.Sequential(Block(), Block())

    def embed(self, image):
        return self.patch_embed.proj(image).flatten(2).transpose(1, 2)

    def forward(self, image):
        return self.blocks(self.arrange(self, self.embed(image)))


def around(model, x):
    return torch.cat([model.front.expand(x.shape[0], -1, -1), x,
                      model.behind.expand(x.shape[0], -1, -1)], 1)


def mixed(model, x):
    """A convolution over the map, so that tokens know of their neighbours."""
    maps = x.transpose(1, 2).unflatten(-1, GRID)
    return around(model, x + 0.3 * model.local(maps).flatten(2).transpose(1, 2))


def shuffled(model, x):
    return x[:, torch.randperm(x.shape[1])]


def added_in_place(model, x):
    x += torch.linspace(-1, 1, WIDTH)
    return x


def by_column(model, x):
    return x.unflatten(1, GRID).transpose(1, 2).flatten(1, 2)


def with_mean(model, x):
    return torch.cat([x.mean(1, keepdim=True), x], 1)


def with_pruned(model, x):
    return x[:, ::2]


@pytest.mark.parametrize(('arrange', 'front', 'behind', 'size'), [
    (mixed, 5, 2, SIZE), *((*case, size) for size in (SIZE, (72, 88)) for case in (
        (around, 1, 0), (around, 0, 0), (around, 1, 9), (around, 0, 3), (added_in_place, 0, 0)))])
def test_tokens_on_either_side_are_found(arrange, front, behind, size):
    check_adapter(ViT(arrange, front, behind), torch.randn(1, 3, *size),
                  [(size[0] // 8, size[1] // 8)], prefix=front, suffix=behind, expected=2,
                  compiled=False)


@pytest.mark.parametrize(('arrange', 'reason'), [
    (shuffled, 'do not stand row by row'), (by_column, 'do not stand row by row'),
    (with_pruned, 'do not stand row by row'), (with_mean, 'depend on the image too')])
def test_what_is_no_map_is_refused(arrange, reason):
    model = ViT(arrange).eval()
    for strict in (False, True):
        with pytest.raises(RatioError, match=rf'blocks\.1\.attn: Attention: .*{reason}'):
            apply_isr(model, 2, strict=strict)
    with pytest.raises(RatioError) as error:  # a list has no forward
        apply_isr(nn.ModuleList([model, ViT(around)]), 2)
    assert all(f'{number}.blocks.{block}.attn: Attention' in str(error.value)
               for number in range(2) for block in range(2))


class Tracker(ViT):
    """Two images, whose patches stand behind each other."""

    def forward(self, template, image):
        return self.blocks(torch.cat([self.embed(template), self.embed(image)], 1))


@pytest.mark.parametrize('template', [(32, 32), SIZE])
def test_patches_of_two_images_are_refused(template):
    model = Tracker(None).eval()
    with pytest.raises(RatioError, match=r'missing 1 required.*: give it what it takes as'):
        apply_isr(model, 2)
    images = torch.randn(1, 3, *template), torch.randn(1, 3, *SIZE)
    reason = r'more than one map|do not stand row by row|depend on the image'
    with pytest.raises(RatioError, match=reason):
        apply_isr(model, 2, example_inputs=images)
    with pytest.raises(RatioError, match=reason):
        report_isr(model, 2, example_inputs=dict(template=images[0], image=images[1]))


class TwoOrders(Attention):
    """Its second head sees the tokens column by column, by smaller keys."""

    def forward(self, x):
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, 2, -1).permute(2, 0, 3, 1, 4)
        k = torch.stack([k[:, 0], 0.1 * by_column(self, k[:, 1])], 1)
        v = torch.stack([v[:, 0], by_column(self, v[:, 1])], 1)
        return self.proj(((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).flatten(2))


class Queries(ViT):
    """Learned queries, as many as patches, go through the same attention first."""

    def forward(self, image):
        x = self.embed(image)
        queries = self.blocks[0](self.front)
        return self.blocks[1](self.blocks[0](x)) + queries


def test_attention_that_is_only_partly_over_the_map_is_refused():
    model = ViT(around, 0).eval()
    for block in model.blocks:
        block.attn.__class__ = type('Attention', (TwoOrders,), {})
    with pytest.raises(RatioError, match=r'do not stand row by row'):
        apply_isr(model, 2)
    model = Queries(None, 80).eval()
    apply_isr(model, 2)
    assert not hasattr(model.blocks[0].attn, 'isr_reduction')
    assert hasattr(model.blocks[1].attn, 'isr_reduction')
    with pytest.raises(RatioError, match=r'blocks\.0\.attn: Attention: it also attends to some'):
        apply_isr(model, 2, strict=True)


def test_the_whole_model_of_a_library_is_run_once():
    """It declares its tokens; if its forward is somebody else's, they are looked for."""
    timm = pytest.importorskip('timm', reason='timm is not installed')
    calls = []

    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.vit = timm.create_model('vit_tiny_patch16_224', img_size=64, embed_dim=WIDTH,
                                         depth=2, num_heads=2, num_classes=0, reg_tokens=2)

        def forward(self, image):
            calls.append(1)
            return self.vit(image)

    def reversed_order(vit, image):
        x = vit.patch_embed(image)
        return vit.blocks(torch.cat([x.flip(1), vit.cls_token.expand(len(x), -1, -1)], 1))

    model, image = Mine(), torch.randn(1, 3, 64, 64)
    apply_isr(model, 2)
    assert len(calls) == 1
    assert model.vit.blocks[0].attn.isr_reduction.rule.prefix == ('num_prefix_tokens',)
    remove_isr(model)
    check_adapter(model, image, [(4, 4)], prefix=3, expected=2, compiled=False, pickled=False)
    other = Mine()
    other.vit.forward = types.MethodType(reversed_order, other.vit)
    with pytest.raises(RatioError, match='do not stand row by row'):
        apply_isr(other, 2)


def test_nothing_is_left_behind():
    model = ViT(around).train()
    state = torch.random.get_rng_state()
    apply_isr(model, 2)
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), state)
    remove_isr(model)
    assert not model._forward_hooks
    assert not any(hasattr(type(module), 'isr_original') for module in model.modules())


class Outside(ViT):
    """A network that calls the parts of its attention itself."""

    def forward(self, image):
        x = self.embed(image)
        for block in self.blocks:
            q, k, v = block.attn.qkv(block.norm(x)).chunk(3, -1)
            x = x + block.attn.proj((q @ k.transpose(-2, -1)).softmax(-1) @ v)
        return x


def test_attention_that_never_runs_is_told_once():
    model, image = Outside(None).eval(), torch.randn(1, 3, *SIZE)
    with pytest.raises(RatioError, match=r'blocks\.0\.attn: Attention: it was not run'):
        apply_isr(model, 2)
    register_isr(Attention, grid=Patches('patch_embed.proj'))
    for again in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        apply_isr(again, 2)
        with pytest.warns(UserWarning, match=r'changes nothing in 2 .* Outside .*blocks\.0\.attn'):
            again(image)
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            again(image)
        assert not again._forward_hooks
        with isr(again, 3, strict=True), pytest.raises(RatioError, match='changes nothing in 2'):
            again(image)
        remove_isr(again)


class KnownAttention(Attention):
    """One that is told the size of its map."""

    def forward(self, x, size):
        return super().forward(x)


class Known(nn.Module):
    """A network of two arguments around it."""

    def __init__(self):
        super().__init__()
        self.stem, self.attn = nn.Conv2d(1, WIDTH, 8, 8), KnownAttention()

    def forward(self, image, scale):
        x = self.stem(image)
        return self.attn(x.flatten(2).transpose(1, 2), x.shape[2:]) * scale


@pytest.fixture
def _known():
    register_isr(KnownAttention, grid='size')


@pytest.mark.usefixtures('_known')
def test_attention_that_cannot_be_located_fails_strictly():
    register_isr(Attention, grid=Patches('nowhere.proj'))
    model = nn.ModuleDict(dict(known=Known(), lost=ViT(around)))
    apply_isr(model, 2)
    with pytest.raises(RatioError, match=r'lost\.blocks\.0\.attn: Attention: no nowhere\.proj aro'):
        apply_isr(model, 2, strict=True)


@pytest.mark.parametrize('place', ['Known:attn', f'{__name__}.Known:attn'])
def test_a_place_is_known(place):
    register_isr('KnownAttention', irreducible='by its class')
    assert 'by its class' in str(find_attention(Known()))
    register_isr(place, grid='size')
    assert not find_attention(Known()).irreducible
    assert find_attention(KnownAttention()).irreducible, 'elsewhere its class counts'


@pytest.mark.usefixtures('_known')
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_reports_of_other_inputs_and_dtypes(dtype):
    """One channel, two inputs, an int as size, another dtype; also for auto."""
    model = Known().to(dtype).eval()
    with pytest.raises(RatioError, match=r'Known does not run on 40x40 pixels \(TypeError'):
        report_isr(model, 2, 40)
    example = dict(image=torch.randn(1, 1, 72, 80, dtype=dtype), scale=2.)
    report = report_isr(model, 2, example_inputs=example)
    assert report.input_size == (72, 80)
    assert [stage.keys for stage in report.stages] == [(90, 25)]
    assert report_isr(model, 2, 40, example_inputs=example).stages[0].keys == (25, 9)
    report = report_isr(model, 'auto', example_inputs=example, crop_size=(40, 40))
    assert report.stages[0].keys == (90, 25)
    with isr(model, 'auto', example_inputs=example, crop_size=(40, 40)):
        assert model(**example).dtype == dtype

    vit = ViT(around, channels=2).to(dtype).eval()
    assert report_isr(vit, 2, 64).stages[0].keys == (65, 17)


@pytest.mark.parametrize(('trace', 'tool'), [(torch.fx.symbolic_trace, 'torch.fx'),
                                             (torch.jit.script, 'torch.jit.script')])
def test_what_cannot_trace_says_so(trace, tool):
    model = ViT(around).eval()
    apply_isr(model, 2)
    with pytest.raises(RatioError, match=rf'{tool} cannot .* while ISR reduces it: use torch\.exp'):
        trace(model)


@torch.no_grad()
def test_traced_and_exported():
    model, image = ViT(around).eval(), torch.randn(1, 3, *SIZE)
    apply_isr(model, 2)
    expected = model(image)
    assert torch.equal(torch.jit.trace(model, image)(image), expected)
    torch.testing.assert_close(torch.export.export(model, (image,)).module()(image), expected)
