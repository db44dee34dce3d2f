_base_ = ['./default_runtime.py']
default_scope = 'mmpretrain'
visualizer = dict(_delete_=True, type='UniversalVisualizer', vis_backends=_base_.vis_backends)
tta_model = None
