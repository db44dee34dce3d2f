# To see ISR on another model: docs/isr.md. The schedule is that of edaformer_t_synthetic.py.
_base_ = [
    './_base_/models/segformer_b0.py', './_base_/datasets/synthetic.py',
    './_base_/schedules/scratch.py', './_base_/default_runtime.py'
]
model = dict(
    data_preprocessor=dict(size=(160, 160)),
    backbone=dict(drop_path_rate=0.),
    decode_head=dict(num_classes=8))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-2, by_epoch=False, begin=0, end=50),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=50, end=1200),
]
train_cfg = dict(max_iters=1200, val_interval=1200)
default_hooks = dict(checkpoint=dict(interval=1200))
