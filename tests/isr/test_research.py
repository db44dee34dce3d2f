"""ISR on research code: modules of the same names, attributes and calls, written for this test."""
import types
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmseg_edaformer.errors import RatioError
from mmseg_edaformer.isr import apply_isr, register_isr
from mmseg_edaformer.isr.adapters.research import RULES
from mmseg_edaformer.isr.registry import find_attention, research_rule
from mmseg_edaformer.isr.rules import Irreducible

from .check import check_adapter

WIDTH, HEADS = 16, 2


def heads(x):
    return x.reshape(*x.shape[:-1], HEADS, -1).transpose(-3, -2)


def join(x):
    return x.transpose(-3, -2).flatten(-2)


def qkv_heads(attn, x):
    return [heads(part) for part in attn.qkv(x).chunk(3, -1)]


def weigh(query, key, value):
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
    return scores.softmax(dim=-1) @ value


def attend(attn, x, y):
    """Queries of ``x``, and keys and values of ``y``."""
    return join(weigh(heads(attn.q(x)), *(heads(part) for part in attn.kv(y).chunk(2, -1))))


class Model(nn.Module):
    """A patch embedding and one attention module, which is called as its repository does."""

    def __init__(self, attn, call):
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, WIDTH, 8, 8)
        self.attn, self.call = attn, call

    def forward(self, image):
        return self.call(self, self.patch_embed.proj(image))


def tokens_of(x):
    return x.flatten(2).transpose(1, 2)


def in_front(tokens, x):
    return torch.cat([tokens, tokens_of(x)], 1)


def map_of(tokens, h, w):
    return tokens.transpose(1, 2).reshape(len(tokens), -1, h, w)


def partition(x, rows, columns):
    B, C, H, W = x.shape
    return x.reshape(B, C, H // rows, rows, W // columns, columns).permute(
        0, 2, 4, 3, 5, 1).reshape(B, -1, rows * columns, C)


def linear(times=1):
    return nn.Linear(WIDTH, times * WIDTH)


def conv(kernel, stride=1, padding=0, out=WIDTH, **kwargs):
    return nn.Conv2d(WIDTH, out, kernel, stride, padding, **kwargs)


def depthwise(stride=1):
    return conv(3, stride, 1, groups=WIDTH)


def front(number, name='tokens'):
    """The parameter of a network that puts so many tokens in front of its patches."""
    return {name: lambda: nn.Parameter(torch.randn(1, number, WIDTH))}


CALLS = {
    'tokens': lambda model, x: model.attn(tokens_of(x), *x.shape[-2:]),
    'map': lambda model, x: model.attn(x),
    'last map': lambda model, x: model.attn(x.permute(0, 2, 3, 1)),
    'padded windows': lambda model, x: model.attn(partition(F.pad(
        x, (0, -x.shape[-1] % 14, 0, -x.shape[-2] % 14)), 14, 14).reshape(-1, 14, 14, WIDTH)),
    'with token': lambda model, x: model.attn(in_front(tokens_of(x)[:, :1], x), *x.shape[-2:]),
    'with token, size': lambda model, x: model.attn(in_front(tokens_of(x)[:, :1], x),
                                                    list(x.shape[-2:])),
    'behind tokens': lambda model, x: model.attn(in_front(model.tokens.expand(
        len(x), -1, -1), x)),
    'windows': lambda model, x: model.attn(partition(x, 4, 4).flatten(0, 1)),
    'windows and tokens': lambda model, x: model.attn(torch.cat(
        [partition(x, 4, 6).mean(2, keepdim=True), partition(x, 4, 6)], 2)),
    'convolutions': lambda model, x: model.attn(tokens_of(x), *x.shape[-2:], d_convs=model.convs),
    'three maps': lambda model, x: model.attn(
        model.mix(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).chunk(3, 1)),
}
"""How networks call their attention, given the network and its map."""
PLAIN = dict(qkv=lambda: linear(3), proj=linear)
"""The projections of a plain attention."""
EVEN, ODD = (96, 192), (112, 168)  # maps of 12 x 24 and 14 x 21
CASES = {}


def case(name, call, grids, owner=(), like=None, **settings):
    """Makes a test of a forward and the attributes of a module with a class of this name.

    Args:
        name: Name of the class.
        call: How a network calls the module: one of `CALLS`, or such a function.
        grids: The grids of the keys, by size of image.
        owner: Attributes of the network around.
        like: The name of the test; the forward's by default.
        settings: Arguments of `check_adapter`; the others are attributes of the module, or
            functions that make them.
    """
    checks = {key: settings.pop(key) for key in ('prefix', 'masked', 'ratios', 'compiled')
              if key in settings}

    def register(forward):
        def make():
            model = Model(module(name, forward, **settings), CALLS.get(call, call))
            return assign(model, dict(owner))
        CASES[like or forward.__name__] = make, grids, checks
        return forward
    return register


