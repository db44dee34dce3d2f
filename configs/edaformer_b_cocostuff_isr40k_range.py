# Fine-tuned for the whole dial at once, from the trained model; docs/isr.md.
_base_ = ['./edaformer_b_cocostuff_isr40k.py']
model = dict(
    backbone=dict(pool_ratios=(8, 4, 2, 1)),
    decode_head=dict(pool_ratios=(4, 2, 1)),
    train_cfg=dict(isr_range=dict(isr_ratios=('2211-222', '2222-222', '4422-444', '2222-222+q2'))))
