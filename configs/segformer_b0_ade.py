_base_ = [
    './_base_/models/segformer_b0.py', './_base_/datasets/ade20k.py',
    './_base_/schedules/160k.py', './_base_/default_runtime.py'
]
