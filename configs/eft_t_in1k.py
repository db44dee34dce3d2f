# Pretraining of the encoder; docs/pretraining.md.
_base_ = [
    './_base_/models/eft_t_classifier.py', './_base_/datasets/in1k.py',
    './_base_/schedules/in1k_300e.py', './_base_/classification_runtime.py'
]
