# One GPU and some hundred images, from a trained checkpoint: 100 epochs of 160 images.
_base_ = './160k.py'
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=200),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=200, end=4000),
]
train_cfg = dict(max_iters=4000, val_interval=400)
default_hooks = dict(checkpoint=dict(interval=400))
auto_scale_lr = dict(base_batch_size=4)