def assign(owner, attributes):
    for key, value in attributes.items():
        setattr(owner, key, value() if isinstance(value, types.FunctionType) else value)
    return owner


def module(name, forward, **attributes):
    """A module of a class of that name, with these attributes."""
    return assign(type(name, (nn.Module,), dict(forward=forward))(), attributes)


@case('Attention', 'tokens', {EVEN: [(6, 12)], ODD: [(7, 10)]}, sr_ratio=2, q=linear,
      kv=lambda: linear(2), sr=lambda: conv(2, 2))
@case('Attention', 'with token', {EVEN: [(12, 24)], ODD: [(14, 21)]}, front(1, 'cls_token'),
      prefix=1, like='last_stage_of_pvt', sr_ratio=1, q=linear, kv=lambda: linear(2))
def strided(self, x, H, W):
    """PVT's and SegFormer's: a strided convolution in front of one Linear for keys and values."""
    y = tokens_of(self.sr(map_of(x, H, W))) if self.sr_ratio > 1 else x
    return attend(self, x, y)


@case('Attention', 'with token', {EVEN: [(6, 12)], ODD: [(7, 11)]}, prefix=1, with_cls_token=True,
      conv_proj_k=lambda: conv(3, 2, 1), proj_q=linear, proj_k=linear)
def cvt(self, x, h, w):
    """A convolution makes keys, without the class token."""
    keys = torch.cat([x[:, :1], tokens_of(self.conv_proj_k(map_of(x[:, 1:], h, w)))], 1)
    query, key = heads(self.proj_q(x)), heads(self.proj_k(keys))
    weights = F.softmax(torch.einsum('bhlk,bhtk->bhlt', [query, key]), dim=-1)
    return join(torch.einsum('bhlt,bhtv->bhlv', [weights, key]))


@case('MultiScaleAttention', 'with token, size', {ODD: [(7, 11)]}, prefix=1, has_cls_embed=True,
      pool_k=lambda: depthwise(stride=2), **PLAIN)
def mvit(self, x, hw_shape):
    """MViTv2: pooled keys and values beside a class token."""
    query, *pooled = self.qkv(x).chunk(3, -1)
    key, value = (heads(torch.cat([part[:, :1], tokens_of(self.pool_k(map_of(
        part[:, 1:], *hw_shape)))], 1)) for part in pooled)
    return self.proj(join(weigh(heads(query), key, value)))


@case('Attention', 'padded windows', {(96, 96): [(14, 14)]}, like='sam_window', use_rel_pos=False,
      **PLAIN)
@case('Attention', 'last map', {ODD: [(14, 21)]}, like='sam', use_rel_pos=False, **PLAIN)
@case('MultiScaleAttention', 'last map', {EVEN: [(12, 24)]}, like='sam2', q_pool=None, **PLAIN)
def of_last_map(self, x):
    """SAM and SAM 2: attention on a map N x h x w x C, or on windows that reach beyond it."""
    return self.proj(join(weigh(*qkv_heads(self, x.flatten(1, 2)))).view(x.shape))


@case('WindowAttention', 'windows and tokens', {EVEN: [(4, 6)], (160, 192): [(4, 6)]}, prefix=1,
      like='msg_transformer', window_size=(4, 6), rel_pos_msg=0, **PLAIN)
@case('WindowAttention', 'windows', {EVEN: [(4, 4)]}, like='davit', window_size=(4, 4), **PLAIN)
@case('GroupAttention', 'windows', {EVEN: [(4, 4)]}, like='twins', ws=4, **PLAIN)
@case('Attention', 'windows', {EVEN: [(4, 4)]}, dict(window_size=4), like='tinyvit',
      attention_biases=0, key_dim=8, norm=0, **PLAIN)
def of_windows(self, x):
    """Attention on windows that a module around has made; MSG-Transformer's have a token."""
    return join(weigh(*qkv_heads(self, x)))


def shifted(model, x):
    regions = torch.zeros(1, 1, *x.shape[-2:])
    regions[..., -2:, :] += 1
    regions[..., -2:] += 2
    regions = partition(regions, 4, 4)[0, ..., 0]
    mask = (regions[:, None] != regions[:, :, None]) * -100.
    return model.attn(partition(x.roll((-2, -2), (2, 3)), 4, 4).flatten(0, 1), mask)


