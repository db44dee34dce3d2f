"""The networks: EFT, the encoder, EDAFormerHead, the decoder, and the segmentor around them."""
from .attention import EmbeddingFreeAttention
from .blocks import MixFFN, PatchEmbed, TransformerBlock
from .edaformer_head import EDAFormerHead
from .eft import EFT
from .segmentor import StreamedEncoderDecoder, StreamedTTAModel

__all__ = ['EFT', 'EDAFormerHead', 'EmbeddingFreeAttention', 'MixFFN', 'PatchEmbed',
           'StreamedEncoderDecoder', 'StreamedTTAModel', 'TransformerBlock']
