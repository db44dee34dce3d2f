_base_ = [
    '../../configs/_base_/datasets/cityscapes.py', '../../configs/_base_/schedules/160k.py',
    '../../configs/_base_/default_runtime.py'
]
custom_imports = dict(imports=['mmseg_edaformer', 'tests.plain_segmentor'])
model = dict(
    type='PlainSegmentor',
    size='tiny',
    num_classes=19,
    data_preprocessor=dict(type='SegDataPreProcessor', size=(1024, 1024), seg_pad_val=255))
