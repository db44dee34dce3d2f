"""Prediction with a trained model: images, folders, videos, shards, and a web page."""
