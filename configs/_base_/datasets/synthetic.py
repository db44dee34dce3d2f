num_classes = 8
dataset_type = 'SyntheticDataset'
data_root = 'data/synthetic'
crop_size = (160, 160)
train_pipeline = [
    dict(type='LoadSegImage'),
    dict(type='LoadSegLabels', num_classes=num_classes),
    dict(
        type='RandomResize', scale=(256, 192), ratio_range=(0.85, 1.4), keep_ratio=True,
        resize_type='SegResize'),
    dict(type='RandomSegCrop', crop_size=crop_size),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),  # by this name mmseg's inferencers find it
    dict(type='LoadSegLabels', num_classes=num_classes),
    dict(type='PackSegInputs'),
]
tta_pipeline = [
    dict(type='LoadSegImage'),
    dict(type='TestTimeAug', transforms=[
        [dict(type='SegResize', scale=(int(256 * ratio), int(192 * ratio)), keep_ratio=True)
         for ratio in (0.75, 1.0, 1.25)],
        [dict(type='RandomFlip', prob=prob, direction='horizontal') for prob in (0., 1.)],
        [dict(type='LoadSegLabels', num_classes=num_classes)],
        [dict(type='PackSegInputs')],
    ]),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        data_prefix=dict(img_path='images/training', seg_map_path='annotations/training'),
        pipeline=train_pipeline))
val_dataloader = dict(
    batch_size=1,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        data_prefix=dict(img_path='images/validation', seg_map_path='annotations/validation'),
        pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator
