# The recipe of eft_t_in1k.py in small: drawn images of 64x64, a quarter of an hour on a CPU.
_base_ = ['./eft_t_in1k.py']
data_root = 'data/crops'
crop_size = (64, 64)
model = dict(
    data_preprocessor=dict(num_classes=10),
    backbone=dict(drop_path_rate=0.),
    head=dict(num_classes=10, loss=dict(num_classes=10)))
train_pipeline = _base_.train_pipeline
train_pipeline[1].update(scale=64, crop_ratio_range=(0.5, 1.0))
test_pipeline = [dict(type='mmseg.LoadSegImage'), dict(type='PackInputs')]
train_dataloader = dict(
    batch_size=64,
    num_workers=1,
    dataset=dict(type='CustomDataset', data_root=data_root, pipeline=train_pipeline))
val_dataloader = dict(
    batch_size=100,
    num_workers=1,
    dataset=dict(type='CustomDataset', data_root=data_root, pipeline=test_pipeline))
test_dataloader = val_dataloader
optim_wrapper = dict(optimizer=dict(lr=4e-4))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=False, begin=50, end=1800),
]
train_cfg = dict(max_iters=1800, val_interval=300)
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=300))
auto_scale_lr = dict(base_batch_size=64)
randomness = dict(seed=0)
