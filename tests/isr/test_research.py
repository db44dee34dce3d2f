"""ISR on research code: modules of the same names, attributes and calls, written for this test."""
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


def heads(x, number=HEADS):
    return x.reshape(*x.shape[:-1], number, -1).transpose(-3, -2)


def join(x):
    return x.transpose(-3, -2).flatten(-2)


def weigh(query, key, value, bias=0.):
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5 + bias
    return scores.softmax(dim=-1) @ value


class Model(nn.Module):
    """A patch embedding and one attention module, which is called as its repository does."""

    def __init__(self, attn, call, stride=4):
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, WIDTH, stride, stride)
        self.mix = linear(3)
        nn.init.normal_(self.mix.weight, std=0.4)
        self.attn, self.call = attn, call

    def forward(self, image):
        return self.call(self, self.patch_embed.proj(image))


def as_tokens(model, x):
    return model.attn(x.flatten(2).transpose(1, 2), *x.shape[-2:])


def as_map(model, x):
    return model.attn(x)


def with_token(model, x):
    tokens = x.flatten(2).transpose(1, 2)
    return model.attn(torch.cat([tokens[:, :1], tokens], 1), *x.shape[-2:])


def module(name, forward, **attributes):
    """A module of a class of that name, with these attributes."""
    attn = type(name, (nn.Module,), dict(forward=forward))()
    for key, value in attributes.items():
        setattr(attn, key, value)
    return attn


def linear(times=1):
    return nn.Linear(WIDTH, times * WIDTH)


def conv(kernel, stride=1, padding=0, **kwargs):
    return nn.Conv2d(WIDTH, WIDTH, kernel, stride, padding, **kwargs)


def depthwise(channels=WIDTH, stride=1):
    return nn.Conv2d(channels, channels, 3, stride, 1, groups=channels)


def strided(sr_ratio):
    """PVT's and SegFormer's: a strided convolution in front of one Linear for keys and values."""
    def forward(self, x, H, W):
        y = x
        if self.sr_ratio > 1:
            y = self.sr(x.transpose(1, 2).reshape(len(x), -1, H, W)).flatten(2).transpose(1, 2)
        key, value = self.kv(y).chunk(2, -1)
        return join(weigh(heads(self.q(x)), heads(key), heads(value)))
    return module('Attention', forward, sr_ratio=sr_ratio, q=linear(), kv=linear(2),
                  sr=conv(sr_ratio, sr_ratio))


def last_stage():
    """PVT's, which a class token joins."""
    model = Model(strided(1), with_token)
    model.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
    return model


def convolved():
    """CvT: convolutions make queries and keys, without the class token."""
    def forward(self, x, h, w):
        token, image = x[:, :1], x[:, 1:].transpose(1, 2).reshape(len(x), -1, h, w)
        query, key = (heads(proj(torch.cat([token, conv(image).flatten(2).transpose(1, 2)], 1)))
                      for proj, conv in ((self.proj_q, self.conv_proj_q),
                                         (self.proj_k, self.conv_proj_k)))
        weights = F.softmax(torch.einsum('bhlk,bhtk->bhlt', [query, key]), dim=-1)
        return join(torch.einsum('bhlt,bhtv->bhlv', [weights, key]))
    return Model(module('Attention', forward, with_cls_token=True, conv_proj_q=conv(3, 1, 1),
                        conv_proj_k=conv(3, 2, 1), proj_q=linear(), proj_k=linear()), with_token)


def multiscale():
    """MViTv2: pooled keys and values beside a class token."""
    def forward(self, x, hw_shape):
        query, *pooled = self.qkv(x).chunk(3, -1)
        for i, part in enumerate(pooled):
            image = self.pool_k(part[:, 1:].transpose(1, 2).reshape(len(x), -1, *hw_shape))
            pooled[i] = heads(torch.cat([part[:, :1], image.flatten(2).transpose(1, 2)], 1))
        return self.proj(join(weigh(heads(query), *pooled)))
    return Model(plain('MultiScaleAttention', forward, has_cls_embed=True,
                       pool_k=depthwise(stride=2)), lambda model, x: model.attn(torch.cat(
                           [x.flatten(2).mean(2)[:, None], x.flatten(2).transpose(1, 2)], 1),
                           list(x.shape[-2:])))


