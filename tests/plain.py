"""EDAFormer written plainly: the oracle that the fast implementation is compared with.

Explicit attention over an N x M matrix, tokens transposed around every convolution, the levels
resized and concatenated before they are fused, weights under the released names. Nothing is shared
with the package.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):

    def __init__(self, dim, heads, pool, decoder):
        super().__init__()
        self.heads, self.pool, self.isr_ratio = heads, pool, 1
        self.sr = nn.Conv2d(dim, dim, 1)
        self.proj = nn.Linear(dim, dim)
        if decoder:
            self.norm = nn.LayerNorm(dim, eps=1e-5)
        self.decoder = decoder

    def forward(self, x, size):
        b, n, c = x.shape
        height, width = size
        pool = self.pool * self.isr_ratio
        grid = x.transpose(1, 2).reshape(b, c, height, width)
        kernel = (min(pool, height), min(pool, width))
        kv = self.sr(F.avg_pool2d(grid, kernel, kernel)).flatten(2).transpose(1, 2)
        if self.decoder:
            kv = F.gelu(self.norm(kv))
        q = x.reshape(b, n, self.heads, c // self.heads).permute(0, 2, 1, 3)
        k = kv.reshape(b, -1, self.heads, c // self.heads).permute(0, 2, 1, 3)
        scores = (q @ k.transpose(-1, -2)) / math.sqrt(c // self.heads)
        out = scores.softmax(-1) @ k
        return self.proj(out.permute(0, 2, 1, 3).reshape(b, n, c))


class DWConv(nn.Module):

    def __init__(self, dim):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, 1, 1, groups=dim)

    def forward(self, x, size):
        b, _n, c = x.shape
        return self.dwconv(x.transpose(1, 2).reshape(b, c, *size)).flatten(2).transpose(1, 2)


class MLP(nn.Module):

    def __init__(self, dim, ratio, decoder):
        super().__init__()
        self.fc1 = nn.Linear(dim, int(dim * ratio))
        self.dwconv = DWConv(int(dim * ratio))
        self.fc2 = nn.Linear(int(dim * ratio), dim)
        self.decoder = decoder

    def forward(self, x, size):
        x = self.fc1(x)
        if not self.decoder:
            x = F.relu(x)
        return self.fc2(F.gelu(self.dwconv(x, size)))


class Block(nn.Module):

    def __init__(self, dim, heads, pool, ratio, decoder=False):
        super().__init__()
        eps = 1e-5 if decoder else 1e-6
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, heads, pool, decoder)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = MLP(dim, ratio, decoder)

    def forward(self, x, size):
        x = x + self.attn(self.norm1(x), size)
        return x + self.mlp(self.norm2(x), size)


class PatchEmbed(nn.Module):

    def __init__(self, in_channels, dim, kernel, stride):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, kernel, stride, kernel // 2)
        self.norm = nn.LayerNorm(dim, eps=1e-5)

    def forward(self, x):
        x = self.proj(x)
        return self.norm(x.flatten(2).transpose(1, 2)), tuple(x.shape[2:])


class Backbone(nn.Module):

    def __init__(self, dims, depths, heads, ratios, pools):
        super().__init__()
        self.num_stages = len(dims)
        for i, dim in enumerate(dims):
            first = i == 0
            setattr(self, f'patch_embed{i + 1}', PatchEmbed(
                3 if first else dims[i - 1], dim, 7 if first else 3, 4 if first else 2))
            setattr(self, f'block{i + 1}', nn.ModuleList(
                Block(dim, heads[i], pools[i], ratios[i]) for _ in range(depths[i])))
            setattr(self, f'norm{i + 1}', nn.LayerNorm(dim, eps=1e-6))

    def forward(self, x):
        maps = []
        for i in range(1, self.num_stages + 1):
            x, size = getattr(self, f'patch_embed{i}')(x)
            for block in getattr(self, f'block{i}'):
                x = block(x, size)
            x = getattr(self, f'norm{i}')(x)
            x = x.transpose(1, 2).reshape(x.shape[0], x.shape[2], *size)
            maps.append(x)
        return maps


class Fuse(nn.Module):

    def __init__(self, in_channels, channels):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class Head(nn.Module):

    def __init__(self, dims, channels, num_classes, ratio):
        super().__init__()
        for name, dim, heads, pool in (('attn4', dims[2], 8, 1), ('attn44', dims[2], 8, 1),
                                       ('attn444', dims[2], 8, 1), ('attn3', dims[1], 4, 2),
                                       ('attn33', dims[1], 4, 2), ('attn2', dims[0], 2, 4)):
            setattr(self, name, Block(dim, heads, pool, ratio, decoder=True))
        self.linear_fuse = Fuse(sum(dims), channels)
        self.linear_pred = nn.Conv2d(channels, num_classes, 1)

    def forward(self, maps):
        size = maps[1].shape[2:]
        levels = []
        for x, names in ((maps[3], ('attn4', 'attn44', 'attn444')),
                         (maps[2], ('attn3', 'attn33')), (maps[1], ('attn2',))):
            b, c, *grid = x.shape
            tokens = x.flatten(2).transpose(1, 2)
            for name in names:
                tokens = getattr(self, name)(tokens, grid)
            x = tokens.transpose(1, 2).reshape(b, c, *grid)
            levels.append(F.interpolate(x, size, mode='bilinear', align_corners=False))
        return self.linear_pred(self.linear_fuse(torch.cat(levels, 1)))


class PlainEDAFormer(nn.Module):

    def __init__(self, dims, depths, ratios, decoder_ratio, channels, num_classes):
        super().__init__()
        self.backbone = Backbone(dims, depths, (1, 2, 4, 8), ratios, (8, 4, 2, 1))
        self.decode_head = Head(dims[1:], channels, num_classes, decoder_ratio)

    def forward(self, x):
        return self.decode_head(self.backbone(x))

    def set_isr(self, encoder, decoder):
        for i, ratio in enumerate(encoder):
            for block in getattr(self.backbone, f'block{i + 1}'):
                block.attn.isr_ratio = ratio
        for level, ratio in zip('234', decoder):
            for name, block in self.decode_head.named_children():
                if name.startswith('attn' + level):
                    block.attn.isr_ratio = ratio


def build(size, num_classes=150):
    """The plain EDAFormer-T or -B."""
    if size == 'tiny':
        return PlainEDAFormer((32, 64, 128, 256), (2, 2, 10, 2), (3.8,) * 4, 2, 128, num_classes)
    return PlainEDAFormer((64, 128, 256, 512), (3, 3, 22, 3), (4,) * 4, 1, 768, num_classes)
