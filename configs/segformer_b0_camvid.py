_base_ = [
    './_base_/models/segformer_b0.py', './_base_/datasets/camvid.py',
    './_base_/schedules/scratch.py', './_base_/default_runtime.py'
]
model = dict(
    data_preprocessor=dict(size=(320, 320)),
    backbone=dict(drop_path_rate=0.1),
    decode_head=dict(num_classes=11))
