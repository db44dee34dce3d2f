"""SegFormer of transformers as a model of mmseg, in one file that needs no other library."""
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..engine.single_file import Description, pack
from ..errors import CheckpointError
from .foreign import load_foreign

_RENAMED = [
    (r'^segformer\.stages\.', 'backbone.layers.'),
    (r'\.patch_embeddings\.proj\.', '.0.projection.'),
    (r'\.patch_embeddings\.layer_norm\.', '.0.norm.'),
    (r'\.blocks\.', '.1.'),
    (r'(layers\.\d+)\.layer_norm\.', r'\1.2.'),
    (r'\.layernorm_before\.', '.norm1.'),
    (r'\.layernorm_after\.', '.norm2.'),
    (r'\.sequence_reduction\.sequence_reduction\.', '.sr.'),
    (r'\.sequence_reduction\.layer_norm\.', '.norm.'),
    (r'\.attention\.o_proj\.', '.attn.attn.out_proj.'),
    (r'\.attention\.q_proj\.', '.attn.attn.in_proj_'),
    (r'\.attention\.', '.attn.'),
    (r'\.mlp\.fc1\.', '.ffn.layers.0.'),
    (r'\.mlp\.dwconv\.dwconv\.', '.ffn.layers.1.'),
    (r'\.mlp\.fc2\.', '.ffn.layers.4.'),
]


def convert_segformer(source: str, target: str | Path) -> Description:
    """Write a SegFormer of transformers to a .safetensors, as mmseg's with equal logits."""
    foreign, model, _ = load_foreign(source)
    step, network = foreign.pipeline[1], model.network
    config = getattr(network, 'config', None)
    heads = getattr(config, 'num_attention_heads', ())
    sizes = getattr(config, 'hidden_sizes', ())
    if type(network).__name__ != 'SegformerForSemanticSegmentation' or (
            [sizes[0] * count for count in heads] != [heads[0] * size for size in sizes]):
        raise CheckpointError(f'{source} is a {type(network).__name__}, which is not converted: '
                              'predict with the model as it is, or give a SegFormer of the usual '
                              'sizes')
    norm = step['processor']
    epsilon = next(module.eps for module in network.modules() if isinstance(module, nn.LayerNorm))
    described = Description(dict(
        type='EncoderDecoder', data_preprocessor=dict(
            type='SegDataPreProcessor', mean=[255 * value for value in norm.image_mean],
            std=[255 * value for value in norm.image_std], bgr_to_rgb=True),
        backbone=dict(type='MixVisionTransformer', embed_dims=sizes[0] // heads[0],
                      num_layers=config.depths, num_heads=heads, patch_sizes=config.patch_sizes,
                      strides=config.strides, sr_ratios=config.sr_ratios,
                      mlp_ratio=config.mlp_ratios[0], qkv_bias=True,
                      norm_cfg=dict(type='LN', eps=epsilon)),
        decode_head=dict(type='FusedSegformerHead', in_channels=sizes,
                         channels=config.decoder_hidden_size, num_classes=config.num_labels),
        test_cfg=dict(mode='whole')), [
            foreign.pipeline[0], dict(type='Resize', scale=(norm.size['width'],
                                                            norm.size['height'])),
            dict(type='PackSegInputs')], foreign.classes, foreign.palette)
    weights = dict(state_dict=_rename(network.state_dict()), meta={})
    return pack(target, described, weights, source)


def _rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights under mmseg's names, with queries, keys and values in one matrix."""
    weights = {}
    for name, tensor in state.items():
        if '.k_proj.' in name or '.v_proj.' in name:
            continue
        if '.q_proj.' in name:
            tensor = torch.cat([state[name.replace('.q_', f'.{part}_')] for part in 'qkv'])
        for pattern, new in _RENAMED:
            name = re.sub(pattern, new, name)
        pointwise = '.ffn.' in name and tensor.dim() == 2
        weights[name] = tensor[..., None, None] if pointwise else tensor
    return weights
