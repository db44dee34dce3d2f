"""mmpretrain's backbones."""
import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from ..key_layout import Arguments, Call, InputMap, Patches, Window
from ..pooling import Ratio
from ..rules import AttentionRule, Irreducible, Rule


@dataclass(frozen=True)
class MaskedWindow(Window):
    """Windows that mask the padding at the border of a map: Twins, here and in mmseg.

    Cells there average only tokens. ``shape`` is the argument that holds (h, w). These modules mask
    padding only if both rows and columns are padded; otherwise padding is a key like any other.
    """
    shape: str = 'hw_shape'

    def fitting(self, call: Call, ratio: Ratio, method: str) -> tuple[Ratio, str]:
        if method == 'average' or not all(self._padding(call)):
            return ratio, ''
        return 1, f'{method} would mix tokens and the padding of a window'

    def present(self, call: Call) -> Tensor | None:
        if not all(self._padding(call)):
            return None
        size: int = getattr(call.module, self.size)
        rows, columns = call.argument(self.shape)
        down, right = self._padding(call)
        x = call.argument('x')
        y_inside = torch.arange(rows + down, device=x.device) < rows
        x_inside = torch.arange(columns + right, device=x.device) < columns
        inside = y_inside.view(-1, 1, size, 1) & x_inside.view(1, -1, 1, size)
        return inside.reshape(-1, 1, size * size).to(x.dtype)

    def _padding(self, call: Call) -> tuple[int, int]:
        size: int = getattr(call.module, self.size)
        rows, columns = call.argument(self.shape)
        return -rows % size, -columns % size


_PLAIN = AttentionRule(Patches('patch_embed.projection'), ('num_extra_tokens',),
                       projections=('qkv',))
_SHIFTED = AttentionRule(Window(shift='shift_size'))
_CHANNELS = Irreducible('its keys are channels, not tokens')

_BACKBONES = 'mmpretrain.models.backbones'
_ATTENTION = 'mmpretrain.models.utils.attention'

RULES: dict[str, Rule] = {
    # Its stochastic depth compares NumPy numbers.
    f'{_ATTENTION}.MultiheadAttention': dataclasses.replace(_PLAIN, traceable=False),
    f'{_ATTENTION}.BEiTAttention': _PLAIN,
    f'{_ATTENTION}.WindowMSA': AttentionRule(Window(shift='shift_size'), projections=('qkv',)),
    f'{_ATTENTION}.WindowMSAV2': _SHIFTED,
    f'{_ATTENTION}.ChannelMultiheadAttention': _CHANNELS,
    f'{_BACKBONES}.vit_eva02.AttentionWithRoPE':
        AttentionRule(Arguments(('patch_resolution',)), ('cls_token',)),
    f'{_BACKBONES}.vit_sam.Attention': AttentionRule(InputMap(channels_last=True)),
    f'{_BACKBONES}.davit.DaViTWindowMSA': _SHIFTED,
    f'{_BACKBONES}.davit.ChannelAttention': _CHANNELS,
    f'{_BACKBONES}.twins.GlobalSubsampledAttention': AttentionRule(Arguments(('hw_shape',))),
    f'{_BACKBONES}.twins.LocallyGroupedSelfAttention': AttentionRule(MaskedWindow()),
    f'{_BACKBONES}.mvit.MultiScaleAttention': AttentionRule(Arguments(('in_size',))),
    f'{_BACKBONES}.xcit.ClassAttntion': AttentionRule(Patches('patch_embed.proj'), 1),
    f'{_BACKBONES}.xcit.XCA': _CHANNELS,
    f'{_BACKBONES}.van.SpatialAttention': Irreducible('it is a convolution, without keys'),
}
