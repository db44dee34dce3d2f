# Table 5(a): trained at the pools of ISR 2211-222 (the paper's [16,8,2,1]-[2,4,8]) from the start,
# to compare with edaformer_b_cocostuff.py reduced to them at inference.
_base_ = ['../edaformer_b_cocostuff.py']
model = dict(
    backbone=dict(pool_ratios=(16, 8, 2, 1)), decode_head=dict(pool_ratios=(8, 4, 2)))
