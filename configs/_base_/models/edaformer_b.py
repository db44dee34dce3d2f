_base_ = ['./edaformer_t.py']
model = dict(
    backbone=dict(arch='base'),
    decode_head=dict(in_channels=(128, 256, 512), channels=768, ffn_ratios=1))
