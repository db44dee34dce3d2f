# Table 3(a): a 3x3 convolution at the attention's place in the decoder.
# The paper's data set for this table is not known here.
_base_ = ['../edaformer_t_ade.py']
model = dict(decode_head=dict(token_mixer='conv'))
