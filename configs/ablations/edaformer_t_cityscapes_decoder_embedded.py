# Table 5(b): the decoder's attention with Q, K and V projections, to compare under ISR 1-222, 1-333
# and 1-444 with edaformer_t_cityscapes.py.
_base_ = ['../edaformer_t_cityscapes.py']
model = dict(decode_head=dict(token_mixer='embedded'))