def plain(name, forward, **attributes):
    """`module` with a plain attention's projections."""
    return module(name, forward, qkv=linear(3), proj=linear(), **attributes)


def of_map(name, side=0, **attributes):
    """SAM and SAM 2: attention on a map N x h x w x C, or on windows that reach beyond it."""
    def forward(self, x):
        query, key, value = (heads(part.flatten(1, 2)) for part in self.qkv(x).chunk(3, -1))
        scores = query @ key.transpose(-2, -1)
        if hasattr(self, 'rel_pos'):
            grid = query.unflatten(2, x.shape[1:3])
            rows = torch.einsum('nxhwc,hkc->nxhwk', grid, self.rel_pos)
            columns = torch.einsum('nxhwc,wkc->nxhwk', grid, self.rel_pos)
            scores = (scores.view(*grid.shape[:4], *x.shape[1:3]) + rows[..., None] +
                      columns[..., None, :]).view(*query.shape[:3], key.shape[-2])
        return self.proj(join(scores.softmax(dim=-1) @ value).view(x.shape))

    def call(model, x):
        x = x.permute(0, 2, 3, 1)
        if side:
            x = F.pad(x, (0, 0, 0, -x.shape[2] % side, 0, -x.shape[1] % side))
            x = partition(x.permute(0, 3, 1, 2), side, side).reshape(-1, side, side, WIDTH)
        return model.attn(x)
    return Model(plain(name, forward, **attributes), call)


def of_windows(name, **attributes):
    """DaViT, Twins and MobileSAM: attention on windows that a module around has made."""
    def forward(self, x):
        return join(weigh(*(heads(part) for part in self.qkv(x).chunk(3, -1))))

    model = Model(plain(name, forward, **attributes),
                  lambda model, x: model.attn(partition(x, 4, 4).flatten(0, 1)))
    model.window_size = 4
    return model


def shifted():
    """SwinV2: cosine attention in shifted windows, whose regions a mask keeps apart."""
    def forward(self, x, mask=None):
        query, key, value = (heads(part) for part in self.qkv(x).chunk(3, -1))
        scores = 5 * F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).transpose(-2, -1)
        places = torch.arange(16.)
        distances = (places[:, None] - places)[..., None] / 8
        scores = scores + 16 * self.cpb_mlp(distances).sigmoid().permute(2, 0, 1)
        scores = scores.view(-1, len(mask), HEADS, 16, 16) + mask[None, :, None]
        return join(scores.view(-1, HEADS, 16, 16).softmax(dim=-1) @ value)

    def call(model, x):
        regions = torch.zeros(1, 1, *x.shape[-2:])
        regions[..., -2:, :] += 1
        regions[..., -2:] += 2
        regions = partition(regions, 4, 4)[0, ..., 0]
        mask = (regions[:, None] != regions[:, :, None]) * -100.
        return model.attn(partition(x.roll((-2, -2), (2, 3)), 4, 4).flatten(0, 1), mask)

    model = Model(plain('WindowAttention', forward, window_size=(4, 4),
                        cpb_mlp=nn.Linear(1, HEADS)), call)
    model.shift_size = 2
    return model


class Stage(nn.Module):
    """UniFormer's: attention behind a convolution that tells the size of its map."""

    def __init__(self):
        super().__init__()
        self.pos_embed = depthwise()
        self.attn = vit().attn

    def forward(self, x):
        x = x + self.pos_embed(x)
        return x + self.attn(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape)


