"""Sparse autoencoders on language models: train, browse, export."""

__version__ = "0.1.0"
