"""Small models of other libraries, with weights that see several classes, as they save them."""
import json

import numpy as np
import torch
import transformers

from mmseg_edaformer.data.drawing import draw_scene

NAMES = ['sky', 'tree', 'house', 'road', 'car', 'meadow', 'water']
WIDTHS = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=48)
STAGES = dict(hidden_sizes=[8, 16, 32, 64], num_attention_heads=[1, 2, 4, 8], depths=[1, 1, 1, 1])
FIXED = dict(image_size=64, patch_size=8)
MASKED = dict(hidden_dim=32, num_attention_heads=4, encoder_feedforward_dim=32, encoder_layers=1,
              num_queries=20)


def swin():
    return transformers.SwinConfig(
        embed_dim=24, depths=[1, 1, 1, 1], num_heads=[1, 2, 3, 4], window_size=4, image_size=64,
        out_features=['stage1', 'stage2', 'stage3', 'stage4'])


def upernet():
    return dict(backbone_config=swin(), hidden_size=16, pool_scales=[1, 2],
                use_auxiliary_head=False)


BEIT = dict(WIDTHS, **FIXED, out_indices=[1, 2, 3, 4], use_relative_position_bias=True,
            pool_scales=[1, 2], use_auxiliary_head=False)
PER_PIXEL = {
    'Segformer': ('Segformer', lambda: dict(STAGES, decoder_hidden_size=32)),
    'UperNet': ('Segformer', upernet),
    'Beit': ('Beit', lambda: BEIT),
    'Data2VecVision': ('Beit', lambda: BEIT),
    'DPT': ('DPT', lambda: dict(
        WIDTHS, **FIXED, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 16, 16, 16],
        fusion_hidden_size=16, use_auxiliary_head=False)),
    'MobileViT': ('MobileViT', lambda: dict(
        image_size=64, hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8] * 7,
        num_attention_heads=4, aspp_out_channels=32, output_stride=16))}
"""The kind of processor, and the configuration, of models whose logits are per pixel."""
MASKS = {
    'Mask2Former': ('Mask2Former', 'Universal', lambda: dict(
        MASKED, backbone_config=swin(), decoder_layers=2, dim_feedforward=32, feature_size=32,
        mask_feature_size=32)),
    'MaskFormer': ('MaskFormer', 'Instance', lambda: dict(
        fpn_feature_size=32, mask_feature_size=32, backbone_config=swin(),
        decoder_config=transformers.MaskFormerDetrConfig(
            d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=32,
            num_queries=20))),
    'OneFormer': ('OneFormer', 'Universal', lambda: dict(
        MASKED, backbone_config=swin(), decoder_layers=2, dim_feedforward=32, conv_dim=32,
        mask_dim=32, query_dec_layers=2, task_seq_len=7, is_training=False)),
    'Eomt': ('Eomt', 'Universal', lambda: dict(
        WIDTHS, **FIXED, num_queries=20, num_register_tokens=2, num_blocks=1))}
SQUARES = dict(height=64, width=64)


def save(folder, name, *, processor=None, seed=0, **settings):
    """Save a model and its processor, as users do; returns both."""
    torch.manual_seed(seed)
    if name in PER_PIXEL:
        kind, config = PER_PIXEL[name]
        cls = getattr(transformers, f'{name}ForSemanticSegmentation')
        settings = dict(size=SQUARES) | settings
    else:
        kind, task, config = MASKS[name]
        cls = getattr(transformers, f'{name}For{task}Segmentation')
        settings = dict(size=dict(shortest_edge=64, longest_edge=None), do_split_image=True) if (
            name == 'Eomt') else dict(size=dict(shortest_edge=64, longest_edge=160)) | settings
    config = getattr(transformers, f'{name}Config')(
        id2label=dict(enumerate(NAMES)), label2id={}, **config())
    model = cls(config)
    for key, parameter in model.named_parameters():
        if parameter.dim() > 1 and 'embed' not in key:
            torch.nn.init.normal_(parameter, 0, 1.4 / parameter[0].numel() ** 0.5)
    processor = processor or make_processor(kind, **settings)
    model.eval()
    _spread(model, name, lambda: run(model, processor, scene(150, 96)))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


def make_processor(kind, **settings):
    cls = getattr(transformers, f'{kind}ImageProcessor')
    if kind != 'OneFormer':
        return cls(**settings)
    metadata = {str(index): dict(name=name, isthing=0) for index, name in enumerate(NAMES)}
    tokenizer = transformers.CLIPTokenizer(
        vocab={word: index for index, word in enumerate(
            ['<|startoftext|>', '<|endoftext|>', *'thetaskisemnc', *(f'{c}</w>' for c in 'eksc')])},
        merges=[])
    return transformers.OneFormerProcessor(
        cls(num_text=1, class_info_file=None, metadata=metadata, **settings), tokenizer,
        max_seq_length=7, task_seq_length=7)


@torch.no_grad()
def _spread(model, name, look):
    """Have each class win somewhere: the outputs of the last layers get a mean of 0.

    ``look`` runs the model.
    """
    layers = {key: module for key, module in model.named_modules()
              if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear))}
    if name in PER_PIXEL:
        last = [next(key for key in reversed(layers) if layers[key].bias is not None and
                     layers[key].weight.shape[0] == len(NAMES))]
    else:
        masks = [key for key in layers if 'mask_embed' in key or 'mask_head' in key]
        last = [*(key for key in layers if key.endswith('mask_projection')), masks[-1],
                next(key for key in layers if key.endswith(('class_predictor', 'class_embed')))]
    for key in last:
        layer, seen = layers[key], []
        handle = layer.register_forward_hook(lambda *args, seen=seen: seen.append(args[-1]))
        look()
        handle.remove()
        channels = seen[-1].movedim(1 if seen[-1].dim() == 4 else -1, 0).flatten(1)
        scale = (1 if name in PER_PIXEL else 9) / channels.std(1)
        layer.bias.sub_(channels.mean(1)).mul_(scale)
        layer.weight.mul_(scale.view(-1, *[1] * (layer.weight.dim() - 1)))


def scene(height, width):
    """A drawn image, RGB."""
    return np.ascontiguousarray(draw_scene(np.random.default_rng(5), (height, width))[0])


@torch.no_grad()
def run(model, processor, image):
    """The output of a model for an image, H x W x 3, RGB, by the library's own pipeline."""
    task = dict(task_inputs=['semantic']) if 'OneFormer' in type(model).__name__ else {}
    return model(**processor(images=image, return_tensors='pt', **task))


def own_labels(model, processor, image):
    """The labels of an image by the library's own pipeline."""
    own = getattr(processor, 'image_processor', processor)
    return np.asarray(own.post_process_semantic_segmentation(
        run(model, processor, image), target_sizes=[image.shape[:2]])[0])


def change_json(path, **values):
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **values}))
