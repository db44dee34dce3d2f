# Table 7: EDAFormer-T's decoder on DaViT-T, which needs timm.
# ImageNet weights, from timm: --cfg-options model.backbone.pretrained=True
_base_ = ['../edaformer_t_cityscapes.py']
model = dict(
    backbone=dict(_delete_=True, type='TimmMaps', model_name='davit_tiny', drop_path_rate=0.1),
    decode_head=dict(in_channels=(192, 384, 768)))
