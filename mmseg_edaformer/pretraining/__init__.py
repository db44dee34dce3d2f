"""Pretraining of the encoder on ImageNet: folders, checks, and a small drawn set."""
