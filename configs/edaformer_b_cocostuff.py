_base_ = [
    './_base_/models/edaformer_b.py', './_base_/datasets/cocostuff.py',
    './_base_/schedules/160k.py', './_base_/default_runtime.py'
]
model = dict(decode_head=dict(num_classes=171))
