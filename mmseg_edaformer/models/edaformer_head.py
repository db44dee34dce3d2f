"""The all-attention decoder of EDAFormer (arXiv 2407.17261, section 3.3)."""
from collections.abc import Sequence
from typing import Any

from mmseg.registry import MODELS
from torch import Tensor, nn

from ..errors import ConfigError
from .blocks import TransformerBlock
from .fused_head import FusedHead
from .layers import channels_last


@MODELS.register_module()
class EDAFormerHead(FusedHead):
    """Decoder of embedding-free attention on each level, then one fuse layer.

    Each level passes through its own transformer blocks, deeper levels through more of them, and
    `FusedHead` joins the levels.

    The lists have one entry per level, from the shallowest to the deepest, so other structures, and
    two or four levels, need only a config.

    Args:
        in_channels: Channels of the levels.
        channels: Channels E of the fuse layer (T 128, B 768).
        in_index: Indices of the backbone's maps that are the levels.
        depths: Transformer blocks per level.
        num_heads: Attention heads per level.
        pool_ratios: Pool of the keys during training, per level.
        ffn_ratios: Expansion of the feed-forward networks, per level or one number (T 2, B 1).
        token_mixer: The layer in place of the attention, for the ablations of tables 3(a) and 5(b):
            'embedding_free', 'embedded' (with Q, K and V projections), 'depthwise_conv' or 'conv'.
        drop_rate: Dropout in the feed-forward networks.
        drop_path_rate: Stochastic depth in every block.
        norm_cfg: Norm after the fuse layer.
        kwargs: Arguments of mmseg's ``BaseDecodeHead``: ``num_classes``, ``dropout_ratio``,
            ``loss_decode``, ``align_corners`` and others.

    Raises:
        ConfigError: The lists differ in length, or ``token_mixer`` is unknown.
    """

    def __init__(self, in_channels: Sequence[int], channels: int, *,
                 in_index: Sequence[int] = (1, 2, 3), depths: Sequence[int] = (1, 2, 3),
                 num_heads: Sequence[int] = (2, 4, 8), pool_ratios: Sequence[int] = (4, 2, 1),
                 ffn_ratios: float | Sequence[float] = 2, token_mixer: str = 'embedding_free',
                 drop_rate: float = 0., drop_path_rate: float = 0.1,
                 norm_cfg: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if isinstance(ffn_ratios, (int, float)):
            ffn_ratios = [ffn_ratios] * len(in_channels)
        sizes = dict(in_channels=in_channels, in_index=in_index, depths=depths,
                     num_heads=num_heads, pool_ratios=pool_ratios, ffn_ratios=ffn_ratios)
        if len({len(values) for values in sizes.values()}) > 1:
            raise ConfigError('EDAFormerHead needs one entry per level in every list, found ' +
                              ', '.join(f'{len(values)} {name}' for name, values in sizes.items()))
        super().__init__(
            (nn.Sequential(*(TransformerBlock(dim, heads, pool_ratio, ffn_ratio, decoder=True,
                                              token_mixer=token_mixer, drop_rate=drop_rate,
                                              drop_path_rate=drop_path_rate)
                             for _ in range(depth)))
             for dim, depth, heads, pool_ratio, ffn_ratio in zip(
                 in_channels, depths, num_heads, pool_ratios, ffn_ratios)),
            in_channels, channels, in_index=in_index, norm_cfg=norm_cfg, **kwargs)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Decode the backbone's maps.

        Args:
            inputs: Maps of the backbone, from which ``in_index`` selects the levels.

        Returns:
            Logits, N x num_classes x H x W, at the size of the shallowest level.
        """
        return self.classify([level(channels_last(x)) for level, x in
                              zip(self.levels, self._transform_inputs(inputs))])
