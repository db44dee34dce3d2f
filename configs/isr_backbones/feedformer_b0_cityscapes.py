# Table 7: FeedFormer-B0. ImageNet weights as in mit_b0_cityscapes.py.
_base_ = ['./segformer_b0_cityscapes.py']
model = dict(decode_head=dict(type='FeedFormerHead'))
