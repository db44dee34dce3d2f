custom_imports = dict(imports=['mmseg_edaformer', 'mmseg_edaformer.safe_defaults'])
default_scope = 'mmseg'
env_cfg = dict(
    cudnn_benchmark=True,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'))
sync_bn = 'torch'
vis_backends = [dict(type='SafeLocalVisBackend')]
visualizer = dict(type='SegLocalVisualizer', vis_backends=vis_backends, name='visualizer')
log_processor = dict(by_epoch=False)
log_level = 'INFO'
load_from = None
resume = False
tta_model = dict(type='StreamedTTAModel')
custom_hooks = [dict(type='CheckWeightsHook'), dict(type='ProgressHook')]