class Segmenter(nn.Module):
    """Its decoder lets classes join behind the patches that its encoder has made."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = vit(), vit().attn
        self.cls_emb = nn.Parameter(torch.randn(1, 3, WIDTH))

    def forward(self, image):
        tokens = self.encoder.patch_embed.proj(image).flatten(2).transpose(1, 2)
        tokens = tokens + self.encoder(image)[:, 1:]
        return self.decoder(torch.cat([tokens, self.cls_emb.expand(len(tokens), -1, -1)], 1))


def sparse():
    """EdgeViT: keys and queries are tokens at a stride."""
    def forward(self, x, H, W):
        x = self.sampler(x.transpose(1, 2).reshape(len(x), -1, H, W)).flatten(2)
        return join(weigh(*(heads(part) for part in self.qkv(x.transpose(1, 2)).chunk(3, -1))))
    return Model(plain('GlobalSparseAttn', forward, sr=2, sampler=nn.AvgPool2d(1, 2)), as_tokens)


def shunted():
    """Half of the heads see keys of one grid, the others those of another; both mix values."""
    def forward(self, x, H, W):
        image = x.transpose(1, 2).reshape(len(x), -1, H, W)
        query, out = heads(self.q(x)), []
        for i, (sr, kv, conv) in enumerate(((self.sr1, self.kv1, self.local_conv1),
                                            (self.sr2, self.kv2, self.local_conv2))):
            y = sr(image)
            size = y.shape[-2:]
            key, value = (heads(part, 1) for part in
                          kv(y.flatten(2).transpose(1, 2)).chunk(2, -1))
            weights = (query[:, i:i + 1] @ key.transpose(-2, -1)).softmax(dim=-1)
            mixed = conv(value.transpose(-2, -1).reshape(len(x), -1, *size))
            value = value + mixed.view(len(x), 1, -1, size[0] * size[1]).transpose(-2, -1)
            out.append(weights @ value)
        return join(torch.cat(out, 1))
    return module('Attention', forward, sr_ratio=4, q=linear(), sr1=conv(4, 4), sr2=conv(2, 2),
                  kv1=linear(), kv2=linear(), local_conv1=depthwise(WIDTH // 2),
                  local_conv2=depthwise(WIDTH // 2))


def hat():
    """Attention within windows, then to a pooled map, in one forward."""
    def forward(self, x):
        (B, C, H, W), g = x.shape, self.grid_size
        windows = self.qkv(x).reshape(B, 3, C, H // g, g, W // g, g)
        local = weigh(*windows.permute(1, 0, 3, 5, 4, 6, 2).reshape(3, -1, g * g, C))
        local = local.reshape(B, H // g, W // g, g, g, C).permute(0, 5, 1, 3, 2, 4)
        x = x + local.reshape(B, C, H, W)
        key, value = self.kv(self.avg_pool(x)).flatten(2).transpose(1, 2).chunk(2, -1)
        out = weigh(self.q(x).flatten(2).transpose(1, 2), key, value)
        return self.proj_norm(out.transpose(1, 2).reshape(B, C, H, W))
    return module('Attention', forward, grid_size=4, head_dim=WIDTH,
                  qkv=nn.Conv2d(WIDTH, 3 * WIDTH, 1), q=conv(1), kv=nn.Conv2d(WIDTH, 2 * WIDTH, 1),
                  avg_pool=nn.AvgPool2d(2, 2), proj_norm=nn.GroupNorm(1, WIDTH))


def pyramid():
    """Keys from several pooled maps behind each other, with a convolution on each."""
    def forward(self, x, H, W, d_convs=None):
        image, maps = x.transpose(1, 2).reshape(len(x), -1, H, W), []
        for ratio, conv in zip(self.pool_ratios, d_convs):
            pooled = F.adaptive_avg_pool2d(image, (round(H / ratio), round(W / ratio)))
            maps.append((pooled + conv(pooled)).flatten(2))
        key, value = self.kv(torch.cat(maps, 2).transpose(1, 2)).chunk(2, -1)
        return join(weigh(heads(self.q(x)), heads(key), heads(value)))

    model = Model(module('PoolingAttention', forward, pool_ratios=[2, 3, 5], q=linear(),
                         kv=linear(2)),
                  lambda model, x: model.attn(x.flatten(2).transpose(1, 2), *x.shape[-2:],
                                              d_convs=model.convs))
    model.convs = nn.ModuleList(conv(3, 1, 1) for _ in range(3))
    return model


def deformable():
    """Keys at shifted places of a coarser grid; values stand transposed: v @ attn^T."""
    def forward(self, x):
        B, C, H, W = x.shape
        query = self.proj_q(x)
        places = self.conv_offset(query).tanh()
        keys = places.shape[-2] * places.shape[-1]
        sampled = F.grid_sample(x, places.permute(0, 2, 3, 1), align_corners=True)
        sampled = sampled.reshape(B, C, 1, keys)
        query, key, value = (part.reshape(B * HEADS, C // HEADS, -1) for part in (
            query, self.proj_k(sampled), self.proj_v(sampled)))
        scores = F.softmax(torch.einsum('b c m, b c n -> b m n', query, key), dim=2)
        return torch.einsum('b m n, b c n -> b c m', scores, value).reshape(B, C, H, W)
    return module('DAttentionBaseline', forward, proj_q=conv(1), proj_k=conv(1), proj_v=conv(1),
                  conv_offset=nn.Sequential(conv(3, 2, 1), nn.GELU(), nn.Conv2d(WIDTH, 2, 1)))


def partition(x, rows, columns):
    B, C, H, W = x.shape
    return x.reshape(B, C, H // rows, rows, W // columns, columns).permute(
        0, 2, 4, 3, 5, 1).reshape(B, -1, rows * columns, C)


def messenger():
    """A token in front of each window, whose biases are its own."""
    def forward(self, x):
        query, key, value = (heads(part) for part in self.qkv(x).chunk(3, -1))
        scores = query @ key.transpose(-2, -1)
        bias = torch.cat([self.rel_pos_msg[:, 0].expand(-1, 24, -1), self.table], -1)
        bias = torch.cat([self.rel_pos_msg[:, 1].expand(-1, -1, 25), bias], -2)
        scores += bias.unsqueeze(0)
        return join(scores.softmax(-1) @ value)

    def call(model, x):
        windows = partition(x, 4, 6)
        return model.attn(torch.cat([windows.mean(2, keepdim=True), windows], 2))
    return Model(module('WindowAttention', forward, window_size=(4, 6), qkv=linear(3),
                        rel_pos_msg=nn.Parameter(torch.randn(HEADS, 2, 1, 1)),
                        table=nn.Parameter(torch.randn(HEADS, 24, 24))), call)


def regional(masked):
    """One module for the tokens of all regions, then for each window behind its region's token."""
    def forward(self, x, patch_attn=False, mask=None):
        query, key, value = (heads(part) for part in self.qkv(x).chunk(3, -1))
        scores = query @ key.transpose(-2, -1)
        if patch_attn:
            scores[:, :, 1:, 1:] = scores[:, :, 1:, 1:] + self.rel_pos
        if mask is not None:
            scores = scores.masked_fill(mask.unsqueeze(1) == 0, torch.finfo(scores.dtype).min)
        return join(scores.softmax(dim=-1) @ value)

    def call(model, x):
        windows = partition(x, 4, 4).flatten(0, 1)
        regions = windows.mean(1).reshape(len(x), -1, WIDTH)
        regions = regions + model.attn(regions)
        mask = None
        if masked:  # the right column of the windows is padding
            there = torch.ones(17).index_fill(0, torch.tensor([4, 8, 12, 16]), 0)
            mask = there.expand(len(windows), 17, 17)
        windows = torch.cat([regions.reshape(-1, 1, WIDTH), windows], 1)
        return model.attn(windows, patch_attn=True, mask=mask)

    model = Model(module('AttentionWithRelPos', forward, num_cls_tokens=1, qkv=linear(3),
                         rel_pos=nn.Parameter(torch.randn(HEADS, 16, 16))), call)
    model.kernel_size = [(4, 4), (4, 4), 0]
    return model


