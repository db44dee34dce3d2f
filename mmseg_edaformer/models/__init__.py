"""The networks: the encoder EFT, the decoder EDAFormerHead, and the segmentor around them.

`comparison` holds what the paper compares with: LVT, FeedFormer's decoder, backbones of timm and
transformers.
"""
from .attention import EmbeddedAttention, EmbeddingFreeAttention
from .blocks import MixFFN, PatchEmbed, TransformerBlock
from .comparison.feedformer_head import FeedFormerHead
from .comparison.library_backbones import TimmMaps, TransformersMaps
from .comparison.lvt import LVT
from .edaformer_head import EDAFormerHead
from .eft import EFT
from .segformer_head import FusedSegformerHead
from .segmentor import StreamedEncoderDecoder, StreamedTTAModel

__all__ = ['EFT', 'LVT', 'EDAFormerHead', 'EmbeddedAttention', 'EmbeddingFreeAttention',
           'FeedFormerHead', 'FusedSegformerHead', 'MixFFN', 'PatchEmbed', 'StreamedEncoderDecoder',
           'StreamedTTAModel', 'TimmMaps', 'TransformerBlock', 'TransformersMaps']
