# PVTv2's recipe: 8 GPUs x 128 images, 300 epochs of 1,251 steps, of which 5 warm up from 1e-6.
# --amp computes in bfloat16. On another number of GPUs --auto-scale-lr scales the learning rate,
# or --cfg-options train_dataloader.batch_size keeps the 1,024 images per step.
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(
        type='AdamW', fused=True, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0., bias_decay_mult=0., flat_decay_mult=0.))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=6255),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=False, begin=6255, end=375300),
]
train_cfg = dict(type='ExactTrainLoop', max_iters=375300, val_interval=6255)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=100, log_metric_by_epoch=False),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(
        type='SafeCheckpointHook', by_epoch=False, interval=1251, max_keep_ckpts=3,
        save_best='accuracy/top1'),
    sampler_seed=dict(type='DistSamplerSeedHook'))
auto_scale_lr = dict(enable=False, base_batch_size=1024)
