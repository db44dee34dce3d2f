"""The networks: EFT, the encoder, and EDAFormerHead, the decoder."""
from .attention import EmbeddingFreeAttention
from .blocks import MixFFN, PatchEmbed, TransformerBlock
from .edaformer_head import EDAFormerHead
from .eft import EFT

__all__ = ['EFT', 'EDAFormerHead', 'EmbeddingFreeAttention', 'MixFFN', 'PatchEmbed',
           'TransformerBlock']
