_base_ = ['./eft_t_in1k.py']
# Drop path as for PVTv2-B2, which has its size; PVTv2-B3 and larger take 0.3.
model = dict(backbone=dict(arch='base', drop_path_rate=0.1), head=dict(in_channels=512))
