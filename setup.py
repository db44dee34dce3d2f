"""Packaging of mmseg_edaformer."""
import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r"^__version__ = '(.+)'$",
                    (ROOT / 'mmseg_edaformer' / '__init__.py').read_text(encoding='utf-8'),
                    re.M).group(1)

setup(
    name='mmseg_edaformer',
    version=VERSION,
    description='EDAFormer for mmsegmentation: efficient segmentation whose cost is a dial',
    long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.11',
    packages=find_packages(include=['mmseg_edaformer', 'mmseg_edaformer.*']),
    package_data={'mmseg_edaformer': ['models/*.cpp', 'predict/*.css']},
    install_requires=['torch>=2.4', 'numpy', 'safetensors', 'rich', 'prettytable', 'packaging',
                      'pillow>=10.1', 'simplejpeg'],
    extras_require={
        'openmmlab': ['mmengine>=0.10.3', 'mmsegmentation>=1.2.2', 'mmcv-lite>=2.0.1,<2.2.0',
                      'ftfy', 'regex'],
        'fork': ['onedl-mmengine>=0.10.8', 'onedl-mmsegmentation>=1.4.0', 'onedl-mmcv>=2.3.0'],
        'backbones': ['timm', 'torchvision', 'transformers'],
        # torchvision: mmpretrain needs it and does not declare it.
        'pretrain': ['mmpretrain>=1.2.0', 'torchvision'],
        'pretrain-fork': ['onedl-mmpretrain>=1.3.6', 'torchvision'],
        'cityscapes': ['cityscapesscripts'],
        'demo': ['gradio>=6'],
        'cluster': ['ray[data]'],
        'export': ['onnx', 'onnxscript', 'onnxruntime', 'openvino', 'nncf'],
        'tensorboard': ['tensorboard'],
        'dev': ['pytest', 'pytest-xdist', 'ruff', 'mypy', 'timm', 'torchvision', 'transformers',
                'mmpretrain', 'playwright', 'segmentation-models-pytorch'],
    },
)
