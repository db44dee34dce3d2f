"""Data sets, and reading them."""
from .datasets import CamVidDataset, SyntheticDataset
from .transforms import LoadSegImage, LoadSegLabels

__all__ = ['CamVidDataset', 'LoadSegImage', 'LoadSegLabels', 'SyntheticDataset']