@case('WindowAttention', shifted, {EVEN: [(4, 4)]}, dict(shift_size=2), ratios=(2,),
      window_size=(4, 4), **PLAIN)
def swin_v2(self, x, mask=None):
    """Cosine attention in shifted windows, whose regions a mask keeps apart."""
    query, key, value = qkv_heads(self, x)
    scores = 5 * F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).transpose(-2, -1)
    scores = scores.view(-1, len(mask), HEADS, 16, 16) + mask[None, :, None]
    return join(scores.view(-1, HEADS, 16, 16).softmax(dim=-1) @ value)


@case('GlobalSparseAttn', 'tokens', {EVEN: [(6, 12)]}, sr=2, sampler=nn.AvgPool2d(1, 2), **PLAIN)
def edgevit(self, x, H, W):
    """Keys and queries are tokens at a stride."""
    return join(weigh(*qkv_heads(self, tokens_of(self.sampler(map_of(x, H, W))))))


@case('Attention', 'tokens', {EVEN: [(3, 6), (6, 12)], ODD: [(3, 5), (7, 10)]}, sr_ratio=4,
      q=linear, sr1=lambda: conv(4, 4), sr2=lambda: conv(2, 2), kv1=linear, kv2=linear,
      local_conv1=lambda: nn.Conv2d(WIDTH // 2, WIDTH // 2, 3, 1, 1), local_conv2=nn.Identity())
def shunted(self, x, H, W):
    """Half of the heads see keys of one grid, the others those of another; both mix values."""
    query, out = heads(self.q(x)), []
    for i, (sr, kv, conv) in enumerate(((self.sr1, self.kv1, self.local_conv1),
                                        (self.sr2, self.kv2, self.local_conv2))):
        y = sr(map_of(x, H, W))
        key, value = kv(tokens_of(y)).chunk(2, -1)
        weights = (query[:, i] @ key.transpose(-2, -1)).softmax(dim=-1)
        out.append(weights @ (value + tokens_of(conv(map_of(value, *y.shape[-2:])))))
    return torch.cat(out, -1)


@case('Attention', 'map', {EVEN: [(4, 4), (6, 12)], (96, 160): [(4, 4), (6, 10)]}, grid_size=4,
      head_dim=WIDTH, qkv=lambda: conv(1, out=3 * WIDTH), q=lambda: conv(1),
      kv=lambda: conv(1, out=2 * WIDTH), avg_pool=nn.AvgPool2d(2, 2), proj_norm=nn.Identity())
def hat(self, x):
    """HAT-Net: attention within windows, then to a pooled map, in one forward."""
    (B, C, H, W), g = x.shape, self.grid_size
    windows = self.qkv(x).reshape(B, 3, C, H // g, g, W // g, g)
    local = weigh(*windows.permute(1, 0, 3, 5, 4, 6, 2).reshape(3, -1, g * g, C))
    local = local.reshape(B, H // g, W // g, g, g, C).permute(0, 5, 1, 3, 2, 4)
    x = x + local.reshape(B, C, H, W)
    key, value = tokens_of(self.kv(self.avg_pool(x))).chunk(2, -1)
    return self.proj_norm(map_of(weigh(tokens_of(self.q(x)), key, value), H, W))


@case('PoolingAttention', 'convolutions',
      {EVEN: [[(6, 12), (4, 8), (2, 5)]], ODD: [[(7, 10), (5, 7), (3, 4)]]},
      dict(convs=lambda: nn.ModuleList(conv(3, 1, 1) for _ in range(3))), pool_ratios=[2, 3, 5],
      q=linear, kv=lambda: linear(2))
def p2t(self, x, H, W, d_convs=None):
    """Keys from several pooled maps behind each other, with a convolution on each."""
    maps = []
    for ratio, conv in zip(self.pool_ratios, d_convs):
        pooled = F.adaptive_avg_pool2d(map_of(x, H, W), (round(H / ratio), round(W / ratio)))
        maps.append(tokens_of(pooled + conv(pooled)))
    return attend(self, x, torch.cat(maps, 1))


@case('DAttentionBaseline', 'map', {EVEN: [(6, 12)], ODD: [(7, 11)]}, proj_q=lambda: conv(1),
      proj_k=lambda: conv(1), proj_v=lambda: conv(1), conv_offset=lambda: nn.Sequential(
          conv(3, 2, 1), nn.GELU(), conv(1, out=2)))
def deformable(self, x):
    """DAT: keys at shifted places of a coarser grid; values stand transposed: v @ attn^T."""
    B, C, H, W = x.shape
    query = self.proj_q(x)
    places = self.conv_offset(query).tanh().permute(0, 2, 3, 1)
    sampled = F.grid_sample(x, places, align_corners=True).reshape(B, C, 1, -1)
    query, key, value = (part.reshape(B * HEADS, C // HEADS, -1) for part in (
        query, self.proj_k(sampled), self.proj_v(sampled)))
    scores = F.softmax(torch.einsum('b c m, b c n -> b m n', query, key), dim=2)
    return torch.einsum('b m n, b c n -> b c m', scores, value).reshape(B, C, H, W)


def regions(model, x, masked=False):
    """One module for the tokens of all regions, then for each window behind its region's token."""
    windows = partition(x, 4, 4).flatten(0, 1)
    tokens = windows.mean(1).reshape(len(x), -1, WIDTH)
    tokens = tokens + model.attn(tokens)
    mask = None
    if masked:  # the right column of the windows is padding
        there = torch.ones(17).index_fill(0, torch.tensor([4, 8, 12, 16]), 0)
        mask = there.expand(len(windows), 17, 17)
    windows = torch.cat([tokens.reshape(-1, 1, WIDTH), windows], 1)
    return model.attn(windows, patch_attn=True, mask=mask)


REGIONAL = dict(grids={EVEN: [(4, 4)]}, owner=dict(kernel_size=[(4, 4), (4, 4), 0]), prefix=1,
                num_cls_tokens=1, rel_pos=0, **PLAIN)


@case('AttentionWithRelPos', regions, **REGIONAL)
@case('AttentionWithRelPos', partial(regions, masked=True), like='regional_masked', masked=-1e30,
      **REGIONAL)
def regional(self, x, patch_attn=False, mask=None):
    """RegionViT's."""
    query, key, value = qkv_heads(self, x)
    scores = query @ key.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(mask.unsqueeze(1) == 0, torch.finfo(scores.dtype).min)
    return join(scores.softmax(dim=-1) @ value)


@case('LePEAttention', 'three maps', {EVEN: [(2, 6)], (80, 144): [(2, 6)]},
      dict(mix=lambda: linear(3)), H_sp=2, W_sp=6, get_v=depthwise)
def stripes(self, qkv):
    """CSWin: windows whose sides are two attributes, and a convolution on the values of each."""
    query, key, value = (heads(partition(part, 2, 6)) for part in qkv)
    own = self.get_v(map_of(join(value).flatten(0, 1), 2, 6))
    return join(weigh(query, key, value)) + tokens_of(own).view(len(value), -1, 12, WIDTH)


@case('Attention', 'last map', {EVEN: [(6, 12)], ODD: [(7, 10)]}, rasa_cfg=True,
      sr=lambda: conv(2, 2), q=linear, kv=lambda: linear(2))
def light(self, x):
    """LVT: attention over the map's own tokens, N x h x w x C, twice in one forward."""
    for _ in range(2):
        y = tokens_of(self.sr(x.permute(0, 3, 1, 2)))
        x = x + attend(self, x.flatten(1, 2), y).reshape(x.shape)
    return x


@case('Attention', 'behind tokens', {EVEN: [(12, 24)], ODD: [(14, 21)]}, front(1), prefix=1,
      **PLAIN)
@case('Attention', 'behind tokens', {ODD: [(14, 21)]}, front(2), like='vit_2_tokens', prefix=2,
      compiled=False, **PLAIN)
@case('SelfAttention', 'behind tokens', {ODD: [(14, 21)]}, front(1), like='dinov3', prefix=1,
      apply_rope=None, **PLAIN)
def vit(self, x):
    """A plain ViT's, with tokens in front."""
    return self.proj(join(weigh(*qkv_heads(self, x))))


def make_vit():
    return CASES['vit'][0]()


class Stage(nn.Module):
    """UniFormer's: attention behind a convolution that tells the size of its map."""

    def __init__(self):
        super().__init__()
        self.pos_embed = depthwise()
        self.attn = make_vit().attn

    def forward(self, x):
        x = x + self.pos_embed(x)
        return x + map_of(self.attn(tokens_of(x)), *x.shape[-2:])


CASES['uniformer'] = lambda: nn.Sequential(
    nn.Conv2d(3, WIDTH, 8, 8), *(Stage() for _ in range(3)), conv(2, 2), Stage()), {
        (64, 128): [(8, 16), (4, 8)]}, dict(expected=4, compiled=False)


class Segmenter(nn.Module):
    """Its decoder lets classes join behind the patches that its encoder has made."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = make_vit(), make_vit().attn
        self.cls_emb = nn.Parameter(torch.randn(1, 3, WIDTH))

    def forward(self, image):
        tokens = tokens_of(self.encoder.patch_embed.proj(image)) + self.encoder(image)[:, 1:]
        return self.decoder(torch.cat([tokens, self.cls_emb.expand(len(tokens), -1, -1)], 1))


CASES['segmenter'] = Segmenter, {ODD: [(14, 21)]}, dict(
    expected=2, prefix=None, suffix=lambda name: 3 * (name == 'decoder'), compiled=False)


@pytest.mark.parametrize(('model', 'grids', 'settings'), CASES.values(), ids=CASES)
def test_reduced_exactly(model, grids, settings):
    for number, (size, grid) in enumerate(grids.items()):
        torch.manual_seed(0)
        check_adapter(model(), torch.randn(2, 3, *size), grid, pickled=False,
                      **dict(expected=1, compiled=number == 0) | settings)


@torch.no_grad()
def test_pruned_keys_stay_with_a_reason():
    """DynamicViT after it has pruned, and while it trains with a softmax of its own."""
    def forward(self, x, policy=None):
        query, key, value = qkv_heads(self, x)
        if policy is None:
            return join(weigh(query, key, value))
        return join((query @ key.transpose(-2, -1)).exp() * policy @ value)

    model = Model(module('Attention', forward, softmax_with_policy=None, **PLAIN), None)
    attn, tokens = model.attn, torch.randn(1, 13, WIDTH)
    full = attn(tokens[:, :8])
    apply_isr(model, 2)
    model.patch_embed.proj(torch.randn(1, 3, 24, 32))
    assert attn(tokens).shape == (1, 13, WIDTH)
    with pytest.warns(UserWarning, match='its 8 keys lie on no grid that ISR finds .3x4.'):
        assert torch.equal(attn(tokens[:, :8]), full)
    with pytest.raises(RatioError, match='Attention cannot be reduced: it uses exp'):
        attn(tokens, torch.ones(13))


@pytest.mark.parametrize(('name', 'attributes', 'reason'), [
    ('FactorAtt_ConvRelPosEnc', ('crpe', 'qkv'), 'sums up its keys'),
    ('AttentionModule', ('conv0', 'conv3'), 'convolution'),
    ('CSA', ('unfold', 'csa_group'), 'predicts the weights'),
    ('FullAttnModule', ('k_proj', 'v_proj'), 'group tokens'),
    ('NeighborhoodAttention2D', ('kernel_size', 'qkv'), 'neighbours'),
    ('ShiftWindowAttention', ('window_size', 'shift_size'), 'checks the number'),
    ('LightGroupAttnBlock', ('norm_query', 'attn'), 'checks the number'),
    ('MHA_', ('rpe', 'k_proj'), 'checks the number'),
    ('ChannelAttention', ('qkv', 'proj'), 'channels'),
    ('Attention', ('q', 'sr_ratio', 'transform_norm'), 'normalises its weights'),
    ('Attention', ('qkv', 'proj', 'keep_rate'), 'picks tokens'),
])
def test_nothing_to_reduce_has_a_reason(name, attributes, reason):
    attention = module(name, lambda self, x: x, **dict.fromkeys(attributes, linear))
    found = find_attention(nn.ModuleDict({'layer': attention}))
    assert reason in found.irreducible['layer']


def test_the_name_alone_is_not_enough():
    for name in RULES:
        assert research_rule(type(name, (nn.Module,), {})()) is None
    stranger = type('Attention', (nn.Module,), {'forward': lambda self, x: x})()
    stranger.q, stranger.sr_ratio = nn.Linear(2, 2), 1
    assert research_rule(stranger) is None, 'its forward takes no H and W'


@pytest.mark.parametrize('forward', [
    lambda self, x, mask=None, pos_idx=None: x,  # GreenMIM: tokens that a mask left in windows
    lambda self, x_all, mask_all=None: x_all,  # Focal: keys of its window and of those around it
], ids=['green', 'focal'])
def test_other_windows_are_not_guessed(forward):
    assert research_rule(module('WindowAttention', forward, window_size=(4, 4),
                                relative_position_bias_table=0, **PLAIN)) is None


def test_register_isr_comes_first():
    model = CASES['strided'][0]()
    register_isr('Attention', irreducible='mine')
    assert find_attention(model).irreducible == {'attn': 'Attention: mine'}
    assert not isinstance(research_rule(model.attn), Irreducible)
