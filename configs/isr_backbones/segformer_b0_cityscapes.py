# Table 7: SegFormer-B0. ImageNet weights as in mit_b0_cityscapes.py.
_base_ = [
    '../_base_/models/segformer_b0.py', '../_base_/datasets/cityscapes.py',
    '../_base_/schedules/160k.py', '../_base_/default_runtime.py'
]
model = dict(
    data_preprocessor=dict(size=(1024, 1024)),
    decode_head=dict(num_classes=19),
    test_cfg=dict(mode='slide', crop_size=(1024, 1024), stride=(768, 768)))
auto_scale_lr = dict(base_batch_size=8)
