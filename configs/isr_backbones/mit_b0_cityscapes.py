# Table 7: EDAFormer-T's decoder on MiT-B0.
# ImageNet weights: --cfg-options model.backbone.init_cfg.type=Pretrained
# model.backbone.init_cfg.checkpoint=https://download.openmmlab.com/mmsegmentation/v0.5/pretrain/segformer/mit_b0_20220624-7e0fe6dd.pth
_base_ = ['../edaformer_t_cityscapes.py']
model = dict(
    backbone=dict(
        _delete_=True, type='MixVisionTransformer', embed_dims=32, num_layers=(2, 2, 2, 2),
        num_heads=(1, 2, 5, 8), patch_sizes=(7, 3, 3, 3), sr_ratios=(8, 4, 2, 1), mlp_ratio=4,
        qkv_bias=True, drop_path_rate=0.1),
    decode_head=dict(in_channels=(64, 160, 256)))
