# Table 4: fine-tuned at the pools of ISR 2222-222 (the paper's [16,8,4,2]-[2,4,8]) from the trained
# model. The paper gives no learning rate for it; this is the one of the training.
_base_ = ['./edaformer_t_cityscapes.py']
load_from = 'work_dirs/edaformer_t_cityscapes/iter_160000.pth'
model = dict(
    backbone=dict(pool_ratios=(16, 8, 4, 2)), decode_head=dict(pool_ratios=(8, 4, 2)))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=1500, end=40000),
]
train_cfg = dict(max_iters=40000, val_interval=8000)
