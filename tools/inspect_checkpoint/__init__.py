"""Inspect checkpoints and models, and compare two of them."""