def stripes():
    """Windows whose sides are two attributes, and a convolution on the values of each."""
    def forward(self, qkv):
        B, C = qkv[0].shape[:2]
        query, key, value = (heads(partition(part, 2, 6)) for part in qkv)
        image = join(value).flatten(0, 1).transpose(1, 2).reshape(-1, C, 2, 6)
        own = self.get_v(image).flatten(2).transpose(1, 2).reshape(B, -1, 12, C)
        return join(weigh(query, key, value)) + own

    def call(model, x):
        qkv = model.mix(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return model.attn(qkv.chunk(3, 1))
    return Model(module('LePEAttention', forward, H_sp=2, W_sp=6, get_v=depthwise()), call)


def light():
    """Attention over the map's own tokens, N x h x w x C, twice in one forward."""
    def forward(self, x):
        for _ in range(2):
            key, value = self.kv(self.sr(x.permute(0, 3, 1, 2)).flatten(2).transpose(
                1, 2)).chunk(2, -1)
            x = x + weigh(self.q(x).flatten(1, 2), key, value).reshape(x.shape)
        return x
    return Model(module('Attention', forward, rasa_cfg=True, sr=conv(2, 2), q=linear(),
                        kv=linear(2)), lambda model, x: model.attn(x.permute(0, 2, 3, 1)))


def vit(tokens=1, policy=False, name='Attention'):
    """A plain ViT, with tokens in front."""
    def normalise(scores, policy):
        weights = (scores - scores.amax(-1, keepdim=True)).exp() * policy
        return weights / weights.sum(-1, keepdim=True)

    def forward(self, x, policy=None):
        query, key, value = (heads(part) for part in self.qkv(x).chunk(3, -1))
        if policy is None:
            return self.proj(join(weigh(query, key, value)))
        return self.proj(join(normalise(query @ key.transpose(-2, -1), policy) @ value))

    def call(model, x):
        x = x.flatten(2).transpose(1, 2)
        return model.attn(torch.cat([model.tokens.expand(len(x), -1, -1), x], 1))

    model = Model(plain(name, forward, num_heads=HEADS, apply_rope=None,
                        **dict(softmax_with_policy=normalise) if policy else {}), call)
    model.tokens = nn.Parameter(torch.randn(1, tokens, WIDTH))
    return model


EVEN, ODD = (48, 96), (56, 84)  # maps of 12 x 24 and 14 x 21


@pytest.mark.parametrize(('model', 'grids', 'settings'), [
    (lambda: Model(strided(2), as_tokens), {EVEN: [(6, 12)], ODD: [(7, 10)]}, {}),
    (lambda: Model(shunted(), as_tokens), {EVEN: [(3, 6), (6, 12)], ODD: [(3, 5), (7, 10)]}, {}),
    (lambda: Model(hat(), as_map), {EVEN: [(4, 4), (6, 12)], (48, 80): [(4, 4), (6, 10)]}, {}),
    (pyramid, {EVEN: [[(6, 12), (4, 8), (2, 5)]], ODD: [[(7, 10), (5, 7), (3, 4)]]}, {}),
    (lambda: Model(deformable(), as_map), {EVEN: [(6, 12)], ODD: [(7, 11)]}, {}),
    (messenger, {EVEN: [(4, 6)], (80, 96): [(4, 6)]}, dict(prefix=1)),
    (lambda: regional(False), {EVEN: [(4, 4)]}, dict(prefix=1)),
    (lambda: regional(True), {EVEN: [(4, 4)]}, dict(prefix=1, masked=-1e30)),
    (stripes, {EVEN: [(2, 6)], (40, 72): [(2, 6)]}, {}),
    (light, {EVEN: [(6, 12)], ODD: [(7, 10)]}, {}),
    (vit, {EVEN: [(12, 24)], ODD: [(14, 21)]}, dict(prefix=1)),
    (lambda: vit(2), {ODD: [(14, 21)]}, dict(prefix=2)),
    (lambda: vit(name='SelfAttention'), {ODD: [(14, 21)]}, dict(prefix=1)),
    (last_stage, {EVEN: [(12, 24)], ODD: [(14, 21)]}, dict(prefix=1)),
    (convolved, {EVEN: [(6, 12)], ODD: [(7, 11)]}, dict(prefix=1)),
    (multiscale, {ODD: [(7, 11)]}, dict(prefix=1)),
    (sparse, {EVEN: [(6, 12)]}, {}),
    (shifted, {EVEN: [(4, 4)]}, dict(ratios=(2,))),
    (lambda: of_map('Attention', use_rel_pos=False), {ODD: [(14, 21)]}, {}),
    (lambda: of_map('Attention', 14, use_rel_pos=True, rel_pos=nn.Parameter(
        torch.randn(14, 14, WIDTH // HEADS))), {(48, 48): [(14, 14)]}, {}),
    (lambda: of_map('MultiScaleAttention', q_pool=None), {EVEN: [(12, 24)]}, {}),
    (lambda: of_windows('WindowAttention', window_size=(4, 4)), {EVEN: [(4, 4)]}, {}),
    (lambda: of_windows('GroupAttention', ws=4), {EVEN: [(4, 4)]}, {}),
    (lambda: of_windows('Attention', attention_biases=0, key_dim=8, norm=0), {EVEN: [(4, 4)]}, {}),
    (lambda: nn.Sequential(nn.Conv2d(3, WIDTH, 4, 4), *(Stage() for _ in range(3)),
                           nn.Conv2d(WIDTH, WIDTH, 2, 2), Stage()),
     {(32, 64): [(8, 16), (4, 8)]}, dict(expected=4, compiled=False)),
    (Segmenter, {ODD: [(14, 21)]}, dict(
        expected=2, prefix=None, suffix=lambda name: 3 * (name == 'decoder'))),
], ids=['strided', 'shunted', 'hat', 'pyramid', 'deformable', 'messenger', 'regional',
        'regional-masked', 'stripes', 'light', 'vit', 'vit-2-tokens', 'dinov3', 'pvt-last', 'cvt',
        'mvit', 'edgevit', 'swin-v2', 'sam', 'sam-window', 'sam2', 'davit', 'twins', 'tinyvit',
        'uniformer', 'segmenter'])
def test_reduced_exactly(model, grids, settings):
    for number, (size, grid) in enumerate(grids.items()):
        torch.manual_seed(0)
        check_adapter(model(), torch.randn(2, 3, *size), grid, pickled=False,
                      **dict(expected=1, compiled=number == 0) | settings)


@torch.no_grad()
def test_pruned_keys_stay_with_a_reason():
    """DynamicViT after it has pruned, and while it trains with a softmax of its own."""
    model, tokens = vit(policy=True).attn, torch.randn(1, 13, WIDTH)
    outer = nn.Module()
    outer.add_module('patch_embed', nn.Module())
    outer.patch_embed.proj = nn.Conv2d(3, WIDTH, 4, 4)
    outer.attn = model
    full = model(tokens[:, :8])
    apply_isr(outer, 2)
    outer.patch_embed.proj(torch.randn(1, 3, 12, 16))
    reduced = model(tokens)
    with pytest.warns(UserWarning, match='its 8 keys lie on no grid that ISR finds .3x4.'):
        assert torch.equal(model(tokens[:, :8]), full)
    assert reduced.shape == (1, 13, WIDTH)
    with pytest.raises(RatioError, match='Attention cannot be reduced: it uses exp'):
        model(tokens, torch.ones(1, 1, 1, 13))


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
    module = type(name, (nn.Module,), {})()
    for attribute in attributes:
        setattr(module, attribute, nn.Linear(2, 2))
    found = find_attention(nn.ModuleDict({'layer': module}))
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
    assert research_rule(plain('WindowAttention', forward, window_size=(4, 4),
                      relative_position_bias_table=0)) is None


def test_register_isr_comes_first():
    model = Model(strided(2), as_tokens)
    register_isr('Attention', irreducible='mine')
    assert find_attention(model).irreducible == {'attn': 'Attention: mine'}
    assert not isinstance(research_rule(model.attn), Irreducible)
