# Table 7: EDAFormer-T's decoder on Swin-T.
# ImageNet weights: --cfg-options model.backbone.init_cfg.type=Pretrained
# model.backbone.init_cfg.checkpoint=https://download.openmmlab.com/mmsegmentation/v0.5/pretrain/swin/swin_tiny_patch4_window7_224_20220317-1cdeb081.pth
_base_ = ['../edaformer_t_cityscapes.py']
model = dict(
    backbone=dict(
        _delete_=True, type='SwinTransformer', embed_dims=96, depths=(2, 2, 6, 2),
        num_heads=(3, 6, 12, 24), window_size=7, drop_path_rate=0.3, out_indices=(1, 2, 3)),
    decode_head=dict(in_channels=(192, 384, 768), in_index=(0, 1, 2)))
