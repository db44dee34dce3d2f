"""Packaging of mmseg_edaformer."""
import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
VERSION = re.search(r"^__version__ = '(.+)'$",
                    (ROOT / 'mmseg_edaformer' / '__init__.py').read_text(encoding='utf-8'),
                    re.M).group(1)
# What all but ISR needs beside one of the two sets of OpenMMLab's packages.
RUNS = ['numpy', 'safetensors', 'rich', 'prettytable', 'packaging', 'pillow>=10.1', 'simplejpeg',
        'jinja2', 'matplotlib']


class BuildWithConfigs(build_py):
    """Adds configs and tools to the wheel, where OpenMMLab's mim and our own commands look."""

    def run(self):
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib, 'mmseg_edaformer', '.mim')
        for name in ('configs', 'tools'):
            shutil.copytree(ROOT / name, target / name, dirs_exist_ok=True,
                            ignore=shutil.ignore_patterns('__pycache__'))
        shutil.copy(ROOT / 'model-index.yml', target)


setup(
    name='mmseg_edaformer',
    version=VERSION,
    description='EDAFormer for mmsegmentation: efficient segmentation whose cost is a dial',
    long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.11',
    packages=find_packages(include=['mmseg_edaformer', 'mmseg_edaformer.*']),
    package_data={'mmseg_edaformer': ['models/*.cpp', 'analysis/*.jinja', 'export/web/*',
                                      'predict/*.css', 'predict/*.jinja']},
    cmdclass={'build_py': BuildWithConfigs},
    entry_points={'console_scripts': ['edaformer = mmseg_edaformer.__main__:main']},
    # ISR alone: apply_isr and what belongs to it, for models of timm, transformers and others.
    install_requires=['torch>=2.4'],
    extras_require={
        'openmmlab': ['mmengine>=0.10.3', 'mmsegmentation>=1.2.2', 'mmcv-lite>=2.0.1,<2.2.0',
                      'ftfy', 'regex', *RUNS],
        'fork': ['onedl-mmengine>=0.10.8', 'onedl-mmsegmentation>=1.4.0', 'onedl-mmcv>=2.3.0',
                 *RUNS],
        'backbones': ['timm', 'torchvision', 'transformers'],
        # torchvision: mmpretrain needs it and does not declare it.
        'pretrain': ['mmpretrain>=1.2.0', 'torchvision'],
        'pretrain-fork': ['onedl-mmpretrain>=1.3.6', 'torchvision'],
        'cityscapes': ['cityscapesscripts'],
        'demo': ['gradio>=6'],
        'cluster': ['ray[data]'],
        'serve': ['ray[serve]'],
        'export': ['onnx', 'onnxscript', 'onnxruntime', 'openvino', 'nncf'],
        'tensorboard': ['tensorboard'],
        'dev': ['jupytext', 'pytest', 'pytest-xdist', 'ruff', 'mypy', 'timm', 'torchvision',
                'transformers', 'mmpretrain', 'playwright', 'segmentation-models-pytorch'],
    },
)
