# The demo: a few minutes on two CPU cores.
_base_ = [
    './_base_/models/edaformer_t.py', './_base_/datasets/synthetic.py',
    './_base_/schedules/scratch.py', './_base_/default_runtime.py'
]
model = dict(
    data_preprocessor=dict(size=(160, 160)),
    backbone=dict(drop_path_rate=0.),
    decode_head=dict(num_classes=8, drop_path_rate=0.))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-2, by_epoch=False, begin=0, end=50),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=50, end=500),
]
train_cfg = dict(max_iters=500, val_interval=500)
default_hooks = dict(checkpoint=dict(interval=500))
