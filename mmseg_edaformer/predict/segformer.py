"""SegFormer of transformers as a model of mmseg, in one file that needs no other library."""
from pathlib import Path
from typing import Any

import torch
from mmseg.registry import MODELS
from torch import nn

from ..engine.single_file import Description, pack
from ..errors import CheckpointError
from .foreign import load_foreign


def convert_segformer(source: str, target: str | Path) -> Description:
    """Write a SegFormer of transformers to a .safetensors, as mmseg's with equal logits."""
    foreign, model, _ = load_foreign(source)
    network: Any = model.network
    config = network.config
    read, step = foreign.pipeline
    norm = step['processor']
    if config.model_type != 'segformer' or not config.reshape_last_stage or len(
            {size / heads for size, heads in zip(config.hidden_sizes,
                                                 config.num_attention_heads)}) > 1 or (
            len({*config.mlp_ratios}) > 1 or config.hidden_act != 'gelu' or not norm.do_resize or
            not norm.do_rescale or not norm.do_normalize or norm.resample != 2 or
            not norm.size.get('width') or abs(255 * norm.rescale_factor - 1) > 1e-6):
        raise CheckpointError(f'{source} is a {type(network).__name__}, which is not converted: '
                              'predict with the model as it is, or give a SegFormer of the usual '
                              'sizes with its usual processor')
    epsilon = next(module.eps for module in network.modules() if isinstance(module, nn.LayerNorm))
    own = dict(
        type='EncoderDecoder', data_preprocessor=dict(
            type='SegDataPreProcessor', mean=[255 * value for value in norm.image_mean],
            std=[255 * value for value in norm.image_std], bgr_to_rgb=True),
        backbone=dict(
            type='MixVisionTransformer', num_layers=config.depths,
            embed_dims=config.hidden_sizes[0] // config.num_attention_heads[0],
            num_heads=config.num_attention_heads, patch_sizes=config.patch_sizes,
            strides=config.strides, sr_ratios=config.sr_ratios, mlp_ratio=config.mlp_ratios[0],
            norm_cfg=dict(type='LN', eps=epsilon)),
        decode_head=dict(
            type='FusedSegformerHead', in_channels=config.hidden_sizes,
            channels=config.decoder_hidden_size, num_classes=config.num_labels),
        test_cfg=dict(mode='whole'))
    resize = dict(type='Resize', scale=(norm.size['width'], norm.size['height']),
                  backend='pillow')  # as the processor, with antialiasing
    state, tensors = network.segformer.state_dict(), []
    for name, tensor in state.items():  # which come in the order of mmseg's
        if '.q_proj.' in name:
            tensor = torch.cat([state[name.replace('.q_', f'.{part}_')] for part in 'qkv'])
        if '.k_proj.' not in name and '.v_proj.' not in name:
            tensors.append(tensor)
    names = MODELS.build(own['backbone']).state_dict()
    weights = {f'backbone.{name}': tensor.view_as(like) for (name, like), tensor in zip(
        names.items(), tensors, strict=True)}
    weights |= {f'decode_head.{name}': tensor
                for name, tensor in network.decode_head.state_dict().items()}
    return pack(target, Description(own, [read, resize, dict(type='PackSegInputs')],
                                    foreign.classes, foreign.palette),
                dict(state_dict=weights, meta={}), source)
