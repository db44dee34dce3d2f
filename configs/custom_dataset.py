# Your own classes, in four steps. Copy this file; images and masks have the same names, masks are
# one-channel PNG with the class index of each pixel, 255 where there is none.
_base_ = [
    './_base_/models/edaformer_t.py', './_base_/datasets/ade20k.py',
    './_base_/schedules/small.py', './_base_/default_runtime.py'  # thousands of images: 160k.py
]
# 1. What the classes are called, and how they are painted.
metainfo = dict(
    classes=('background', 'cat', 'dog'), palette=[[0, 0, 0], [220, 20, 60], [0, 130, 180]])
num_classes = 3
# 2. Where the files lie.
data = dict(
    type='BaseSegDataset', data_root='data/mine', metainfo=metainfo, img_suffix='.jpg',
    seg_map_suffix='.png', reduce_zero_label=False)
train = dict(data_prefix=dict(img_path='images/train', seg_map_path='masks/train'))
val = dict(data_prefix=dict(img_path='images/val', seg_map_path='masks/val'))
# 3. How the images are read.
labels = dict(type='LoadSegLabels', num_classes=num_classes)
train_pipeline = [
    dict(type='LoadSegImage'), labels,
    dict(type='RandomResize', scale=(2048, 512), ratio_range=(0.5, 2.0), keep_ratio=True,
         resize_type='SegResize'),
    dict(type='RandomSegCrop', crop_size=(512, 512), cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5), dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'), dict(type='SegResize', scale=(2048, 512), keep_ratio=True),
    dict(type='ResizeToMultiple', size_divisor=32), labels, dict(type='PackSegInputs'),
]
tta_pipeline = _base_.tta_pipeline
tta_pipeline[1]['transforms'][3] = [labels]
train_dataloader = dict(dataset=dict(_delete_=True, pipeline=train_pipeline, **data, **train))
val_dataloader = dict(dataset=dict(_delete_=True, pipeline=test_pipeline, **data, **val))
test_dataloader = val_dataloader
# 4. The classifier.
model = dict(decode_head=dict(num_classes=num_classes))
