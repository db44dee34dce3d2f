_base_ = [
    '../../configs/_base_/datasets/ade20k.py', '../../configs/_base_/schedules/160k.py',
    '../../configs/_base_/default_runtime.py'
]
custom_imports = dict(imports=['mmseg_edaformer', 'tests.plain_segmentor'])
model = dict(
    type='PlainSegmentor',
    size='base',
    num_classes=150,
    data_preprocessor=dict(type='SegDataPreProcessor', size=(512, 512), seg_pad_val=255))
