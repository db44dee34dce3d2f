# Table 7: EDAFormer-T's decoder on LVT.
_base_ = ['../edaformer_t_cityscapes.py']
model = dict(
    backbone=dict(_delete_=True, type='LVT'),
    decode_head=dict(in_channels=(64, 160, 256)))
