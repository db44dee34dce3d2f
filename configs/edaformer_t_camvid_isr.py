# Table 4 in small: fine-tuned at the pools of ISR 2222-222 from the trained model.
_base_ = ['./edaformer_t_camvid.py']
load_from = 'work_dirs/edaformer_t_camvid/iter_10000.pth'
model = dict(
    backbone=dict(pool_ratios=(16, 8, 4, 2)), decode_head=dict(pool_ratios=(8, 4, 2)))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-2, by_epoch=False, begin=0, end=100),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=100, end=2500),
]
train_cfg = dict(max_iters=2500, val_interval=500)
default_hooks = dict(checkpoint=dict(interval=500))
