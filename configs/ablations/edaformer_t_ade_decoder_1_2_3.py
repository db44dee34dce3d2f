# Table 3(b): the decoder structure {1-2-3}. The paper prints blocks from the deepest level to the
# shallowest, its own being {3-2-1}; its data set for this table is not known here.
_base_ = ['../edaformer_t_ade.py']
model = dict(decode_head=dict(depths=(3, 2, 1)))
