# Table 7: EDAFormer-T's decoder on CvT-13, which needs transformers. Its stages have strides 4, 8
# and 16. All three are levels of the decoder, pooled so that the keys have the stride 32 of
# elsewhere. The scores of CvT's first stage alone take 8 GB for two crops. Its attention costs 885
# GMACs at 1024x2048, more than the 365.5 that the paper has for the whole model, which come near at
# 1024x1024.
# ImageNet weights: --cfg-options model.backbone.pretrained=microsoft/cvt-13
_base_ = ['../edaformer_t_cityscapes.py']
model = dict(
    backbone=dict(_delete_=True, type='TransformersMaps', model_type='cvt'),
    decode_head=dict(in_channels=(64, 192, 384), in_index=(0, 1, 2), pool_ratios=(8, 4, 2)))
