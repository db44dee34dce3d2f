_base_ = [
    './_base_/models/edaformer_t.py', './_base_/datasets/ade20k.py',
    './_base_/schedules/160k.py', './_base_/default_runtime.py'
]
